"""The study's answer in words: which differences are shown by the seeds, and which are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from toolkit.study.spec import CONTROL, REAL, STRANGERS
from toolkit.study.table import over_seeds

DETECTABILITY = "frame auc"
QUALITY = "Fréchet distance"


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


@dataclass(frozen=True)
class Comparison:
    """Every generator beside the one with the best mean, in one measure.

    Attributes:
        metric: the measure.
        means: label -> (mean over seeds, low, high, seeds), best first.
        differences: label -> (its value minus the best one's: mean, low, high, seeds).
        p: label -> p-value of the paired t-test on that difference, after Holm's correction.
    """

    metric: str
    means: dict[str, tuple[float, float, float, int]]
    differences: dict[str, tuple[float, float, float, int]]
    p: dict[str, float]

    @property
    def shown(self) -> list[str]:
        """Labels whose difference from the best is significant at 5 % after the correction."""
        return [label for label, p in self.p.items() if p < 0.05]


def own_detection(table: pd.DataFrame, metric: str = DETECTABILITY) -> pd.DataFrame:
    """Rows of detectors tested on the generator they were trained on, with that generator in ``generator``."""
    rows = table[(table["metric"] == metric) & (table["trained_on"] == table["tested_on"]) & ~table["trained_on"].isin(["", CONTROL])]
    return rows.assign(generator=rows["trained_on"])


def compare(rows: pd.DataFrame, metric: str, lower_is_better: bool = True) -> Comparison | None:
    """Compare generators in one measure, paired by seed.

    Args:
        rows: with ``generator, seed, value``; the real floor is left out.
        metric: name for the result.
        lower_is_better: whether the lowest mean comes first.

    Returns:
        None with fewer than two generators.
    """
    wide = rows[~rows["generator"].isin([REAL, STRANGERS])].pivot_table(
        index="generator", columns="seed", values="value", aggfunc="mean", sort=False
    )
    wide = wide.dropna(how="all")
    if len(wide) < 2:
        return None
    order = wide.mean(axis=1).sort_values(ascending=lower_is_better).index
    best = wide.loc[order[0]]
    differences, raw = {}, {}
    for label in order[1:]:
        delta = (wide.loc[label] - best).dropna().to_numpy()
        differences[str(label)] = over_seeds(delta)
        enough = len(delta) >= 2 and delta.std(ddof=1) > 0
        raw[str(label)] = float(stats.ttest_1samp(delta, 0.0).pvalue) if enough else float("nan")
    adjusted = holm(list(raw.values()))
    means = {str(label): over_seeds(wide.loc[label].to_numpy()) for label in order}
    return Comparison(metric, means, differences, dict(zip(raw, adjusted.tolist(), strict=True)))


def interval(figure: tuple[float, float, float, int], digits: int = 3, bounds: tuple[float, float] = (-np.inf, np.inf)) -> str:
    """``1.23 (95% interval 1.10 to 1.36, 3 seeds)``; the interval is cut at ``bounds``, which the figure cannot leave."""
    mean, low, high, n = figure
    low, high = max(low, bounds[0]), min(high, bounds[1])
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    return f"{mean:.{digits}g} ({f'95% interval {low:.{digits}g} to {high:.{digits}g}, ' if np.isfinite(low) else ''}{seeds})"


def sentence(comparison: Comparison, best_word: str, worst_word: str, bounds: tuple[float, float] = (-np.inf, np.inf)) -> str:
    """Two or three sentences on one comparison, which can also say that no difference is shown."""
    labels = list(comparison.means)
    first, last = labels[0], labels[-1]
    n = comparison.means[first][3]
    text = (
        f"{best_word}: {first}, {comparison.metric} {interval(comparison.means[first], bounds=bounds)}; "
        f"{worst_word}: {last}, {interval(comparison.means[last], bounds=bounds)}. "
    )
    if n < 2:
        return text + "With one seed nothing can be said about the difference: it may be the seed's."
    if comparison.shown:
        rest = [label for label in labels[1:] if label not in comparison.shown]
        text += f"The difference from {first} is shown for {', '.join(comparison.shown)} (paired over {n} seeds, Holm-corrected p < 0.05)"
        return text + (f"; it is not shown for {', '.join(rest)}." if rest else ".")
    reach = bounds[1] - bounds[0]
    low, high = (float(np.clip(v, -reach, reach)) for v in comparison.differences[last][1:3])
    return text + (
        f"No difference between activations is shown: paired over {n} seeds, that between these two lies between "
        f"{low:.3g} and {high:.3g}, and no pair stays below p = 0.05 after Holm's correction."
        + (" With so few seeds only very large effects could be." if n < 4 else "")
    )


def spread_ratio(rows: pd.DataFrame) -> float:
    """Standard deviation between generators' means over that between seeds of one generator; above 1, choice beats chance."""
    wide = rows[~rows["generator"].isin([REAL, STRANGERS])].pivot_table(index="generator", columns="seed", values="value", aggfunc="mean")
    if wide.shape[0] < 2 or wide.shape[1] < 2:
        return float("nan")
    within = float(np.sqrt(np.nanmean(wide.var(axis=1, ddof=1))))
    return float(wide.mean(axis=1).std(ddof=1)) / within if within > 0 else float("inf")


def answer(table: pd.DataFrame) -> list[str]:
    """The report's first paragraphs: quality, detectability, the control, and how far the seeds carry."""
    lines = []
    quality = table[(table["metric"] == QUALITY) & (table["generator"] != "")]
    if comparison := compare(quality, QUALITY):
        lines.append("Quality of the frames. " + sentence(comparison, "Closest to the real training frames", "farthest"))
        ratio = spread_ratio(quality)
        if np.isfinite(ratio):
            lines.append(
                f"Activations against chance. The mean {QUALITY} varies {ratio:.1f} times as much between activations as between seeds "
                "of one activation."
            )
    detection = own_detection(table)
    if comparison := compare(detection, "frame AUC"):
        lines.append(
            "Detection. For detectors tested on the generator they were trained on: "
            + sentence(comparison, "hardest to detect", "easiest", bounds=(0, 1))
        )
    matrix = table[(table["metric"] == DETECTABILITY) & ~table["trained_on"].isin(["", CONTROL])]
    if not matrix.empty:
        same = matrix[matrix["trained_on"] == matrix["tested_on"]]["value"].mean()
        other = matrix[matrix["trained_on"] != matrix["tested_on"]]["value"].mean()
        if np.isfinite(other):
            lines.append(
                f"Transfer. A detector's frame AUC averages {same:.3f} on fakes of its own generator and {other:.3f} on those of the "
                f"other activations."
            )
    control = table[(table["trained_on"] == CONTROL) & (table["metric"] == DETECTABILITY)]
    if not control.empty:
        mean, low, high, n = over_seeds(control["value"])
        videos = int(control["n"].min())
        chance = all(not (row.ci_low > 0.5 or row.ci_high < 0.5) for row in control.itertuples())
        lines.append(
            "Control. A detector trained on real people against other real people reaches a frame AUC of "
            f"{interval((mean, low, high, n), bounds=(0, 1))} "
            f"on {videos} test videos; chance is 0.5. "
            + (
                "It does not stand apart from chance."
                if chance
                else "In at least one seed it stands apart from chance: treat the detection figures with care."
            )
        )
    return lines
