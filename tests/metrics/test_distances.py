"""Distances and image measures against independent references and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from toolkit import ClipSet
from toolkit.metrics import all_measures, estimate, images
from toolkit.metrics.distances import frechet_distance, frechet_from_moments, kernel_distance, moments
from toolkit.metrics.features import RandomConv, extract, network_hash, random_conv

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


def test_random_features_are_fixed() -> None:
    assert network_hash(random_conv()) == network_hash(RandomConv()) == "86efe6457241"
    features = extract(random_conv(), RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    assert features.shape == (5, 256)
    assert features.dtype == np.float64


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
def ranked(puppets) -> dict[str, tuple[ClipSet, ClipSet]]:  # type: ignore[no-untyped-def]
    """Real clips, and four would-be generators: other real clips, blurred ones, one image over and over, noise."""
    from toolkit.data.frames import load_frames

    clips, _ = load_frames(puppets, 32).clips(12)
    other = clips[1::2]
    blurred = [images_blur(c) for c in other]
    noise = [np.random.default_rng(i).integers(0, 256, c.shape, dtype=np.uint8) for i, c in enumerate(other)]
    collapsed = [other[0] for _ in other]
    frozen = [np.repeat(c[:1], len(c), axis=0) for c in other]
    sets = {"real": other, "blurred": blurred, "noise": noise, "collapsed": collapsed, "frozen": frozen}
    reference = (ClipSet.of_images(np.concatenate(clips[::2])), ClipSet(clips[::2]))
    return {"reference": reference} | {k: (ClipSet.of_images(np.concatenate(v)), ClipSet(v)) for k, v in sets.items()}


def images_blur(clip: np.ndarray) -> np.ndarray:
    import cv2

    return np.stack([cv2.GaussianBlur(frame, (0, 0), 2.0) for frame in clip])


@pytest.mark.parametrize("name", ["Fréchet distance", "kernel distance", "sliced Wasserstein", "spectrum distance"])
def test_image_measures_rank_generators_where_they_belong(ranked, name: str) -> None:  # type: ignore[no-untyped-def]
    measure = next(m for m in all_measures() if m.name == name)
    value = {k: measure.function(ranked["reference"][0], v[0]) for k, v in ranked.items()}
    assert value["real"] < value["blurred"] < value["noise"]
    if name != "spectrum distance":  # one face has much the same spectrum as twenty
        assert value["real"] < value["collapsed"]


def test_motion_measures_are_gated_by_motion(ranked) -> None:  # type: ignore[no-untyped-def]
    by_name = {m.name: m for m in all_measures()}
    real, frozen, noise = (ranked[k][1] for k in ("real", "frozen", "noise"))
    reference = ranked["reference"][1]
    assert by_name["motion"].function(reference, frozen) == 0
    for name in ("flicker", "warping error"):
        assert np.isnan(by_name[name].function(reference, frozen))
        assert by_name[name].function(reference, noise) > by_name[name].function(reference, real)


def test_motion_measures_by_hand() -> None:
    from toolkit.metrics.video import flicker, motion, warping_error

    drift = np.stack([np.full((16, 16, 3), 10 * t, np.uint8) for t in range(6)])
    blink = np.stack([np.full((16, 16, 3), 40 * (t % 2), np.uint8) for t in range(6)])
    assert motion(drift) == pytest.approx(10)
    assert flicker(drift) == pytest.approx(0)
    assert flicker(blink) == pytest.approx(40)
    texture = (128 + 60 * np.sin(np.indices((160, 160)).sum(0) / 9.0) + 40 * np.sin(np.indices((160, 160))[1] / 4.0)).astype(np.uint8)
    moving = np.stack([np.repeat(texture[8:136, 2 * t : 128 + 2 * t, None], 3, axis=2) for t in range(4)])
    assert warping_error(moving) < 0.3 * motion(moving)  # a shift is explained by flow
    assert np.isnan(motion(drift[:1]))


def test_intervals_cover_and_say_when_they_cannot() -> None:
    measure = next(m for m in all_measures() if m.name == "spectrum distance")
    rng = np.random.default_rng(1)
    sets = [ClipSet.of_images(rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    figure = estimate(measure, *sets)
    assert figure.low < figure.value < figure.high
    assert figure.n == 40
    few = estimate(measure, sets[0], ClipSet.of_images(rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)))
    assert np.isnan(few.low)
