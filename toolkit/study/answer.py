"""The study's answer in words: which differences are shown by the seeds, and which are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from toolkit.study.compare import Comparison, compare, effects, over_seeds
from toolkit.study.spec import CONTROL, REAL, STRANGERS

DETECTABILITY = "frame auc"
SPOILED = "frame auc of spoiled frames"
FACTORS = ("activation", "upsampling")


def quality_metric(table: pd.DataFrame) -> str:
    """The measure that stands for quality: the Fréchet distance in the study's first feature space."""
    names = [name for name in table["metric"].unique() if name.startswith("Fréchet distance")]
    return str(names[0]) if names else ""


def own_detection(table: pd.DataFrame, metric: str = DETECTABILITY) -> pd.DataFrame:
    """Rows of detectors tested on the generator they were trained on, with that generator in ``generator``."""
    rows = table[(table["metric"] == metric) & (table["trained_on"] == table["tested_on"]) & (table["perturbation"] == "")]
    rows = rows[~rows["trained_on"].isin(["", CONTROL])]
    return rows.assign(generator=rows["trained_on"])


def spoiled_detection(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each detector: its frame AUC, the mean over all perturbations (each the mean over its levels).

    On untouched frames of one source most detectors find every fake, so nothing can be told apart there.
    """
    rows = table[(table["metric"] == DETECTABILITY) & (table["perturbation"] != "")]
    keys = ["trained_on", "activation", "upsampling", "seed"]
    mean = rows.groupby([*keys, "perturbation"], as_index=False)["value"].mean().groupby(keys, as_index=False)["value"].mean()
    return mean.assign(generator=mean["trained_on"], metric=SPOILED, better="higher", floor=float("nan"))


def of_generators(table: pd.DataFrame, metric: str, checkpoint: str = "final") -> pd.DataFrame:
    """Rows of ``metric`` for generators, the real ones left out; of detection measures, those of each one's own detector."""
    if metric == SPOILED:
        return spoiled_detection(table)
    rows = table[(table["metric"] == metric) & (table["checkpoint"] == checkpoint) & ~table["generator"].isin([REAL, STRANGERS, ""])]
    return rows if len(rows) or checkpoint != "final" else own_detection(table, metric)


def distance_to_ideal(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with lower values for better ones: as they are, negated, or |value - real clips' value|, as the measure wants."""
    if rows.empty:
        return rows
    better = rows["better"].iloc[0]
    if better == "real":
        return rows.assign(value=(rows["value"] - rows["floor"]).abs())
    return rows.assign(value=-rows["value"]) if better == "higher" else rows


def comparisons(table: pd.DataFrame) -> dict[tuple[str, str], Comparison]:
    """``(metric, factor)`` -> the comparison of that factor's levels, paired over everything else that was varied.

    Measures where like-real is the ideal are compared by their distance from the real clips' figure.
    """
    crossed = [f for f in FACTORS if table.loc[table[f] != "", f].nunique() > 1]
    found: dict[tuple[str, str], Comparison] = {}
    for metric in [*table.loc[(table["perturbation"] == ""), "metric"].unique(), SPOILED]:
        rows = of_generators(table, metric)
        for factor in crossed:
            block = ["seed", *(f for f in crossed if f != factor)]
            lower = bool(len(rows)) and rows["better"].iloc[0] != "higher"
            values = distance_to_ideal(rows) if len(rows) and rows["better"].iloc[0] == "real" else rows
            comparison = compare(values, metric, factor=factor, block=block, lower_is_better=lower) if len(values) else None
            if comparison is not None:
                found[metric, factor] = comparison
    return found


def differences(found: dict[tuple[str, str], Comparison]) -> pd.DataFrame:
    """All pairs of all comparisons as one table: ``metric, factor`` and the columns of :attr:`Comparison.pairs`."""
    parts = [c.pairs.assign(metric=metric, factor=factor) for (metric, factor), c in found.items()]
    columns = ["metric", "factor", "a", "b", "difference", "low", "high", "n", "p", "p_holm"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def interval(figure: tuple[float, float, float, int], digits: int = 3, bounds: tuple[float, float] = (-np.inf, np.inf)) -> str:
    """``1.23 (95% interval 1.10 to 1.36)``; the interval is cut at ``bounds``, which the figure cannot leave."""
    mean, low, high, _ = figure
    low, high = max(low, bounds[0]), min(high, bounds[1])
    return f"{mean:.{digits}g}" + (f" (95% interval {low:.{digits}g} to {high:.{digits}g})" if np.isfinite(low) else "")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def sentence(comparison: Comparison, best_word: str, worst_word: str, bounds: tuple[float, float] = (-np.inf, np.inf)) -> str:
    """Two or three sentences on one comparison, which can also say that no difference is shown."""
    labels = list(comparison.means)
    first, last = labels[0], labels[-1]
    n = comparison.means[first][3]
    if comparison.alike:
        return f"all are alike: {comparison.metric} {comparison.means[first][0]:.3g} (means of {_count(n, 'training')})."
    text = (
        f"{best_word}: {first}, {comparison.metric} {interval(comparison.means[first], bounds=bounds)}; "
        f"{worst_word}: {last}, {interval(comparison.means[last], bounds=bounds)} (means of {_count(n, 'training')}). "
    )
    if n < 2:
        return text + "With one seed nothing can be said about the difference: it may be the seed's."
    shown = comparison.shown
    if len(shown):
        pairs = ", ".join(f"{row.a} from {row.b}" for row in shown.itertuples())
        most = f"{len(shown)} of {len(comparison.pairs)} pairs"
        return text + f"A difference is shown for {most}: {pairs} (paired over {n} trainings, Holm-corrected p < 0.05)."
    pair = comparison.pairs[(comparison.pairs["a"] == first) & (comparison.pairs["b"] == last)].iloc[0]
    reach = bounds[1] - bounds[0]
    low, high = sorted(float(np.clip(-v, -reach, reach)) for v in (pair["low"], pair["high"]))
    return text + (
        f"No difference is shown: paired over {n} trainings, that between these two lies between {low:.3g} and {high:.3g}, "
        "and no pair stays below p = 0.05 after Holm's correction." + (" So few could only show very large effects." if n < 4 else "")
    )


def _shares(rows: pd.DataFrame) -> str:
    found = effects(rows, FACTORS)
    if found is None:
        return ""
    parts = []
    for row in found.itertuples():
        if row.source == "seed":
            parts.append(f"the seed {row.share:.0%}")
        elif row.source == "rest":
            parts.append(f"chance the remaining {row.share:.0%}")
        else:
            p = f" (p {'< 0.001' if row.p < 0.001 else f'= {row.p:.3f}'})" if np.isfinite(row.p) else ""
            name = "their interaction" if " x " in row.source else f"the {row.source}"
            parts.append(f"{name} explains {row.share:.0%}{p}" if not parts else f"{name} {row.share:.0%}{p}")
    return "Of the variance between trainings " + ", ".join(parts) + "."


def answer(table: pd.DataFrame, found: dict[tuple[str, str], Comparison] | None = None) -> list[str]:
    """The report's first paragraphs: quality, detectability, what the upsampling did beside it, the control.

    Args:
        table: of the study.
        found: the result of :func:`comparisons`, if it is at hand.

    Returns:
        Paragraphs that begin with a headline and a full stop.
    """
    found = comparisons(table) if found is None else found
    lines = []
    metric = quality_metric(table)
    words: Sequence[tuple[str, str, str, str, tuple[float, float]]] = (
        ("Quality", metric, "closest to the real training frames", "farthest", (0, np.inf)),
        ("Detection", DETECTABILITY, "hardest to detect by its own detector", "easiest", (0, 1)),
        ("Detection of spoiled frames", SPOILED, "hardest to detect", "easiest", (0, 1)),
    )
    for title, name, best, worst, bounds in words:
        for factor in FACTORS:
            comparison = found.get((name, factor))
            if comparison is None:
                continue
            if name in (DETECTABILITY, SPOILED):
                comparison = _turned(comparison)
            lines.append(f"{title} by {factor}. {_capital(sentence(comparison, best, worst, bounds))}")
        if (name, "upsampling") in found and (text := _shares(of_generators(table, name))):
            lines.append(f"{title}, activation beside upsampling. {text}")
    lines += _best_against_final(table, metric) + _transfer(table) + _control_line(table)
    return lines


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _turned(comparison: Comparison) -> Comparison:
    """The same with the order of the levels reversed."""
    pairs = comparison.pairs.rename(columns={"a": "b", "b": "a"}).assign(difference=-comparison.pairs["difference"])
    pairs = pairs.assign(low=-comparison.pairs["high"], high=-comparison.pairs["low"])
    return Comparison(comparison.metric, comparison.factor, dict(reversed(comparison.means.items())), pairs)


def _best_against_final(table: pd.DataFrame, metric: str) -> list[str]:
    final, best = (of_generators(table, metric, c).set_index(["generator", "seed"])["value"] for c in ("final", "best"))
    both = pd.concat([final, best], axis=1, keys=["final", "best"]).dropna()
    if both.empty:
        return []
    mean, low, high, n = over_seeds((both["final"] - both["best"]).to_numpy())
    same = int((both["final"] == both["best"]).sum())
    text = f"Best checkpoint. The one that is best on validation people is the final one in {same} of {_count(n, 'training')}. "
    if not np.isfinite(low):
        return [text + f"Against the training frames its {metric} is {abs(mean):.3g} {'lower' if mean > 0 else 'higher'}."]
    lower, upper = sorted((abs(low), abs(high)))
    if low <= 0 <= high:
        return [text + f"Against the training frames its {metric} is not told from the final one's (difference {-high:.3g} to {-low:.3g})."]
    way = "lower" if mean > 0 else "higher"
    return [
        text + f"Against the training frames its {metric} is {abs(mean):.3g} {way} in the mean (95% interval {lower:.3g} to {upper:.3g})."
    ]


def _transfer(table: pd.DataFrame) -> list[str]:
    matrix = table[(table["metric"] == DETECTABILITY) & ~table["trained_on"].isin(["", CONTROL]) & (table["perturbation"] == "")]
    if matrix.empty:
        return []
    same = matrix[matrix["trained_on"] == matrix["tested_on"]]["value"].mean()
    other = matrix[matrix["trained_on"] != matrix["tested_on"]]["value"].mean()
    if not np.isfinite(other):
        return []
    return [
        f"Transfer. A detector's frame AUC averages {same:.3f} on fakes of its own generator and {other:.3f} on those of the "
        "other generators."
    ]


def _control_line(table: pd.DataFrame) -> list[str]:
    control = table[(table["trained_on"] == CONTROL) & (table["metric"] == DETECTABILITY)]
    if control.empty:
        return []
    mean, low, high, n = over_seeds(control["value"])
    people = int(control["n"].min())
    apart = any(row.ci_low > 0.5 or row.ci_high < 0.5 for row in control.itertuples())
    verdict = (
        "In at least one seed it stands apart from chance: treat the detection figures with care."
        if apart
        else "It does not stand apart from chance."
        if people >= 10
        else "That few cannot show whether it stands apart from chance."
    )
    return [
        "Control. A detector trained on real people against other real people reaches a frame AUC of "
        f"{interval((mean, low, high, n), bounds=(0, 1))} on {people} test videos; chance is 0.5. {verdict}"
    ]
