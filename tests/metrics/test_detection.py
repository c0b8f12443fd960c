"""Detection measures against scikit-learn, and the bootstrap against what it must do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error

from toolkit.metrics.detection import (
    aggregate,
    balanced_threshold,
    fit_temperature,
    probability_measures,
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
    for name, value in weighted.items():
        assert value[0] == pytest.approx(repeated[name][0], abs=1e-9), name
    p = 1 / (1 + np.exp(-scores))
    for function in (probability_measures, lambda *a: threshold_measures(*a[:2], 0.4, *a[2:])):
        weighted, repeated = function(labels, p, counts[None].astype(float)), function(np.repeat(labels, counts), np.repeat(p, counts))
        for name, value in weighted.items():
            assert value[0] == pytest.approx(repeated[name][0], abs=1e-9), name


def test_one_class_is_undefined_never_one_half() -> None:
    result = video_bootstrap(["a", "a", "b"], np.ones(3), np.array([0.1, 0.2, 0.9]))
    assert all(np.isnan(e.value) and np.isnan(e.low) for e in result.values())
    assert np.isnan(threshold_measures(np.ones(3), np.ones(3), 0.5)["balanced accuracy"][0])
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
    assert {k: v[0] for k, v in threshold_measures(labels, p, t).items()} == {
        "real accuracy": pytest.approx(2 / 3),
        "fake accuracy": 1.0,
        "balanced accuracy": pytest.approx(5 / 6),
    }
    assert threshold_measures(labels, p, t)["balanced accuracy"][0] == pytest.approx(sk.balanced_accuracy_score(labels, p >= t))
    assert balanced_threshold(np.array([0, 1]), np.array([0.2, 0.8])) == pytest.approx(0.5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=2, max_size=80), st.sampled_from([0.01, 0.05]))
def test_tpr_at_fpr_equals_scikit_learn(items: list[tuple[int, int]], rate: float) -> None:
    labels, scores = (np.array(v) for v in zip(*items, strict=True))
    if len(set(labels)) < 2:
        return
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    ours = ranking_measures(labels, scores)[f"tpr at {rate:.0%} fpr"][0]
    assert ours == pytest.approx(tpr[fpr <= rate].max())


def test_tpr_at_one_percent_counts_one_of_a_hundred() -> None:
    labels = np.r_[np.zeros(100), np.ones(4)]
    scores = np.r_[np.linspace(0, 0.5, 99), 0.8, 0.9, 0.7, 0.6, 0.1]
    assert ranking_measures(labels, scores)["tpr at 1% fpr"][0] == pytest.approx(3 / 4)


def test_probability_measures_equal_scikit_learn_and_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    p = np.clip(rng.beta(2, 2, 500) * 0.7 + 0.3 * labels, 0, 1)
    p[:3] = [0.0, 1.0, 0.2]
    labels[:2] = [0, 1]
    ours = {k: v[0] for k, v in probability_measures(labels, p).items()}
    assert ours["log loss"] == pytest.approx(sk.log_loss(labels, np.clip(p, 1e-7, 1 - 1e-7)), rel=1e-9)
    assert ours["brier"] == pytest.approx(sk.brier_score_loss(labels, p), rel=1e-9)
    theirs = binary_calibration_error(torch.from_numpy(p), torch.from_numpy(labels), n_bins=15, norm="l1")
    assert ours["calibration error"] == pytest.approx(float(theirs), rel=1e-6)
    # Two bins by hand: 0.1 twice (one fake), 0.9 twice (both fake): (2 |0.5 - 0.1| + 2 |1 - 0.9|) / 4.
    by_hand = probability_measures(np.array([0, 1, 1, 1]), np.array([0.1, 0.1, 0.9, 0.9]))["calibration error"][0]
    assert by_hand == pytest.approx(0.25)


def test_temperature_is_recovered_and_lowers_the_loss() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 6000)  # log-odds as they should be
    labels = (rng.random(6000) < 1 / (1 + np.exp(-truth))).astype(int)
    videos = [str(i) for i in range(6000)]
    for factor in (0.25, 1.0, 4.0):
        t = fit_temperature(labels, factor * truth, videos)
        assert t == pytest.approx(factor, rel=0.06)
    before = probability_measures(labels, 1 / (1 + np.exp(-4 * truth)))
    after = probability_measures(labels, 1 / (1 + np.exp(-4 * truth / fit_temperature(labels, 4 * truth, videos))))
    assert after["calibration error"][0] < 0.3 * before["calibration error"][0]


def test_temperature_equals_a_grid_search_of_the_smoothed_loss() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 1], 20)
    videos = np.repeat(["a", "b", "c"], 20)
    logits = rng.normal(0, 1, 60) + 3 * labels - 1
    target = np.where(labels == 1, 3 / 4, 1 / 3)  # two fake videos, one real: (n + 1) / (n + 2) and 1 / (n + 2)
    grid = np.exp(np.linspace(np.log(0.05), np.log(50), 20_001))
    loss = [np.mean(np.logaddexp(0, logits / t) - target * logits / t) for t in grid]
    assert fit_temperature(labels, logits, list(videos)) == pytest.approx(grid[int(np.argmin(loss))], rel=1e-3)


def test_temperature_of_separated_data_claims_no_certainty() -> None:
    labels, logits = np.repeat([0, 1], 50), np.repeat([-8.0, 8.0], 50)
    videos = np.repeat([f"v{i}" for i in range(10)], 10)
    p = 1 / (1 + np.exp(-logits / fit_temperature(labels, logits, list(videos))))
    assert p.max() == pytest.approx(6 / 7, abs=1e-3)  # five videos of a class: (5 + 1) / (5 + 2)
    assert fit_temperature(np.ones(4), np.ones(4), list("abcd")) == 1.0


def test_videos_cut_from_one_recording_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    quality = np.r_[rng.normal(0, 1, 8), rng.normal(1, 1, 8)]  # one number per recording decides all that is cut from it
    labels = np.repeat(np.r_[np.zeros(8), np.ones(8)], 20)
    scores = 1 / (1 + np.exp(-np.repeat(quality, 20) - rng.normal(0, 0.01, 320)))
    cuts, recordings = [f"c{i}" for i in range(320)], list(np.repeat([f"r{i}" for i in range(16)], 20))
    apart = video_bootstrap(cuts, labels, scores, threshold=0.6)
    together = video_bootstrap(cuts, labels, scores, threshold=0.6, groups=recordings)
    assert together["video auc"].value == apart["video auc"].value
    assert together["video auc"].n == 16
    assert apart["video auc"].n == 320
    for name in ("video auc", "video balanced accuracy", "video brier"):
        width = {k: v[name].high - v[name].low for k, v in (("apart", apart), ("together", together))}
        assert width["together"] > 2 * width["apart"], name


def test_the_bootstrap_of_many_frames_goes_in_portions() -> None:
    """The same figures whether the weights fit into one portion or not."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 6000)
    videos = np.repeat([f"v{i}" for i in range(40)], 300)
    scores = rng.random(12_000)
    many = video_bootstrap(list(videos), labels, scores, resamples=1000)["frame auc"]
    few = video_bootstrap(list(videos), labels, scores, resamples=300)["frame auc"]
    assert many.value == few.value
    assert (many.low, many.high) == pytest.approx((few.low, few.high), abs=0.004)
