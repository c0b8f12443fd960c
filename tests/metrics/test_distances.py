"""Distances and image measures against independent references and closed forms."""

from __future__ import annotations

import contextlib
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from toolkit import ClipSet, UserError
from toolkit.metrics import all_measures, estimate, images
from toolkit.metrics.distances import frechet_distance, frechet_from_moments, kernel_distance, manifold_measures, moments
from toolkit.metrics.features import (
    DenoisingAutoencoder,
    RandomConv,
    extract,
    feature_space,
    network_hash,
    random_space,
    save_features,
    train_features,
)
from toolkit.metrics.measure import Measure, figures

RNG = np.random.default_rng(0)


def test_frechet_equals_torchmetrics_scipy_and_the_closed_form() -> None:
    a, b = RNG.normal(size=(400, 12)), RNG.normal(0.3, 1.4, size=(300, 12)) @ RNG.normal(size=(12, 12))
    ours = frechet_distance(a, b)
    (ma, ca), (mb, cb) = moments(a), moments(b)
    theirs = _compute_fid(*(torch.from_numpy(v) for v in (ma, ca, mb, cb)))
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    by_scipy = ((ma - mb) ** 2).sum() + np.trace(ca + cb - 2 * np.real(linalg.sqrtm(ca @ cb)))
    assert ours == pytest.approx(by_scipy, rel=1e-6)
    # Axis-parallel Gaussians: sum of (m1 - m2)^2 + (s1 - s2)^2.
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([0.3, 2.5, 0.5])
    assert frechet_from_moments(np.zeros(3), np.diag(s1**2), np.ones(3), np.diag(s2**2)) == pytest.approx(
        3 + ((s1 - s2) ** 2).sum(), rel=1e-12
    )


def test_frechet_with_fewer_samples_than_dimensions_and_of_equal_sets() -> None:
    a = RNG.normal(size=(10, 40))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(frechet_distance(a, RNG.normal(size=(7, 40))))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(a[:1], a)


def test_kernel_distance_equals_torchmetrics() -> None:
    a, b = RNG.normal(size=(60, 8)), RNG.normal(0.5, 1, size=(60, 8))
    theirs = poly_mmd(torch.from_numpy(a), torch.from_numpy(b), degree=3, gamma=None, coef=1.0)
    assert kernel_distance(a, b) == pytest.approx(float(theirs), rel=1e-6)
    halves = [kernel_distance(RNG.normal(size=(50, 8)), RNG.normal(size=(50, 8))) for _ in range(40)]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / np.sqrt(40)  # unbiased: 0 for equal distributions


def manifold_by_scikit_learn(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """The published definitions once more, with another library's neighbours."""
    radius = {}
    for name, x in (("real", real), ("fake", fake)):
        radius[name] = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]
    between = pairwise_distances(real, fake)
    inside = between < radius["real"][:, None]
    return {
        "precision": float(np.mean([inside[:, j].any() for j in range(len(fake))])),
        "recall": float(np.mean([(between[i] < radius["fake"]).any() for i in range(len(real))])),
        "density": float(inside.sum() / (k * len(fake))),
        "coverage": float(np.mean([inside[i].any() for i in range(len(real))])),
    }


@pytest.mark.parametrize("k", [3, 5])
def test_manifold_measures_equal_scikit_learn_and_torch_fidelity(k: int) -> None:
    real, fake = RNG.normal(size=(120, 6)), RNG.normal(0.6, 0.8, size=(90, 6))
    ours = manifold_measures(real, fake, k)
    assert ours == pytest.approx(manifold_by_scikit_learn(real, fake, k), rel=1e-6)
    assert 0.1 < ours["precision"] < 1
    assert 0.1 < ours["recall"] < 1
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = fidelity.prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=k, prc_batch_size=1000)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


def test_manifold_measures_by_hand() -> None:
    # On a line, one neighbour: real balls of radius 1 around 0 and 1, of radius 9 around 10; fakes at 0.5, 0.6 and 30.
    real, fake = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [0.6], [30.0]])
    found = manifold_measures(real, fake, 1)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["density"] == pytest.approx((2 + 2 + 0) / 3)  # 10 - 0.5 and 10 - 0.6 are beyond 9
    assert found["coverage"] == pytest.approx(2 / 3)
    # Fake balls: 0.1 around 0.5 and 0.6 hold nobody, 29.4 around 30 holds 1 and 10.
    assert found["recall"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="3 neighbours need more"):
        manifold_measures(real, fake, 3)


