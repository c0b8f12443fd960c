"""Measures of images, video and detection. What a study reports is the list of :class:`Measure` from the plugins' hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from toolkit.hookspecs import hookimpl
from toolkit.metrics import distances, features, images, video
from toolkit.metrics.detection import Estimate

MOVES_TOO_LITTLE = 0.1


class ClipSet:
    """A set of clips; single images are clips of one frame. Features are computed once and kept.

    Args:
        clips: arrays ``(T, H, W, 3)`` uint8 RGB, all of one size; lengths may differ.
    """

    def __init__(self, clips: Sequence[np.ndarray]) -> None:
        self.clips = list(clips)
        self._lengths = np.array([len(c) for c in self.clips])
        self._features: dict[str, np.ndarray] = {}
        self._per_clip: dict[str, np.ndarray] = {}

    @classmethod
    def of_images(cls, array: np.ndarray) -> ClipSet:
        """``(N, H, W, 3)`` independent images as N clips of one frame."""
        return cls([array[i : i + 1] for i in range(len(array))])

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def frames(self) -> np.ndarray:
        """All frames, ``(N, H, W, 3)`` uint8."""
        return np.concatenate(self.clips)

    def features(self, network: object = None) -> np.ndarray:
        """Features of all frames, ``(N, D)``, in the space of ``network`` (the fixed random one by default)."""
        chosen = network or features.random_conv()
        name = f"{getattr(chosen, 'name', type(chosen).__name__)}-{id(chosen)}"
        if name not in self._features:
            self._features[name] = features.extract(chosen, self.frames)  # type: ignore[arg-type]
        return self._features[name]

    def per_clip(self, measure: Callable[[np.ndarray], float | np.ndarray]) -> np.ndarray:
        """``measure`` of every clip, computed once: ``(clips,)``, or ``(clips, ...)`` for one that gives an array."""
        if measure.__name__ not in self._per_clip:
            self._per_clip[measure.__name__] = np.array([measure(clip) for clip in self.clips])
        return self._per_clip[measure.__name__]

    def resample(self, chosen: np.ndarray) -> ClipSet:
        """The set with the clips ``chosen`` (indices, repeats allowed); what was computed comes along."""
        result = ClipSet([self.clips[i] for i in chosen])
        ends = np.cumsum(self._lengths)
        if self._features:
            rows = np.concatenate([np.arange(ends[i] - self._lengths[i], ends[i]) for i in chosen])
            old = {name: value[rows] for name, value in self._features.items()}
            result._features = old
        result._per_clip = {name: value[chosen] for name, value in self._per_clip.items()}
        return result


@dataclass(frozen=True)
class Measure:
    """A measure of synthetic images or clips.

    Attributes:
        name: what tables and reports call it.
        function: ``(real, fake) -> float``; NaN for "cannot be judged".
        better: ``lower``, ``higher``, or ``real`` when the real clips' own figure is the ideal.
        on: whether it wants independent ``images`` or ``clips`` of consecutive frames.
        unit: of the value, for axis labels.
        interval: how its interval is made: ``bootstrap`` over clips, or ``groups``: spread over eight disjoint groups
            of the fakes, for measures too slow to compute a hundred times.
        space: the feature space, with the hash of its network, where there is one.
        reference: where it comes from.
    """

    name: str
    function: Callable[[ClipSet, ClipSet], float]
    better: Literal["lower", "higher", "real"] = "lower"
    on: Literal["images", "clips"] = "images"
    unit: str = ""
    interval: Literal["bootstrap", "groups"] = "bootstrap"
    space: str = ""
    reference: str = ""


def estimate(measure: Measure, real: ClipSet, fake: ClipSet, *, resamples: int = 50, seed: int = 0) -> Estimate:
    """``measure`` with an interval: the value plus and minus 1.96 times its standard error over resampled clips.

    The standard error, not the percentiles: a distance is larger between resampled sets, so percentiles would be off.
    """
    value = float(measure.function(real, fake))
    if not np.isfinite(value) or len(fake) < 8:
        return Estimate(value, float("nan"), float("nan"), len(fake))
    rng = np.random.default_rng(seed)
    if measure.interval == "groups":
        groups = np.array_split(rng.permutation(len(fake)), 8)
        spread = np.array([measure.function(real, fake.resample(group)) for group in groups]) / np.sqrt(len(groups))
    else:
        spread = np.array(
            [
                measure.function(real.resample(rng.integers(0, len(real), len(real))), fake.resample(rng.integers(0, len(fake), len(fake))))
                for _ in range(resamples)
            ]
        )
    error = float(np.nanstd(spread, ddof=1))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, len(fake))


def _frechet(real: ClipSet, fake: ClipSet) -> float:
    return distances.frechet_distance(real.features(), fake.features())


def _kernel(real: ClipSet, fake: ClipSet) -> float:
    return 1000 * distances.kernel_distance(real.features(), fake.features())


def _sliced(real: ClipSet, fake: ClipSet) -> float:
    return float(np.mean(list(images.pyramid_distance(_thin(real.frames), _thin(fake.frames)).values())))


def _thin(frames: np.ndarray, limit: int = 256) -> np.ndarray:
    return frames if len(frames) <= limit else frames[np.linspace(0, len(frames) - 1, limit).round().astype(int)]


def _spectrum(real: ClipSet, fake: ClipSet) -> float:
    # A set's spectrum is the mean of its clips', so resampled sets need no new Fourier transforms.
    means = (s.per_clip(images.radial_spectrum).mean(axis=0) for s in (real, fake))
    return images.spectrum_distance(*means)


def _moves(real: ClipSet, fake: ClipSet) -> bool:
    """A frozen generator neither flickers nor warps wrongly: without motion those figures say nothing."""
    own, given = np.nanmean(fake.per_clip(video.motion)), np.nanmean(real.per_clip(video.motion))
    return bool(own >= MOVES_TOO_LITTLE * given)


def _motion(real: ClipSet, fake: ClipSet) -> float:
    return float(np.nanmean(fake.per_clip(video.motion)))


def _flicker(real: ClipSet, fake: ClipSet) -> float:
    if not _moves(real, fake):
        return float("nan")
    return float(np.nanmean(fake.per_clip(video.flicker)) / np.nanmean(fake.per_clip(video.motion)))


def _warping(real: ClipSet, fake: ClipSet) -> float:
    if not _moves(real, fake):
        return float("nan")
    return float(np.nanmean(fake.per_clip(video.warping_error)) / np.nanmean(fake.per_clip(video.motion)))


@hookimpl
def toolkit_metrics() -> list[Measure]:
    """The built-in measures."""
    network = features.random_conv()
    space = f"{network.name} {features.network_hash(network)}"
    return [
        Measure("Fréchet distance", _frechet, space=space, reference="Heusel et al. 2017, in random features: not FID"),
        Measure(
            "kernel distance",
            _kernel,
            unit="x 1000",
            space=space,
            reference="Bińkowski et al. 2018, in random features: not KID",
        ),
        Measure("sliced Wasserstein", _sliced, unit="x 1000", interval="groups", reference="Karras et al. 2018"),
        Measure("spectrum distance", _spectrum, unit="dB", reference="Durall et al. 2020"),
        Measure("motion", _motion, better="real", on="clips", unit="grey levels per frame"),
        Measure("flicker", _flicker, better="real", on="clips", unit="share of motion"),
        Measure("warping error", _warping, better="real", on="clips", unit="share of motion", reference="Lai et al. 2018"),
    ]


def all_measures() -> list[Measure]:
    """The measures of all plugins; of two with one name the first is kept."""
    from toolkit.plugins import plugins

    loaded = plugins()
    found: dict[str, Measure] = {}
    for plugin, measures in loaded.results("toolkit_metrics"):
        if not isinstance(measures, list) or not all(isinstance(m, Measure) for m in measures):
            loaded.mark_broken(plugin, "toolkit_metrics() must return a list of Measure")
            continue
        for measure in measures:
            found.setdefault(measure.name, measure)
        if plugin in loaded.infos:
            loaded.infos[plugin].provides["toolkit_metrics"] = [m.name for m in measures]
    return list(found.values())


def image_measures() -> list[Measure]:
    """The measures that compare independent images."""
    return [m for m in all_measures() if m.on == "images"]
