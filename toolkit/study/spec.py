"""What a study is: its YAML file, checked, and the grid of cells that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import toolkit
from toolkit.activations.registry import registry
from toolkit.activations.spec import ActivationSpec
from toolkit.data.manifest import Manifest
from toolkit.errors import UserError, closest
from toolkit.files import file_hash
from toolkit.gan.data import open_manifest
from toolkit.metrics.features import SPACES, FeatureSpace, feature_space
from toolkit.plugins import plugins, use_files

REAL = "real"
STRANGERS = "real, other people"
CONTROL = "control"


@dataclass(frozen=True)
class GANOptions:
    """Training of every generator of the grid: options of :class:`toolkit.gan.module.GAN`, and the budget."""

    max_steps: int = 1500
    batch_size: int = 64
    precision: str = "32-true"
    validations: int = 5
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectorOptions:
    """Training of every detector: options of :class:`toolkit.detector.module.Detector`, and the budget."""

    max_steps: int = 300
    batch_size: int = 64
    precision: str = "32-true"
    validations: int = 6
    model: dict[str, Any] = field(default_factory=dict)
    augmentations: dict[str, float] = field(default_factory=lambda: {"flip": 0.5})


@dataclass(frozen=True)
class ClipOptions:
    """What every generator renders: ``count`` clips of ``frames`` frames, each the beginning of a looping walk of
    ``period`` frames past ``keyframes`` latents, and ``images`` independent images. 60 % of the clips train detectors, 20 %
    validate, 20 % test. With the default speed, frames of 32 px change about as much as those of people talking."""

    count: int = 100
    frames: int = 16
    keyframes: int = 3
    period: int = 60
    images: int = 1024


@dataclass(frozen=True)
class StudySpec:
    """A study, as its YAML file says.

    Attributes:
        name: of its folder.
        question: what it asks; the report opens with it.
        generators: label -> rules of the generator's sites.
        data: a manifest, or ``puppets``.
        image_size: in pixels.
        seeds: of the trainings; the same for every generator.
        upsampling: crossed with the generators.
        discriminator: rules of the discriminator's sites, for all.
        gan_share: share of the training identities that train the GANs; the rest train the detectors.
        gan, detector, clips: see their classes.
        features: feature spaces that the distances are measured in, the main one first: random, trained (on the real
            training frames at hand), inception@WEIGHTS or MODEL@WEIGHTS (a timm model).
        control: also train detectors on real against real, which must stay at chance.
        robustness: also test every detector on test frames that were compressed, blurred, resized or noisy.
        audit: also look for what could tell real from fake without a look at the face.
        prefer: providers to take bare activation names from.
        plugins: one-file plugins; paths start from the file's folder.
    """

    name: str
    question: str
    generators: dict[str, dict[str, Any]]
    data: str = "puppets"
    image_size: int = 32
    seeds: tuple[int, ...] = (0, 1)
    upsampling: tuple[str, ...] = ("transposed",)
    discriminator: dict[str, Any] = field(default_factory=dict)
    gan_share: float = 0.6
    gan: GANOptions = field(default_factory=GANOptions)
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    clips: ClipOptions = field(default_factory=ClipOptions)
    features: tuple[str, ...] = ("random", "trained")
    control: bool = True
    robustness: bool = True
    audit: bool = True
    prefer: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> StudySpec:
        """Read a spec.

        Args:
            path: the YAML file.
            overrides: values that win over the file's, e.g. ``data``.

        Raises:
            UserError: it is not there, not YAML, has an unknown key or a wrong type, or contradicts itself.
        """
        try:
            value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"study {path} is not there; configs/studies/ has some") from error
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"study {path} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from error
        if not isinstance(value, dict):
            raise UserError(f"study {path} is not a mapping of options")
        spec = _build(cls, {**value, **{k: v for k, v in overrides.items() if v is not None}}, str(path))
        spec = dataclasses.replace(spec, plugins=tuple(str(p) for p in use_files(spec.plugins, Path(path).parent)))
        spec.check(path)
        return spec

    def check(self, path: Path | str = "study") -> None:
        """Raise :class:`UserError` unless the values make sense together."""
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise UserError(f"{path}: name {self.name!r} must be letters, digits, - and _: it names a folder")
        for what in ("generators", "seeds", "upsampling", "features"):
            if not getattr(self, what):
                raise UserError(f"{path}: {what} is empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"{path}: seeds has a seed twice")
        if not 0 < self.gan_share < 1:
            raise UserError(f"{path}: gan_share is between 0 and 1, not {self.gan_share}")
        if reserved := {REAL, STRANGERS, CONTROL} & set(self.generators):
            raise UserError(f"{path}: a generator cannot be called {reserved.pop()!r}")
        for kind in self.upsampling:
            if kind not in ("transposed", "nearest", "bilinear", "zero"):
                raise UserError(f"{path}: upsampling {kind!r} is not one of transposed, nearest, bilinear, zero")
        least = {
            "gan.max_steps": self.gan.max_steps,
            "detector.max_steps": self.detector.max_steps,
            "clips.images": self.clips.images,
            "gan.validations": self.gan.validations,
            "detector.validations": self.detector.validations,
        }
        for name, value in least.items():
            if value < 1:
                raise UserError(f"{path}: {name} must be at least 1, not {value}")
        if self.clips.count < 10 or self.clips.frames < 3 or self.clips.keyframes < 2:
            raise UserError(f"{path}: clips needs a count of at least 10, frames of at least 3 and keyframes of at least 2")
        for text in self.features:
            name, _, file = text.partition("@")
            if not file and text not in ("random", "trained"):
                raise UserError(f"{path}: unknown feature space {text!r}; known: {SPACES}")
            if file and not Path(file).expanduser().is_file():
                raise UserError(f"{path}: the weights {file} of the feature space {name} are not there; nothing is fetched")
        names = [text.partition("@")[0] for text in self.features]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: features has a name twice")
        if self.clips.period < self.clips.frames:
            raise UserError(f"{path}: clips.period, the frames of a whole loop, must not be less than clips.frames")
        self.networks()

    def networks(self) -> dict[str, dict[str, Any]]:
        """Label -> resolved options of the GAN: every rule in canonical form with its provider, upsampling included.

        Raises:
            UserError: a rule or an option is wrong.
        """
        points: dict[str, dict[str, Any]] = {}
        for label, rules in self.generators.items():
            for kind in self.upsampling:
                name = label if len(self.upsampling) == 1 else f"{label}, {kind}"
                options = {
                    **self.gan.model,
                    "image_size": self.image_size,
                    "upsampling": kind,
                    "prefer": list(self.prefer),
                    "activations": {"generator": self._canonical(rules), "discriminator": self._canonical(self.discriminator)},
                }
                points[name] = options
        return points

    def _canonical(self, rules: Mapping[str, Any]) -> dict[str, str]:
        result = {}
        for pattern, value in rules.items():
            spec = ActivationSpec.parse(value)
            provider, activation = registry().find(spec, self.prefer)
            activation.configure(spec)
            result[str(pattern)] = str(dataclasses.replace(spec, name=activation.name, provider=provider))
        return result


def _build(kind: Any, value: Any, where: str) -> Any:
    """Make a dataclass from a mapping, strictly: unknown keys and wrong types are errors that name the key."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping of options, not {value!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; the keys are {', '.join(sorted(known))}.{closest(str(key), known)}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in value]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing")
    return kind(**{key: _convert(hints[key], entry, f"{where}: {key}") for key, entry in value.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is a list, not {value!r}")
        return tuple(_convert(typing.get_args(kind)[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is a mapping, not {value!r}")
        return {str(key): _convert(typing.get_args(kind)[1], item, f"{where}: {key}") for key, item in value.items()}
    if kind is Any or isinstance(kind, types.UnionType):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value


def _foreign(model: dict[str, Any]) -> dict[str, Any]:
    """Fingerprints of the plugins, other than the toolkit's own, whose activations a network's options name."""
    rules = [value for network in (model.get("activations") or {}).values() for value in network.values()]
    origins = [registry().origins(value, model.get("prefer") or ()) for value in rules]
    found = plugins().fingerprints(set().union(*origins))
    return {"plugins": found} if found else {}


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        kind: ``features`` (a network trained on the data at hand), ``real`` (the real-against-real floor), ``gan``,
            ``quality`` (measures of what a GAN makes), ``detector``, ``robustness`` (of a detector) or ``audit``.
        label: the generator (for a detector: what it is trained on).
        seed: of the training.
        options: everything else that determines it.
        needs: keys of the cells that must be done first.
    """

    kind: str
    label: str
    seed: int
    options: dict[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of its folder: a hash of all that determines it, of what it needs, and of the toolkit's version."""
        what = [self.kind, self.label, self.seed, self.options, self.needs, toolkit.__version__]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """What progress displays call it."""
        named = {"real": "real clips", "features": "feature network", "audit": "shortcut audit"}
        return named.get(self.kind) or f"{self.kind} {self.label}, seed {self.seed}"


@dataclass
class Study:
    """A spec at its place on disk."""

    spec: StudySpec
    folder: Path
    source: str = ""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._manifest: Manifest | None = None
        self._cells: list[Cell] | None = None

    @property
    def manifest(self) -> Manifest:
        """The real data."""
        if self._manifest is None:
            self._manifest = open_manifest(self.spec.data)
        return self._manifest

    def identities(self) -> tuple[list[str], list[str]]:
        """Training identities for the GANs and for the detectors: disjoint, the same for every cell.

        Raises:
            UserError: there are not two.
        """
        table = self.manifest.table
        real = table[table["label"] == "real"]
        missing = [s for s in ("train", "val", "test") if s not in set(real["split"])]
        if missing:
            raise UserError(f"the data has no real frames in split {missing[0]}; a study needs train, val and test")
        people = sorted(set(real.loc[real["split"] == "train", "identity"]))
        if len(people) < 2:
            raise UserError("the training split has only one identity; a study needs one for the GANs and another for the detectors")
        order = np.random.default_rng(0).permutation(len(people))
        cut = min(len(people) - 1, max(1, round(self.spec.gan_share * len(people))))
        return sorted(people[i] for i in order[:cut]), sorted(people[i] for i in order[cut:])

    def cells(self) -> list[Cell]:
        """All cells, those that others need first."""
        if self._cells is None:
            self._cells = self._make_cells()
        return self._cells

    def _make_cells(self) -> list[Cell]:
        spec = self.spec
        gan_people, detector_people = self.identities()
        data = {
            "fingerprint": self.manifest.fingerprint(),
            "gan": gan_people,
            "detector": detector_people,
            "image_size": spec.image_size,
        }
        clips = dataclasses.asdict(spec.clips)
        gan = {k: v for k, v in dataclasses.asdict(spec.gan).items() if k != "model"}
        detector = dataclasses.asdict(spec.detector)
        measured = {"data": data, "clips": clips, "measures": self._measures()}
        cells: list[Cell] = []
        network: tuple[str, ...] = ()
        if "trained" in spec.features:
            cells.append(Cell("features", "trained", 0, {"data": data}))
            network = (cells[-1].key,)
        cells.append(Cell("real", REAL, 0, measured, network))
        made: dict[tuple[str, int], str] = {}
        quality = []
        for seed in spec.seeds:
            for label, model in spec.networks().items():
                cell = Cell("gan", label, seed, {"data": data, "clips": clips, "training": gan, "model": model, **_foreign(model)})
                made[label, seed] = cell.key
                cells.append(cell)
                quality.append(Cell("quality", label, seed, measured, (cell.key, *network)))
        cells += quality
        for seed in spec.seeds:
            needs = tuple(made[label, seed] for label in spec.networks())
            options = {"data": data, "training": detector, "clip_frames": spec.clips.frames, **_foreign(spec.detector.model)}
            tests = []
            for label in spec.networks():
                cells.append(Cell("detector", label, seed, options, needs))
                tests.append(Cell("robustness", label, seed, options, (cells[-1].key, made[label, seed])))
            if spec.control:
                cells.append(Cell("detector", CONTROL, seed, options))
            cells += tests if spec.robustness else []
        if spec.audit:
            needs = tuple(made[label, spec.seeds[0]] for label in spec.networks())
            cells.append(Cell("audit", "audit", 0, {"data": data, "clip_frames": spec.clips.frames}, needs))
        return cells

    def _measures(self) -> dict[str, Any]:
        """What quality is measured with: names of the measures, and spaces with the hash of their weights' file."""
        from toolkit.metrics import all_measures

        names = [m.name for m in all_measures()]
        foreign = plugins().fingerprints(i.name for i in plugins().infos.values() if i.provides.get("toolkit_metrics"))
        files = (text.partition("@") for text in self.spec.features)
        spaces = [name + (f"@{file_hash(Path(file).expanduser())}" if file else "") for name, _, file in files]
        return {"names": names, "spaces": spaces, **({"plugins": foreign} if foreign else {})}

    def spaces(self) -> list[FeatureSpace]:
        """The feature spaces of the spec; the trained one must have been trained."""
        trained = next((self.path(c) / "features.pt" for c in self.cells() if c.kind == "features"), None)
        return [feature_space(text, trained) for text in self.spec.features]

    def path(self, cell: Cell | str) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / (cell if isinstance(cell, str) else cell.key)

    def is_done(self, cell: Cell | str) -> bool:
        """Whether the cell's result is there; it is written last, so nothing else needs looking at."""
        return (self.path(cell) / "result.json").is_file()