def test_frames_of_one_clip_are_no_neighbours() -> None:
    """Clips of near-copies: ungrouped, every ball holds the next frame and nothing else."""
    centres = RNG.normal(size=(40, 4))
    real = np.repeat(centres, 10, axis=0) + RNG.normal(0, 1e-3, (400, 4))
    clip = np.repeat(np.arange(40), 10)
    fake = RNG.normal(size=(200, 4))
    alone = manifold_measures(centres, fake)
    assert manifold_measures(real, fake)["precision"] < 0.05
    grouped = manifold_measures(real, fake, real_groups=clip)
    for name in ("precision", "density", "coverage"):
        assert grouped[name] == pytest.approx(alone[name], abs=0.03)
    each = manifold_measures(centres, fake, real_groups=np.arange(40), fake_groups=np.arange(200))
    assert each == pytest.approx(alone)


def test_random_features_are_fixed() -> None:
    assert random_space().hash == network_hash(RandomConv()) == "86efe6457241"
    features = extract(random_space().network, RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    assert features.shape == (5, 256)
    assert features.dtype == np.float64


def test_trained_features_learn_the_data_and_are_reproducible(puppets, tmp_path: Path) -> None:
    from toolkit.data.frames import load_frames, to_float

    frames = load_frames(puppets, 32).array()
    network = train_features(frames, steps=150)
    assert network_hash(network) == network_hash(train_features(frames, steps=150))
    assert network_hash(network) != network_hash(train_features(frames, steps=150, seed=1))
    batch = to_float(torch.from_numpy(frames))
    plain = ((batch - batch.mean(dim=0)) ** 2).mean()
    with torch.no_grad():
        assert float(((network.reconstruct(batch) - batch) ** 2).mean()) < 0.5 * float(plain)
    found = extract(network, frames)
    assert found.shape == (len(frames), 80)
    assert found.mean(axis=0) == pytest.approx(0, abs=1e-3)
    assert found.std(axis=0) == pytest.approx(1, abs=1e-2)
    noise = extract(network, np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8))
    assert noise[:, 64:].min() > 3  # white noise lies off the manifold everywhere
    save_features(network, tmp_path / "f.pt")
    loaded = feature_space("trained", tmp_path / "f.pt")
    assert loaded.hash == network_hash(network)
    assert DenoisingAutoencoder()(batch[:2, :, :16, :16]).shape == (2, 80)


def test_timm_features_come_from_a_file_only(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    space = feature_space(f"test_resnet@{tmp_path / 'w.pth'}")
    assert space.name == "test_resnet"
    images = RNG.integers(0, 256, (3, 160, 160, 3), dtype=np.uint8)
    config = model.pretrained_cfg
    assert config["input_size"][-1] == 160  # so nothing is resized here
    mean, std = (np.array(config[k]) for k in ("mean", "std"))
    expected = model(torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2)).float()).detach()
    np.testing.assert_allclose(extract(space.network, images), expected.numpy(), rtol=1e-3, atol=1e-4)
    for text, message in (
        ("resnet18", "unknown feature space"),
        (f"resnet18@{tmp_path / 'none.pth'}", "are not there"),
        (f"resnet18@{tmp_path / 'w.pth'}", "cannot be loaded|lacks"),
        (f"nonsense@{tmp_path / 'w.pth'}", "timm has no model"),
        ("trained", "is not there"),
    ):
        with pytest.raises(UserError, match=message):
            feature_space(text)


@pytest.mark.slow
def test_inception_features_equal_torch_fidelity(tmp_path: Path) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity (extra: fid)")
    theirs = fidelity.FeatureExtractorInceptionV3.__new__(fidelity.FeatureExtractorInceptionV3)
    # The published weights are not at hand: the network is made without them and gets random ones.
    with unittest.mock.patch.object(fidelity.torch, "load", side_effect=RuntimeError("stop")), contextlib.suppress(RuntimeError):
        theirs.__init__("inception", ["2048"], feature_extractor_weights_path="none")
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0, 0.05)
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    space = feature_space(f"inception@{tmp_path / 'inception.pth'}")
    images = RNG.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    expected = theirs.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
    assert expected.shape == (3, 2048)
    assert float(expected.detach().std()) > 0
    np.testing.assert_allclose(extract(space.network, images), expected.detach().numpy(), rtol=1e-6)
    (tmp_path / "text.pth").write_text("x")
    with pytest.raises(UserError, match="does not hold the weights"):
        feature_space(f"inception@{tmp_path / 'text.pth'}")


