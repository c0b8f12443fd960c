"""The built-in measures of synthetic images and clips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from toolkit.data.frames import evenly_spaced
from toolkit.hookspecs import hookimpl
from toolkit.metrics import distances, images, video
from toolkit.metrics.features import FeatureSpace
from toolkit.metrics.measure import ClipSet, Measure

MOVES_TOO_LITTLE = 0.1
VARIES_TOO_LITTLE = 0.1
PAIRS = 128
SLICED_IMAGES = 256


def _frechet(real: ClipSet, fake: ClipSet, space: FeatureSpace) -> float:
    return distances.frechet_distance(real.features(space), fake.features(space))


def _kernel(real: ClipSet, fake: ClipSet, space: FeatureSpace) -> float:
    return 1000 * distances.kernel_distance(real.features(space), fake.features(space))


def _manifold(name: str) -> Callable[[ClipSet, ClipSet, FeatureSpace], float]:
    def function(real: ClipSet, fake: ClipSet, space: FeatureSpace) -> float:
        # A ball to the nearest other clip holds as many frames as one to the fifth single image; further away come the clips
        # of other people, of whom there are few, and balls that reach to them hold white noise as well.
        near = [5 if len(clips.frames) == len(clips) else 1 for clips in (real, fake)]
        features = real.features(space), fake.features(space)
        found = distances.manifold_measures(*features, (near[0], near[1]), real_groups=real.owners, fake_groups=fake.owners)
        return found[name]

    return function


def _sliced(real: ClipSet, fake: ClipSet) -> float:
    thin = (s.frames[evenly_spaced(len(s.frames), SLICED_IMAGES)] for s in (real, fake))
    return float(np.mean(list(images.pyramid_distance(*thin).values())))


def _spectrum(real: ClipSet, fake: ClipSet) -> float:
    # A set's spectrum is the mean of its clips', so resampled sets need no new Fourier transforms.
    means = (s.per_clip(images.radial_spectrum).mean(axis=0) for s in (real, fake))
    return images.spectrum_distance(*means)


def _pairs(real: ClipSet, fake: ClipSet) -> float:
    frames, owners = fake.frames, fake.owners
    order = np.random.default_rng(0).permutation(len(frames))[: 2 * PAIRS]
    a, b = order[: len(order) // 2], order[len(order) // 2 : len(order) // 2 * 2]
    apart = owners[a] != owners[b]
    return float(images.ms_ssim(frames[a[apart]], frames[b[apart]]).mean()) if apart.any() else float("nan")


def _spread(clips: ClipSet) -> float:
    """Mean difference between the first frames of neighbouring clips of a shuffled set, in grey levels."""
    first = np.stack([c[0] for c in clips.clips]).astype(np.float32)
    first = first[np.random.default_rng(0).permutation(len(first))]
    return float(np.abs(first - np.roll(first, 1, axis=0)).mean())


def _can_be_judged(real: ClipSet, fake: ClipSet) -> bool:
    """A frozen generator neither flickers nor warps wrongly, and one clip over and over may be a good one: without motion
    and diversity the figures of motion say nothing."""
    moves = np.nanmean(fake.per_clip(video.motion)) >= MOVES_TOO_LITTLE * np.nanmean(real.per_clip(video.motion))
    return bool(moves) and _spread(fake) >= VARIES_TOO_LITTLE * _spread(real)


def _motion(real: ClipSet, fake: ClipSet) -> float:
    return float(np.nanmean(fake.per_clip(video.motion)))


def _flicker(real: ClipSet, fake: ClipSet) -> float:
    if not _can_be_judged(real, fake):
        return float("nan")
    return float(np.nanmean(fake.per_clip(video.flicker)) / np.nanmean(fake.per_clip(video.motion)))


def _flow(clips: ClipSet, place: int) -> np.ndarray:
    values = clips.per_clip(video.flow_figures)[:, place]
    return values[np.isfinite(values)]


def _warping(real: ClipSet, fake: ClipSet) -> float:
    if not _can_be_judged(real, fake):
        return float("nan")
    errors = _flow(fake, 0)
    return float(errors.mean() / np.nanmean(fake.per_clip(video.motion))) if len(errors) else float("nan")


def _speed(real: ClipSet, fake: ClipSet) -> float:
    speeds = _flow(fake, 1)
    return float(speeds.mean()) if len(speeds) else float("nan")


def _speed_distance(real: ClipSet, fake: ClipSet) -> float:
    ours, theirs = _flow(fake, 1), _flow(real, 1)
    return float(stats.wasserstein_distance(ours, theirs)) if len(ours) and len(theirs) else float("nan")


def _smoothness(real: ClipSet, fake: ClipSet) -> float:
    if not _can_be_judged(real, fake):
        return float("nan")
    speeds, accelerations = _flow(fake, 2), _flow(fake, 3)
    return float(accelerations.mean() / speeds.mean()) if len(accelerations) else float("nan")


@hookimpl
def toolkit_metrics() -> list[Measure]:
    """The built-in measures."""
    naeem, kynkaanniemi = (f"{who}, k = 5 between images, 1 between clips" for who in ("Naeem et al. 2020", "Kynkäänniemi et al. 2019"))
    manifold = (
        ("precision", kynkaanniemi),
        ("recall", kynkaanniemi),
        ("density", naeem),
        ("coverage", naeem),
    )
    share = "share of motion"
    return [
        Measure("Fréchet distance", _frechet, in_spaces=True, reference="Heusel et al. 2017; FID only in Inception's features"),
        Measure("kernel distance", _kernel, unit="x 1000", in_spaces=True, reference="Bińkowski et al. 2018"),
        *(
            Measure(name, _manifold(name), better="higher", interval="halves", in_spaces=True, reference=reference)
            for name, reference in manifold
        ),
        Measure("sliced Wasserstein", _sliced, unit="x 1000", interval="groups", reference="Karras et al. 2018"),
        Measure("spectrum distance", _spectrum, unit="dB", reference="Durall et al. 2020"),
        Measure("MS-SSIM of pairs", _pairs, better="real", interval="groups", reference="Odena et al. 2017; Wang et al. 2003"),
        Measure("motion", _motion, better="real", on="clips", unit="grey levels per frame"),
        Measure("flicker", _flicker, better="real", on="clips", unit=share),
        Measure("warping error", _warping, better="real", on="clips", unit=share, reference="Lai et al. 2018"),
        Measure("flow speed", _speed, better="real", on="clips", unit="% of the side per frame"),
        Measure("flow speed distance", _speed_distance, on="clips", unit="% of the side per frame", reference="Wasserstein-1 over clips"),
        Measure("smoothness", _smoothness, better="real", on="clips", unit="flow acceleration / speed"),
    ]
