"""Measures of a fake detector, with intervals by bootstrap over videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

RANKING = ("auc", "ap", "eer", "tpr at 1% fpr", "tpr at 5% fpr")
THRESHOLD = ("real accuracy", "fake accuracy", "balanced accuracy")
PROBABILITY = ("log loss", "brier", "calibration error")
BINS = 15


def _curve(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative weight of fakes and of reals above each distinct score: ``(B, K + 1)`` each, starting at 0."""
    order = np.argsort(-scores, kind="stable")
    ordered, fake = scores[order], labels[order].astype(bool)
    last = np.r_[np.flatnonzero(np.diff(ordered)), len(ordered) - 1]
    w = weights[:, order]
    zero = np.zeros((len(w), 1))
    true_positive = np.concatenate([zero, np.cumsum(w * fake, axis=1)[:, last]], axis=1)
    false_positive = np.concatenate([zero, np.cumsum(w * ~fake, axis=1)[:, last]], axis=1)
    return true_positive, false_positive


def ranking_measures(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """AUC, average precision and equal error rate, for one or many weightings of the same items.

    Args:
        labels: ``(N,)``, 1 for fake.
        scores: ``(N,)``, higher for fake.
        weights: ``(B, N)`` non-negative; one row of ones by default.

    Returns:
        ``auc`` (area under the ROC curve, ties counted half), ``ap`` (sum of precision times gain in recall, as in
        scikit-learn), ``eer`` (where the false positive rate equals the false negative rate, linear between the
        points of the ROC curve), ``tpr at 1% fpr`` and ``tpr at 5% fpr`` (the best true positive rate of a threshold with
        no more false positives than that), each ``(B,)``; NaN where a class has no weight, for then they are undefined.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    weights = np.ones((1, len(labels))) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(labels):
        return {name: np.full(len(weights), np.nan) for name in RANKING}
    tp, fp = _curve(labels, scores, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        tpr, fpr = tp / tp[:, -1:], fp / fp[:, -1:]
        auc = (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2).sum(axis=1)
        precision = np.nan_to_num(tp / (tp + fp))
        ap = (np.diff(tpr, axis=1) * precision[:, 1:]).sum(axis=1)
        gap = fpr + tpr - 1  # false positive rate minus false negative rate: rises from -1 to 1
        place = np.clip((gap >= 0).argmax(axis=1), 1, None)
        rows = np.arange(len(gap))
        left, right = gap[rows, place - 1], gap[rows, place]
        share = -left / (right - left)
        eer = fpr[rows, place - 1] + share * (fpr[rows, place] - fpr[rows, place - 1])
        # Rates are sums divided by sums: 1 of 100 must count as 1 %.
        at = [np.where(fpr <= rate + 1e-9, tpr, 0.0).max(axis=1) for rate in (0.01, 0.05)]
    undefined = (tp[:, -1] == 0) | (fp[:, -1] == 0)
    return {name: np.where(undefined, np.nan, value) for name, value in zip(RANKING, (auc, ap, eer, *at), strict=True)}


def threshold_measures(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Accuracy on real, on fake, and their mean (balanced accuracy) of calling ``probabilities >= threshold`` fake.

    Args and the shape of the results: as in :func:`ranking_measures`; NaN for a class that is absent.
    """
    fake = np.asarray(labels).astype(bool)
    right = (np.asarray(probabilities) >= threshold) == fake
    w = np.ones((1, len(fake))) if weights is None else np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        real, of_fakes = ((w * (right & kind)).sum(axis=1) / (w * kind).sum(axis=1) for kind in (~fake, fake))
    return dict(zip(THRESHOLD, (real, of_fakes, (real + of_fakes) / 2), strict=True))


def probability_measures(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """How far the probabilities can be believed.

    Args and the shape of the results: as in :func:`ranking_measures`, with ``probabilities`` of being fake in [0, 1].

    Returns:
        ``log loss`` (natural logarithm, probabilities kept 1e-7 away from 0 and 1), ``brier`` (mean squared error; Brier
        1950, for two classes) and ``calibration error`` (Guo et al. 2017, eq. 3: 15 bins of equal width, of |share of
        fakes - mean probability| in each, weighted by its size). NaN where a class has no weight.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    w = np.ones((1, len(y))) if weights is None else np.asarray(weights, dtype=np.float64)
    total = w.sum(axis=1)
    safe = np.clip(p, 1e-7, 1 - 1e-7)
    bins = np.zeros((len(y), BINS))
    bins[np.arange(len(y)), np.clip(np.ceil(p * BINS).astype(int) - 1, 0, BINS - 1)] = 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = (w @ -(y * np.log(safe) + (1 - y) * np.log1p(-safe))) / total
        brier = (w @ (p - y) ** 2) / total
        gap = np.abs(w @ (bins * (y - p)[:, None])).sum(axis=1) / total
    undefined = ((w @ y) == 0) | ((w @ (1 - y)) == 0)
    return {name: np.where(undefined, np.nan, value) for name, value in zip(PROBABILITY, (loss, brier, gap), strict=True)}


def fit_temperature(labels: np.ndarray, logits: np.ndarray, videos: Sequence[str]) -> float:
    """The temperature T that calibrates ``sigmoid(logits / T)`` on validation data (Guo et al. 2017, section 4.2).

    It minimises the log loss. Where the data are separated that would be T = 0 and certainty, which no finite sample
    justifies; so the targets are Platt's (1999, section 2.2): ``(n + 1) / (n + 2)`` and ``1 / (n + 2)`` for a class with n
    videos. Frames count towards n by their videos, for those of one video are not independent.

    Args:
        labels: ``(N,)``, 1 for fake.
        logits: ``(N,)`` of frames.
        videos: the video of each frame.

    Returns:
        T between 0.01 and 100; 1 where a class is absent.
    """
    y, z = np.asarray(labels).astype(bool), np.asarray(logits, dtype=np.float64)
    if y.all() or not y.any():
        return 1.0
    names = np.asarray(list(videos))
    fakes, reals = len(set(names[y])), len(set(names[~y]))
    target = np.where(y, (fakes + 1) / (fakes + 2), 1 / (reals + 2))

    def loss(log_t: float) -> float:
        scaled = z * np.exp(-log_t)
        return float((np.logaddexp(0, scaled) - target * scaled).mean())

    # Convex in 1/T, so unimodal in log T.
    found = optimize.minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def balanced_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold with the best balanced accuracy; of equally good ones the middle of the widest gap.

    Raises:
        ValueError: a class is absent, so there is nothing to balance.
    """
    fake, p = np.asarray(labels).astype(bool), np.asarray(probabilities, dtype=np.float64)
    if fake.all() or not fake.any():
        raise ValueError("a threshold cannot be chosen on videos of one class")
    cuts = np.unique(np.r_[0.0, p, 1.0])
    middles = (cuts[1:] + cuts[:-1]) / 2
    tpr = (p[fake][None, :] >= middles[:, None]).mean(axis=1)
    tnr = (p[~fake][None, :] < middles[:, None]).mean(axis=1)
    best = np.flatnonzero(np.isclose(tpr + tnr, (tpr + tnr).max()))
    return float(middles[best[np.argmax(np.diff(cuts)[best])]])


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and the number of units it rests on (videos, clips or runs: never frames)."""

    value: float
    low: float
    high: float
    n: int


def aggregate(videos: Sequence[str], labels: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    """One row per video: ``video, label, score`` (mean over its frames), ``frames``."""
    table = pd.DataFrame({"video": list(videos), "label": np.asarray(labels), "score": np.asarray(scores, dtype=np.float64)})
    grouped = table.groupby("video", sort=True)
    mixed = grouped["label"].nunique()
    if (mixed > 1).any():
        raise ValueError(f"the video {mixed.idxmax()!r} has frames of both labels")
    return grouped.agg(label=("label", "first"), score=("score", "mean"), frames=("score", "size")).reset_index()


def _all_measures(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None, threshold: float | None) -> dict[str, np.ndarray]:
    found = ranking_measures(labels, scores, weights) | probability_measures(labels, scores, weights)
    return found if threshold is None else found | threshold_measures(labels, scores, threshold, weights)


def video_bootstrap(
    videos: Sequence[str],
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    threshold: float | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Frame- and video-level measures of a detector with percentile intervals from resampling videos.

    Real and fake videos are resampled apart, so that every resample has both. Frames of a video always go together.

    Args:
        videos: the video of each frame.
        labels: ``(N,)``, 1 for fake, constant within a video.
        scores: ``(N,)`` in [0, 1], higher for fake.
        threshold: of the video-level accuracies; they are left out without one.
        groups: what is resampled, where that is not the video: videos cut from one recording belong together.

    Returns:
        ``frame auc``, ``video auc`` and so on for every measure of :func:`ranking_measures` and
        :func:`probability_measures`, and ``video balanced accuracy`` and so on of :func:`threshold_measures`: estimates
        with ``n`` videos (groups). With fewer than two of them in a class the interval is NaN: its spread cannot be known.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    table = aggregate(videos, labels, scores)
    code = pd.Categorical(list(videos), categories=table["video"]).codes
    group_of = pd.Series(list(groups if groups is not None else videos)).groupby(code).first()
    group, names = pd.factorize(group_of, sort=True)
    group_label = pd.Series(table["label"].to_numpy()).groupby(group).first().to_numpy()
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(names)))
    enough = True
    for label in (0, 1):
        members = np.flatnonzero(group_label == label)
        enough &= len(members) >= 2
        if len(members):
            counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    counts = counts[:, group]
    result: dict[str, Estimate] = {}
    tail = 100 * (1 - level) / 2
    for kind, y, s, place in (
        ("frame", labels, scores, code),
        ("video", table["label"].to_numpy(), table["score"].to_numpy(), np.arange(len(table))),
    ):
        cut = threshold if kind == "video" else None
        point = _all_measures(y, s, None, cut)
        # In portions: weights of a thousand resamples of a hundred thousand frames would fill the memory several times over.
        portions = [_all_measures(y, s, part[:, place], cut) for part in np.array_split(counts, max(1, len(counts) * len(y) // 5_000_000))]
        spread = {name: np.concatenate([part[name] for part in portions]) for name in point}
        for name, value in point.items():
            known = enough and np.isfinite(value[0])
            low, high = np.nanpercentile(spread[name], [tail, 100 - tail]) if known else (np.nan, np.nan)
            result[f"{kind} {name}"] = Estimate(float(value[0]), float(low), float(high), len(names))
    return result