@pytest.mark.parametrize(("side", "scales"), [(32, 2), (64, 3), (128, 4), (176, 5)])
def test_ms_ssim_equals_torchmetrics_and_an_own_computation(side: int, scales: int) -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference

    rng = np.random.default_rng(side)
    base = np.repeat(np.repeat(rng.integers(0, 256, (3, side // 8, side // 8, 3), dtype=np.uint8), 8, axis=1), 8, axis=2)
    a = np.clip(base + rng.normal(0, 10, base.shape), 0, 255).astype(np.uint8)
    b = np.clip(base + rng.normal(0, 25, base.shape), 0, 255).astype(np.uint8)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    weights = weights * 1.0001 / weights.sum()
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).double() / 255 for v in (a, b))
    theirs = [float(reference(x[i : i + 1], y[i : i + 1], data_range=1.0, betas=tuple(weights), normalize="relu")) for i in range(3)]
    assert images.ms_ssim(a, b) == pytest.approx(theirs, rel=1e-6)
    assert images.ms_ssim(a, a) == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match="at least 11"):
        images.ms_ssim(a[:, :8, :8], a[:, :8, :8])


def test_ms_ssim_of_one_scale_equals_the_formula() -> None:
    """One scale, written out: Gaussian window of 11 px and sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, eq. 13)."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for c in range(3):
        p, q = (np.pad(v[0, ..., c] / 255.0, 5, mode="reflect") for v in (a, b))  # the border is reflected
        p, q = (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) for v in (p, q))
        mean_p, mean_q = ((v * window).sum((-1, -2)) for v in (p, q))
        var_p, var_q = (((v**2) * window).sum((-1, -2)) - m**2 for v, m in ((p, mean_p), (q, mean_q)))
        both = (p * q * window).sum((-1, -2)) - mean_p * mean_q
        c1, c2 = 0.01**2, 0.03**2
        values.append((2 * mean_p * mean_q + c1) * (2 * both + c2) / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    assert images.ms_ssim(a, b)[0] == pytest.approx(np.mean(values) ** 1.0001, rel=1e-6)


def test_sliced_wasserstein_equals_scipy_in_one_dimension_and_a_known_shift() -> None:
    a, b = RNG.normal(size=500), RNG.normal(1, 2, size=500)
    one = torch.ones(1, 1, dtype=torch.float64)
    ours = images.sliced_wasserstein(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, None], one)
    assert ours == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-9)
    points = torch.randn(200, 5, dtype=torch.float64)
    axes = torch.eye(5, dtype=torch.float64)
    shift = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    assert images.sliced_wasserstein(points, points + shift, axes) == pytest.approx(0.2, rel=1e-9)


def test_laplacian_pyramid_adds_up_to_the_image() -> None:
    x = torch.rand(2, 3, 64, 64)
    levels = images.laplacian_pyramid(x)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    rebuilt = levels[-1]
    for level in levels[-2::-1]:
        rebuilt = level + images._pyramid_up(rebuilt)
    torch.testing.assert_close(rebuilt, x)
    flat = images.laplacian_pyramid(torch.full((1, 3, 32, 32), 0.7))
    assert float(flat[0][..., 4:-4, 4:-4].abs().max()) < 1e-6  # a constant has no detail


def test_patches_are_cut_from_the_image() -> None:
    level = torch.arange(2 * 3 * 9 * 9, dtype=torch.float32).reshape(2, 3, 9, 9)
    cut = images.patches(level, 4, torch.Generator().manual_seed(0)).reshape(8, 3, 7, 7)
    for place, patch in enumerate(cut):
        image = level[place // 4]
        assert any(torch.equal(patch, image[:, y : y + 7, x : x + 7]) for y in range(3) for x in range(3))


def test_spectrum_of_a_pure_wave_sits_at_its_frequency() -> None:
    x = np.arange(32)
    wave = 127.5 + 100 * np.cos(2 * np.pi * 5 * x / 32)
    image = np.repeat(np.repeat(wave[None, None, :, None], 32, axis=1), 3, axis=3).round().astype(np.uint8)
    spectrum = images.radial_spectrum(image)
    assert spectrum.shape == (17,)
    assert spectrum[1:].argmax() + 1 == 5
    # Parseval: all power of the grey image, corners of the spectrum beyond S/2 excepted, which are empty here.
    grey = image[0].astype(float) @ np.array([0.299, 0.587, 0.114]) / 255
    counts = np.bincount(np.hypot(*(np.indices((32, 32)) - 16)).round().astype(int).ravel())[:17]
    assert (spectrum * counts).sum() == pytest.approx((grey**2).sum(), rel=1e-3)


def test_spectrum_distance_of_a_scaled_image() -> None:
    base = RNG.integers(0, 120, (8, 32, 32, 3), dtype=np.uint8)
    spectrum = images.radial_spectrum
    assert images.spectrum_distance(spectrum(base), spectrum(base)) == 0
    assert images.spectrum_distance(spectrum(base), spectrum(2 * base)) == pytest.approx(20 * np.log10(2), rel=1e-6)


@pytest.fixture(scope="module")
def ranked(puppets) -> dict[str, tuple[ClipSet, ClipSet]]:
    """Real clips, and five would-be generators: other real clips, blurred ones, one clip over and over, stills, noise."""
    from toolkit.data.frames import load_frames

    clips, _ = load_frames(puppets, 32).clips(6)  # four of each person, so that the nearest other clip may be of the same
    other = clips[1::2]
    blurred = [images_blur(c) for c in other]
    noise = [np.random.default_rng(i).integers(0, 256, c.shape, dtype=np.uint8) for i, c in enumerate(other)]
    collapsed = [other[0] for _ in other]
    frozen = [np.repeat(c[:1], len(c), axis=0) for c in other]
    sets = {"real": other, "blurred": blurred, "noise": noise, "collapsed": collapsed, "frozen": frozen}
    return {"reference": (ClipSet(clips[::2]), ClipSet(clips[::2]))} | {k: (ClipSet(v), ClipSet(v)) for k, v in sets.items()}


def images_blur(clip: np.ndarray) -> np.ndarray:
    import cv2

    return np.stack([cv2.GaussianBlur(frame, (0, 0), 2.0) for frame in clip])


@pytest.fixture(scope="module")
def values(puppets, ranked) -> dict[str, dict[str, float]]:
    """Measure -> would-be generator -> its figure, in the random space and in one trained on the puppets."""
    from toolkit.data.frames import load_frames
    from toolkit.metrics.features import FeatureSpace

    trained = FeatureSpace("trained", train_features(load_frames(puppets, 32).array(), steps=300))
    found: dict[str, dict[str, float]] = {}
    for measure in all_measures([random_space(), trained]):
        place = 0 if measure.on == "images" else 1
        found[measure.name] = {k: measure.function(ranked["reference"][place], v[place]) for k, v in ranked.items() if k != "reference"}
    return found


SPACES = ("random", "trained")


@pytest.mark.parametrize(
    "name", [*(f"{m} [{s}]" for m in ("Fréchet distance", "kernel distance") for s in SPACES), "sliced Wasserstein", "spectrum distance"]
)
def test_distances_rank_generators_where_they_belong(values, name: str) -> None:
    value = values[name]
    assert value["real"] < value["blurred"] < value["noise"]
    if name != "spectrum distance":  # one face has much the same spectrum as twenty
        assert value["real"] < value["collapsed"]


@pytest.mark.parametrize("space", SPACES)
def test_manifold_measures_rank_generators_where_they_belong(values, space: str) -> None:
    for name in ("precision", "density"):
        value = values[f"{name} [{space}]"]
        assert value["noise"] <= 0.1 * value["real"]
        assert value["real"] >= 0.5
    for name in ("recall", "coverage"):
        value = values[f"{name} [{space}]"]
        # Variety: one clip over and over covers little of what the real clips cover.
        assert value["collapsed"] < 0.5 * value["real"]


def test_coverage_drops_for_noise(values) -> None:
    for space in SPACES:
        assert values[f"coverage [{space}]"]["noise"] < 0.2 * values[f"coverage [{space}]"]["real"]


def test_likeness_of_pairs_shows_a_collapse(values) -> None:
    value = values["MS-SSIM of pairs"]
    assert value["noise"] < value["real"] < 0.95
    assert value["collapsed"] > 1.2 * value["real"]


def test_measures_of_motion_are_gated_by_motion_and_diversity(values) -> None:
    """A frozen generator neither flickers nor warps wrongly, and a collapsed one may repeat a good clip: both cannot be judged."""
    assert values["motion"]["frozen"] == 0
    for name in ("flicker", "warping error", "smoothness"):
        value = values[name]
        assert np.isnan(value["frozen"])
        assert np.isnan(value["collapsed"])
        assert np.isfinite(value["real"])
        assert value["noise"] > value["real"]
    assert values["flow speed"]["frozen"] == pytest.approx(0, abs=1e-6)
    for other in ("frozen", "noise"):
        assert values["flow speed distance"]["real"] < values["flow speed distance"][other]


def test_motion_measures_by_hand() -> None:
    from toolkit.metrics.video import flicker, flow_figures, motion

    drift = np.stack([np.full((16, 16, 3), 10 * t, np.uint8) for t in range(6)])
    blink = np.stack([np.full((16, 16, 3), 40 * (t % 2), np.uint8) for t in range(6)])
    assert motion(drift) == pytest.approx(10)
    assert flicker(drift) == pytest.approx(0)
    assert flicker(blink) == pytest.approx(40)
    moving = shifted([0, 2, 4, 6])
    assert flow_figures(moving)[0] < 0.3 * motion(moving)  # a shift is explained by flow
    assert np.isnan(motion(drift[:1]))
    assert np.isnan(flow_figures(drift[:1])).all()


def shifted(offsets: list[int]) -> np.ndarray:
    """A texture of 128 px seen through a window that stands ``offsets`` pixels to the right."""
    y, x = np.indices((160, 160))
    texture = (128 + 60 * np.sin((x + y) / 9.0) + 40 * np.sin(x / 4.0) + 25 * np.sin(y / 5.0)).astype(np.uint8)
    return np.stack([np.repeat(texture[8:136, o : 128 + o, None], 3, axis=2) for o in offsets])


def test_flow_figures_of_known_motion() -> None:
    """Two pixels of 128 per frame are 1.5625 % of the side; an even motion has no acceleration, a halting one has."""
    from toolkit.metrics.video import flow_figures

    _, speed, _, acceleration = flow_figures(shifted([0, 2, 4, 6, 8]))
    assert speed == pytest.approx(100 * 2 / 128, rel=0.05)
    assert acceleration < 0.05 * speed
    _, speed, _, acceleration = flow_figures(shifted([0, 4, 4, 8, 8]))
    assert speed == pytest.approx(100 * 2 / 128, rel=0.08)
    assert acceleration == pytest.approx(100 * 4 / 128, rel=0.1)  # from 4 pixels to 0 and back


def test_intervals_cover_and_say_when_they_cannot() -> None:
    measure = next(m for m in all_measures() if m.name == "spectrum distance")
    rng = np.random.default_rng(1)
    sets = [ClipSet.of_images(rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    figure = estimate(measure, *sets)
    assert figure.low < figure.value < figure.high
    assert figure.n == 40
    few = estimate(measure, sets[0], ClipSet.of_images(rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)))
    assert np.isnan(few.low)


@pytest.mark.parametrize("interval", ["bootstrap", "halves", "groups"])
def test_intervals_have_the_width_that_theory_gives(interval: str) -> None:
    """The mean of N(0, 1) over 64 clips has a standard error of 1/8, known here in closed form."""
    rng = np.random.default_rng(0)
    widths = []
    for seed in range(20):
        clips = ClipSet.of_images(np.zeros((64, 1, 1, 3), np.uint8))
        clips._per_clip["x"] = rng.normal(size=64)
        measure = Measure("mean", lambda real, fake: float(fake._per_clip["x"].mean()), interval=interval)
        e = estimate(measure, clips, clips, seed=seed)
        widths.append((e.high - e.low) / 2 / 1.96)
    assert np.mean(widths) == pytest.approx(1 / 8, rel=0.15)


def test_a_failing_measure_costs_only_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(real: ClipSet, fake: ClipSet) -> float:
        raise KeyError("nothing here")

    clips = ClipSet.of_images(np.zeros((10, 16, 16, 3), np.uint8))
    good = next(m for m in all_measures() if m.name == "spectrum distance")
    rows = figures([Measure("broken", broken), good], (clips, clips), (ClipSet([]), ClipSet([])))
    assert [row["metric"] for row in rows] == ["spectrum distance"]
    assert "measure 'broken' failed: KeyError" in capsys.readouterr().out
