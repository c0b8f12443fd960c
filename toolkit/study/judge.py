"""Cells that judge: measures of generators and of real clips, robustness of detectors, and the shortcut audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit.data.audit import audit
from toolkit.data.frames import FrameSet, evenly_spaced
from toolkit.data.video import write_video
from toolkit.detector.data import join_frames
from toolkit.detector.explain import cam_picture, predict, residual_spectrum
from toolkit.detector.module import Detector
from toolkit.detector.robustness import curves
from toolkit.errors import UserError
from toolkit.files import atomic, read_json
from toolkit.metrics import ClipSet, Measure, all_measures, figures
from toolkit.pictures import enlarge, grid, png, tile_clips
from toolkit.study.material import (
    detector_real_frames,
    fake_frames,
    learned_frames,
    real_frames,
)
from toolkit.study.spec import Cell, Study

SHOWN_CLIPS = 6
REAL_CLIPS = 100


def show(folder: Path, clips: list[np.ndarray], images: np.ndarray) -> None:
    """Write ``walk.webm``, clips side by side, and ``grid.png``, images in a grid."""
    write_video(folder / "walk.webm", tile_clips(clips, columns=3, scale=2), fps=25)
    with atomic(folder / "grid.png") as temporary:
        temporary.write_bytes(png(grid(images[evenly_spaced(len(images), 32)], columns=8)))


def _evenly(clips: list[np.ndarray], limit: int) -> list[np.ndarray]:
    return [clips[i] for i in evenly_spaced(len(clips), limit)]


def _sets(frames: FrameSet, cell: Cell, part: slice = slice(None)) -> tuple[ClipSet, ClipSet]:
    """Real frames as a set to compare images with, and as clips: runs of consecutive frames, where the data has any.

    In both a run is one observation, for its frames are nearly alike.
    """
    options = cell.options["clips"]
    runs = frames.clips(options["frames"])[0][part]
    if not runs:
        images = frames.array()[part]
        return ClipSet.of_images(images[evenly_spaced(len(images), options["images"])]), ClipSet([])
    return ClipSet(_evenly(runs, max(REAL_CLIPS, options["images"] // options["frames"]))), ClipSet(_evenly(runs, REAL_CLIPS))


_references: dict[str, tuple[ClipSet, ClipSet]] = {}


def _reference(study: Study, cell: Cell) -> tuple[ClipSet, ClipSet]:
    """What the GANs learn from; kept with its features and flows, for a worker measures many generators."""
    key = f"{study.folder} {cell.options['data']} {cell.options['clips']}"
    if key not in _references:
        _references.clear()
        _references[key] = _sets(learned_frames(study, cell), cell)
    return _references[key]


def _measure(measures: list[Measure], real: tuple[ClipSet, ClipSet], fake: tuple[ClipSet, ClipSet]) -> list[dict[str, Any]]:
    return figures(measures, (real[0], fake[0]), (real[1], fake[1]))


def run_real(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """Real against real: every second run of the GANs' own training frames against the others, which is the floor of
    every measure, and people whom no GAN has seen against the training frames, which is how far apart people are."""
    measures = all_measures(study.spaces())
    learned = learned_frames(study, cell)
    floor = _measure(measures, *(_sets(learned, cell, slice(place, None, 2)) for place in (0, 1)))
    frames = real_frames(study, cell)
    others = frames.select(frames.table["split"] == "test")
    strangers = _measure(measures, _reference(study, cell), _sets(others, cell))
    clips, videos = others.clips(cell.options["clips"]["frames"])
    shown = _evenly(clips, SHOWN_CLIPS) or [others.array()[:1]]
    show(folder, [np.concatenate([c, c[::-1]]) for c in shown], others.array())
    people = sorted(set(others.table["identity"]))
    return {"status": "done", "measures": floor, "others": strangers, "identities": people, "videos": len(set(videos))}


def run_quality(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """Measures of a generator's images and clips, and of the images of its best checkpoint."""
    made = study.path(cell.needs[0])
    trained = read_json(made / "result.json")
    if trained["status"] != "done":
        return {"status": "skipped", "message": "its generator diverged", "measures": [], "best": []}
    measures = all_measures(study.spaces())
    real = _reference(study, cell)
    images, clips = np.load(made / "images.npy"), np.load(made / "clips.npy")
    final = _measure(measures, real, (ClipSet.of_images(images), ClipSet(list(clips))))
    best: list[dict[str, Any]] = []
    if (made / "images-best.npy").is_file():
        chosen = np.load(made / "images-best.npy")
        if np.array_equal(chosen, images):
            best = [row for row in final if row["metric"] in {m.name for m in measures if m.on == "images"}]
        else:
            best = _measure(measures, real, (ClipSet.of_images(chosen), ClipSet([])))
    return {"status": "done", "measures": final, "best": best, "best_step": trained.get("best_step")}


def run_robustness(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """A detector's curves on spoiled test frames, where it looks, and the residual spectra of what it was shown."""
    trained, made = cell.needs
    if read_json(study.path(trained) / "result.json")["status"] != "done":
        return {"status": "skipped", "message": "its detector was not trained", "curves": []}
    detector = Detector.from_checkpoint(study.path(trained) / "checkpoints" / "best.ckpt")
    fakes = fake_frames(study, made, cell.label)
    assert fakes is not None  # or there would be no detector
    real = detector_real_frames(study, cell)
    real, fakes = (part.select(part.table["split"] == "test") for part in (real, fakes))
    both = join_frames([real, fakes])
    rows = curves(lambda images: predict(detector, images), both, float(detector.threshold))
    spectra = {"real": residual_spectrum(real.array()).tolist(), "fake": residual_spectrum(fakes.array()).tolist()}
    try:
        picture = cam_picture(detector, both)
        with atomic(folder / "gradcam.png") as temporary:
            temporary.write_bytes(png(enlarge(picture, max(1, 64 // both.images.shape[1]))))
    except UserError as error:
        print(error)
    return {"status": "done", "curves": rows, "spectra": spectra}


def run_audit(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """The shortcut audit of what detectors are given: real frames in clips, and the fakes of every generator."""
    parts = [detector_real_frames(study, cell)]
    for label, key in zip(study.spec.networks(), cell.needs, strict=True):
        fakes = fake_frames(study, key, label)
        if fakes is not None:
            parts.append(fakes)
    if len(parts) == 1:
        return {"status": "skipped", "message": "every generator diverged"}
    joined = join_frames(parts)
    table = joined.table.copy()
    # Where a frame came from and when is known to the manifest, not to a detector, which sees frames in memory.
    table["box"], table["time_s"] = "", table["index"] / 25.0
    size = joined.images.shape[1]

    def image_of(row: pd.Series) -> np.ndarray:
        return joined.images[int(row["row"])]

    return {"status": "done", **audit(table, image_of, lambda row: {"format": "array", "width": size, "height": size}).to_json()}
