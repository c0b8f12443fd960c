"""Which differences the seeds show: paired comparisons of a factor's levels, and how much of the variance each factor explains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


def over_seeds(values: pd.Series | np.ndarray) -> tuple[float, float, float, int]:
    """Mean and 95% t-interval of one figure over seeds: ``(mean, low, high, n)``; no interval for fewer than two."""
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) == 0:
        return (float("nan"),) * 3 + (0,)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, float("nan"), float("nan"), 1
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half, len(x)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's (1979) adjusted p-values of a family of tests; NaN entries stay NaN and do not count."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, (len(order) - rank) * p[place])
        adjusted[place] = min(1.0, running)
    return adjusted


def paired_p(delta: np.ndarray) -> float:
    """Two-sided p-value of a paired t-test on differences; NaN where there are fewer than two, or they do not vary.

    Differences that do not vary at all come from measures at their limit (an AUC of 1 everywhere), where a t-test's
    assumption fails; they prove nothing.
    """
    if len(delta) < 2 or not delta.std(ddof=1) > 1e-12 * max(1.0, float(np.abs(delta).max())):
        return float("nan")
    return float(stats.ttest_1samp(delta, 0.0).pvalue)


@dataclass(frozen=True)
class Comparison:
    """The levels of one factor compared in one measure.

    Attributes:
        metric, factor: what was compared.
        means: level -> (mean over blocks, low, high, blocks), best first.
        pairs: a row for every pair of levels: ``a, b, difference`` (a minus b), ``low, high`` (95% t-interval), ``n`` blocks,
            ``p`` of the paired t-test, ``p_holm`` after Holm's correction over all pairs. ``a`` is the better one.
    """

    metric: str
    factor: str
    means: dict[str, tuple[float, float, float, int]]
    pairs: pd.DataFrame

    @property
    def alike(self) -> bool:
        """Whether all levels have the same mean, as where a measure is at its limit."""
        values = [mean for mean, *_ in self.means.values()]
        return bool(np.ptp(values) <= 1e-6 * max(1.0, float(np.abs(values).max())))

    @property
    def shown(self) -> pd.DataFrame:
        """The pairs whose difference is significant at 5 % after the correction."""
        return self.pairs[self.pairs["p_holm"] < 0.05]


def compare(
    rows: pd.DataFrame, metric: str, *, factor: str = "generator", block: Sequence[str] = ("seed",), lower_is_better: bool = True
) -> Comparison | None:
    """Compare the levels of ``factor`` in ``metric``, paired within blocks.

    Args:
        rows: a results table's rows of one measure.
        metric: name for the result.
        factor: column with the levels.
        block: columns that make up a block: everything else that differs between trainings.
        lower_is_better: whether the lowest mean comes first.

    Returns:
        None with fewer than two levels.
    """
    wide = rows.pivot_table(index=factor, columns=list(block), values="value", aggfunc="mean", sort=False).dropna(how="all")
    if len(wide) < 2:
        return None
    # Means over the blocks that all levels have: a level that failed where others found it hard would seem better.
    whole = wide.dropna(axis=1)
    order = (whole if whole.shape[1] else wide).mean(axis=1).sort_values(ascending=lower_is_better, kind="stable").index
    found = []
    for a, b in itertools.combinations(order, 2):
        delta = (wide.loc[a] - wide.loc[b]).dropna().to_numpy()
        mean, low, high, n = over_seeds(delta)
        found.append({"a": str(a), "b": str(b), "difference": mean, "low": low, "high": high, "n": n, "p": paired_p(delta)})
    pairs = pd.DataFrame(found)
    pairs["p_holm"] = holm(pairs["p"].tolist())
    means = {str(level): over_seeds(wide.loc[level].to_numpy()) for level in order}
    return Comparison(metric, factor, means, pairs)


def effects(rows: pd.DataFrame, factors: Sequence[str] = ("activation", "upsampling"), block: str = "seed") -> pd.DataFrame | None:
    """How much of a measure's variance each factor explains: analysis of variance of a complete block design.

    ``value = mean + block + a + b + a x b + rest``, every combination once in each block (Fisher 1935); with one factor
    ``value = mean + block + a + rest``. Blocks in which a combination is missing are left out.

    Args:
        rows: a results table's rows of one measure.
        factors: one or two columns; one that has a single level is left out.
        block: column of the blocks.

    Returns:
        A row for each of the factors, their interaction, ``block`` and ``rest``: ``source, share`` (of the total sum of
        squares), ``df, F, p, range`` (largest minus smallest marginal mean). None where fewer than two complete blocks, or
        no factor with two levels, are left.
    """
    used = [f for f in factors if rows[f].nunique() > 1]
    if not used:
        return None
    wide = rows.pivot_table(index=block, columns=used, values="value", aggfunc="mean")
    if wide.shape[1] < int(np.prod([rows[f].nunique() for f in used])):
        return None
    wide = wide.dropna()
    if len(wide) < 2:
        return None
    shape = (len(wide), *[len(rows[f].dropna().unique()) for f in used])
    y = wide.sort_index(axis=1).to_numpy().reshape(shape)
    y = y - y.mean()
    total = float((y**2).sum())
    if total == 0:
        return None

    def square(axes: tuple[int, ...]) -> float:
        other = tuple(i for i in range(y.ndim) if i not in axes)
        return float((y.mean(axis=other) ** 2).sum() * y.size / np.prod([shape[i] for i in axes]))

    table: list[tuple[str, float, int, float]] = []
    for place, name in enumerate(used, start=1):
        margin = y.mean(axis=tuple(i for i in range(y.ndim) if i != place))
        table.append((name, square((place,)), shape[place] - 1, float(np.ptp(margin))))
    if len(used) == 2:
        joint = square((1, 2)) - table[0][1] - table[1][1]
        table.append((" x ".join(used), joint, (shape[1] - 1) * (shape[2] - 1), float("nan")))
    blocks = square((0,))
    rest_df = (shape[0] - 1) * (int(np.prod(shape[1:])) - 1)
    rest = max(0.0, total - blocks - sum(row[1] for row in table))
    found = []
    for name, ss, df, spread in table:
        ratio = (ss / df) / (rest / rest_df) if rest > 0 else float("nan")
        found.append(
            {
                "source": name,
                "share": ss / total,
                "df": df,
                "F": ratio,
                "p": float(stats.f.sf(ratio, df, rest_df)) if np.isfinite(ratio) else float("nan"),
                "range": spread,
            }
        )
    nan = float("nan")
    found.append({"source": block, "share": blocks / total, "df": shape[0] - 1, "F": nan, "p": nan, "range": nan})
    found.append({"source": "rest", "share": rest / total, "df": rest_df, "F": nan, "p": nan, "range": nan})
    return pd.DataFrame(found)
