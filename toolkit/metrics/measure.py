"""What a measure is: a figure of synthetic images or clips beside real ones, with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from toolkit.metrics.detection import Estimate
from toolkit.metrics.features import FeatureSpace, extract


class ClipSet:
    """A set of clips; single images are clips of one frame. Features are computed once and kept.

    A clip is one observation, however many frames it has: intervals come from resampling clips.

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

    @property
    def owners(self) -> np.ndarray:
        """The clip that each of :attr:`frames` belongs to, ``(N,)``."""
        return np.repeat(np.arange(len(self.clips)), self._lengths)

    def features(self, space: FeatureSpace) -> np.ndarray:
        """Features of all frames in ``space``, ``(N, D)`` float64."""
        if space.hash not in self._features:
            self._features[space.hash] = extract(space.network, self.frames)
        return self._features[space.hash]

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
            result._features = {name: value[rows] for name, value in self._features.items()}
        result._per_clip = {name: value[chosen] for name, value in self._per_clip.items()}
        return result


@dataclass(frozen=True)
class Measure:
    """A measure of synthetic images or clips.

    Attributes:
        name: what tables and reports call it.
        function: ``(real, fake) -> float``; NaN for "cannot be judged". With ``in_spaces``: ``(real, fake, space)``.
        better: ``lower``, ``higher``, or ``real`` when the real clips' own figure is the ideal.
        on: whether it wants independent ``images`` or ``clips`` of consecutive frames.
        unit: of the value, for axis labels.
        interval: how its interval is made. ``bootstrap`` over clips; ``halves``: random halves of both sets, for
            measures that a repeated clip would mislead; ``groups``: spread over eight disjoint groups of the fakes, for
            measures too slow to compute many times.
        in_spaces: it compares features, and is reported once for every feature space, ``NAME [SPACE]``.
        space: the feature space with the hash of its network; filled in by :meth:`within`.
        reference: where it comes from.
    """

    name: str
    function: Callable[..., float]
    better: Literal["lower", "higher", "real"] = "lower"
    on: Literal["images", "clips"] = "images"
    unit: str = ""
    interval: Literal["bootstrap", "halves", "groups"] = "bootstrap"
    in_spaces: bool = False
    space: str = ""
    reference: str = ""

    def within(self, space: FeatureSpace) -> Measure:
        """The same measure in one feature space."""
        general = self.function

        def function(real: ClipSet, fake: ClipSet) -> float:
            return general(real, fake, space)

        return dataclasses.replace(self, name=f"{self.name} [{space.name}]", function=function, in_spaces=False, space=str(space))


def estimate(measure: Measure, real: ClipSet, fake: ClipSet, *, resamples: int = 50, seed: int = 0) -> Estimate:
    """``measure`` with an interval: the value plus and minus 1.96 times its standard error over resampled clips.

    The standard error, not the percentiles: a distance is larger between resampled sets, so percentiles would be off.
    Between random halves drawn without replacement the standard deviation estimates that of the whole (Politis & Romano
    1994, with b = n / 2).
    """
    value = float(measure.function(real, fake))
    if not np.isfinite(value) or len(fake) < 8:
        return Estimate(value, float("nan"), float("nan"), len(fake))
    rng = np.random.default_rng(seed)

    def drawn(clips: ClipSet) -> ClipSet:
        whole = len(clips)
        return clips.resample(rng.integers(0, whole, whole) if measure.interval == "bootstrap" else rng.permutation(whole)[: whole // 2])

    if measure.interval == "groups":
        groups = np.array_split(rng.permutation(len(fake)), 8)
        spread = np.array([measure.function(real, fake.resample(group)) for group in groups]) / np.sqrt(len(groups))
    else:
        count = resamples if measure.interval == "bootstrap" else max(2, resamples // 2)
        spread = np.array([measure.function(drawn(real), drawn(fake)) for _ in range(count)])
    spread = spread[np.isfinite(spread)]
    error = float(np.std(spread, ddof=1)) if len(spread) > 1 else float("nan")
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, len(fake))


def figures(measures: Sequence[Measure], images: tuple[ClipSet, ClipSet], clips: tuple[ClipSet, ClipSet]) -> list[dict[str, Any]]:
    """Every measure of ``(real, fake)`` images and clips, as rows ``metric, unit, better, space, value, low, high, n``.

    A measure that fails is reported on standard output and left out: it may come from anyone's plugin, and must not cost
    a training its other results. One whose kind of set is empty is left out.
    """
    rows = []
    for measure in measures:
        real, fake = images if measure.on == "images" else clips
        if not len(real) or not len(fake):
            continue
        try:
            figure = estimate(measure, real, fake)
        except Exception as error:
            print(f"measure {measure.name!r} failed: {type(error).__name__}: {error}")
            continue
        about = {"metric": measure.name, "unit": measure.unit, "better": measure.better, "space": measure.space}
        rows.append({**about, **dataclasses.asdict(figure)})
    return rows
