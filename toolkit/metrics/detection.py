"""Measures of a fake detector, with intervals by bootstrap over videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

RANKING = ("auc", "ap", "eer")


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
        scikit-learn) and ``eer`` (where the false positive rate equals the false negative rate, linear between the
        points of the ROC curve), each ``(B,)``; NaN where a class has no weight, for then they are undefined.
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
    undefined = (tp[:, -1] == 0) | (fp[:, -1] == 0)
    return {name: np.where(undefined, np.nan, value) for name, value in (("auc", auc), ("ap", ap), ("eer", eer))}


def threshold_measures(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float]:
    """Accuracy on real, on fake, and their mean (balanced accuracy) at ``threshold``; NaN for a class that is absent."""
    fake = np.asarray(labels).astype(bool)
    called = np.asarray(probabilities) >= threshold
    fake_accuracy = float(called[fake].mean()) if fake.any() else float("nan")
    real_accuracy = float((~called[~fake]).mean()) if (~fake).any() else float("nan")
    return {
        "real accuracy": real_accuracy,
        "fake accuracy": fake_accuracy,
        "balanced accuracy": (real_accuracy + fake_accuracy) / 2,
    }


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


def video_bootstrap(
    videos: Sequence[str],
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Frame- and video-level AUC, AP and EER with percentile intervals from resampling videos.

    Real and fake videos are resampled apart, so that every resample has both. Frames of a video always go together.

    Args:
        videos: the video of each frame.
        labels: ``(N,)``, 1 for fake, constant within a video.
        scores: ``(N,)``, higher for fake.

    Returns:
        ``frame auc``, ``frame ap``, ``frame eer``, ``video auc``, ...: estimates with ``n`` videos. With fewer than two
        videos in a class the interval is NaN: its spread cannot be known.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    table = aggregate(videos, labels, scores)
    code = pd.Categorical(list(videos), categories=table["video"]).codes
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(table)))
    enough = True
    for label in (0, 1):
        members = np.flatnonzero(table["label"].to_numpy() == label)
        enough &= len(members) >= 2
        if len(members):
            counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    result: dict[str, Estimate] = {}
    tail = 100 * (1 - level) / 2
    for kind, y, s, w in (
        ("frame", labels, scores, counts[:, code]),
        ("video", table["label"].to_numpy(), table["score"].to_numpy(), counts),
    ):
        point = ranking_measures(y, s)
        spread = ranking_measures(y, s, w)
        for name in RANKING:
            low, high = np.percentile(spread[name], [tail, 100 - tail]) if enough else (np.nan, np.nan)
            result[f"{kind} {name}"] = Estimate(float(point[name][0]), float(low), float(high), len(table))
    return result
