"""Detection measures against scikit-learn, and the bootstrap against what it must do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn import metrics as sk

from toolkit.metrics.detection import (
    aggregate,
    balanced_threshold,
    ranking_measures,
    threshold_measures,
    video_bootstrap,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=2, max_size=60))
def test_auc_and_ap_equal_scikit_learn_with_ties(items: list[tuple[int, int]]) -> None:
    labels, scores = (np.array(v) for v in zip(*items, strict=True))
    ours = ranking_measures(labels, scores)
    if len(set(labels)) < 2:
        assert all(np.isnan(v[0]) for v in ours.values())
        return
    assert ours["auc"][0] == pytest.approx(sk.roc_auc_score(labels, scores), rel=1e-9, abs=1e-12)
    assert ours["ap"][0] == pytest.approx(sk.average_precision_score(labels, scores), rel=1e-9)
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    by_root = brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1) if len(np.unique(fpr)) == len(fpr) else None
    if by_root is not None:
        assert ours["eer"][0] == pytest.approx(by_root, abs=1e-6)


def test_eer_by_hand() -> None:
    # Scores 0.9 f, 0.8 r, 0.7 f, 0.6 r: ROC (0,0) (0,.5) (.5,.5) (.5,1) (1,1); fpr = 1 - tpr at fpr 0.5.
    assert ranking_measures(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6]))["eer"][0] == pytest.approx(0.5)
    assert ranking_measures(np.array([1, 1, 0, 0]), np.array([4, 3, 2, 1]))["eer"][0] == 0
    assert ranking_measures(np.array([0, 0, 1, 1]), np.array([4, 3, 2, 1]))["eer"][0] == 1


def test_weights_mean_repetition() -> None:
    rng = np.random.default_rng(0)
    labels, scores, counts = rng.integers(0, 2, 50), rng.normal(size=50), rng.integers(0, 4, 50)
    weighted = ranking_measures(labels, scores, counts[None].astype(float))
    repeated = ranking_measures(np.repeat(labels, counts), np.repeat(scores, counts))
    for name in ("auc", "ap", "eer"):
        assert weighted[name][0] == pytest.approx(repeated[name][0], abs=1e-9)


def test_one_class_is_undefined_never_one_half() -> None:
    result = video_bootstrap(["a", "a", "b"], np.ones(3), np.array([0.1, 0.2, 0.9]))
    assert all(np.isnan(e.value) and np.isnan(e.low) for e in result.values())
    assert np.isnan(threshold_measures(np.ones(3), np.ones(3), 0.5)["balanced accuracy"])
    with pytest.raises(ValueError, match="one class"):
        balanced_threshold(np.ones(3), np.ones(3))


def test_intervals_rest_on_videos_not_frames() -> None:
    rng = np.random.default_rng(0)
    quality = np.r_[rng.normal(0, 1, 12), rng.normal(1, 1, 12)]  # one number per video decides all of its frames
    labels = np.r_[np.zeros(12), np.ones(12)]

    def width(frames: int) -> float:
        videos = np.repeat([f"v{i}" for i in range(24)], frames)
        noise = np.random.default_rng(1).normal(0, 0.01, 24 * frames)
        e = video_bootstrap(list(videos), np.repeat(labels, frames), np.repeat(quality, frames) + noise)["frame auc"]
        assert e.low <= e.value <= e.high
        assert e.n == 24
        return e.high - e.low

    assert width(50) > 0.8 * width(1)  # fifty times the frames know no more


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = 0.760  # P(N(1,1) > N(0,1)) = Phi(1 / sqrt 2)
    hits = 0
    for _ in range(120):
        scores = np.r_[rng.normal(0, 1, 40), rng.normal(1, 1, 40)]
        e = video_bootstrap([str(i) for i in range(80)], np.r_[np.zeros(40), np.ones(40)], scores, resamples=200)["video auc"]
        hits += e.low <= truth <= e.high
    assert 0.87 <= hits / 120 <= 1.0


def test_one_video_in_a_class_has_no_interval() -> None:
    e = video_bootstrap(["a", "b", "c"], np.array([0, 1, 1]), np.array([0.1, 0.9, 0.8]))["video auc"]
    assert e.value == 1.0
    assert np.isnan(e.low)


def test_aggregate_and_threshold() -> None:
    table = aggregate(["b", "a", "a"], np.array([1, 0, 0]), np.array([0.9, 0.2, 0.4]))
    assert table["score"].tolist() == pytest.approx([0.3, 0.9])
    with pytest.raises(ValueError, match="both labels"):
        aggregate(["a", "a"], np.array([0, 1]), np.array([0.1, 0.2]))
    labels, p = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.5, 0.9])
    t = balanced_threshold(labels, p)
    assert 0.2 < t < 0.5
    assert threshold_measures(labels, p, t) == {
        "real accuracy": pytest.approx(2 / 3),
        "fake accuracy": 1.0,
        "balanced accuracy": pytest.approx(5 / 6),
    }
    assert balanced_threshold(np.array([0, 1]), np.array([0.2, 0.8])) == pytest.approx(0.5)
