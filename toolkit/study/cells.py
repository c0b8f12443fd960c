"""Running one cell: a training with what it makes and measures."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from toolkit.activations.health import ActivationHealth
from toolkit.data.fakes import fake_table
from toolkit.data.frames import ArrayDataset, FrameSet, load_frames
from toolkit.data.video import write_video
from toolkit.detector.augment import Augmentations
from toolkit.detector.data import DetectorData, join_frames
from toolkit.detector.module import Detector, summarise
from toolkit.errors import UserError
from toolkit.files import atomic, read_json, write_json
from toolkit.gan.data import GANData
from toolkit.gan.module import GAN
from toolkit.gan.walks import render_clips
from toolkit.metrics import ClipSet, all_measures, estimate
from toolkit.pictures import grid, png, tile_clips
from toolkit.study.spec import CONTROL, Cell, Study
from toolkit.training import CollapseWatch, Diverged, History, load_checkpoint, versions

SHOWN_CLIPS = 6
REAL_CLIPS = 100
# Without a version counter a resumed run overwrites a best.ckpt that its own interrupted part left behind.
_KEEP: dict[str, Any] = {"auto_insert_metric_name": False, "enable_version_counter": False}


class _Progress(pl.Callback):
    """Tells the folder, now and then, how far the training is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._told = folder, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() - self._told > 2:
            self._told = time.monotonic()
            write_json(self.folder / "progress.json", {"step": trainer.global_step, "steps": trainer.max_steps})


def run_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Run ``cell`` to its end (or from its last checkpoint on) and write ``result.json``.

    Returns:
        The result.
    """
    folder = study.path(cell)
    write_json(folder / "cell.json", {**asdict(cell), "key": cell.key})
    started = time.monotonic()
    run = {"real": _run_real, "gan": _run_gan, "detector": _run_detector}[cell.kind]
    result = run(study, cell, folder)
    # Of the last attempt: what an interrupted one took is not known once it is gone.
    result |= {"seconds": round(time.monotonic() - started, 2), "versions": versions()}
    write_json(folder / "result.json", result)
    return result


def _trainer(folder: Path, options: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_steps=options["max_steps"],
        max_epochs=-1,
        precision=options["precision"],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, options["max_steps"] // options["validations"]),
        log_every_n_steps=max(1, options["max_steps"] // 60),
        callbacks=[*callbacks, _Progress(folder)],
    )


def _resume_from(folder: Path, kind: str) -> str | None:
    """The last checkpoint, if it can be read."""
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        return None
    try:
        load_checkpoint(path, kind)
    except UserError as error:
        print(f"the checkpoint is not usable, starting over: {error}")
        shutil.rmtree(path.parent)
        return None
    return str(path)


def _real_parts(study: Study, options: dict[str, Any]) -> tuple[FrameSet, pd.Series]:
    frames = load_frames(study.manifest, options["data"]["image_size"])
    frames = frames.select(frames.table["label"] == "real")
    return frames, frames.table["split"]


def _measure(real_images: ClipSet, real_clips: ClipSet, images: ClipSet, clips: ClipSet) -> list[dict[str, Any]]:
    rows = []
    for measure in all_measures():
        real, fake = (real_images, images) if measure.on == "images" else (real_clips, clips)
        if not len(real) or not len(fake):
            continue
        try:
            figure = estimate(measure, real, fake)
        except Exception as error:
            # A measure may come from anyone's plugin; it must not cost the training its other results.
            print(f"measure {measure.name!r} failed: {type(error).__name__}: {error}")
            continue
        rows.append(
            {
                "metric": measure.name,
                "unit": measure.unit,
                "better": measure.better,
                "space": measure.space,
                **asdict(figure),
            }
        )
    return rows


def _reference(study: Study, cell: Cell) -> tuple[ClipSet, ClipSet]:
    """The real frames that the GANs learn from, as images and as clips."""
    frames, split = _real_parts(study, cell.options)
    learned = frames.select((split == "train") & frames.table["identity"].isin(cell.options["data"]["gan"]))
    clips, _ = learned.clips(cell.options["clips"]["frames"])
    return ClipSet.of_images(_evenly(learned.array(), cell.options["clips"]["images"])), ClipSet(_evenly_list(clips, REAL_CLIPS))


def _evenly(array: np.ndarray, limit: int) -> np.ndarray:
    return array if len(array) <= limit else array[np.linspace(0, len(array) - 1, limit).round().astype(int)]


def _evenly_list(items: list[np.ndarray], limit: int) -> list[np.ndarray]:
    return items if len(items) <= limit else [items[int(i)] for i in np.linspace(0, len(items) - 1, limit).round()]


def _run_real(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """Real against real: every second run of the GANs' own training frames against the others, which is the floor of
    every measure, and people whom no GAN has seen against the training frames, which is how far apart people are."""
    length = cell.options["clips"]["frames"]
    frames, split = _real_parts(study, cell.options)
    learned = frames.select((split == "train") & frames.table["identity"].isin(cell.options["data"]["gan"]))
    runs, _ = learned.clips(length)
    halves = [_as_sets(runs[place::2], cell) for place in (0, 1)]
    floor = _measure(*halves[0], *halves[1]) if min(len(runs[0::2]), len(runs[1::2])) else []
    others = frames.select(split == "test")
    clips, videos = others.clips(length)
    reference = _reference(study, cell)
    images = ClipSet.of_images(_evenly(others.array(), cell.options["clips"]["images"]))
    strangers = _measure(*reference, images, ClipSet(_evenly_list(clips, REAL_CLIPS)))
    _show(folder, _evenly_list(clips, SHOWN_CLIPS) or [others.array()[:1]], others.array())
    people = sorted(set(others.table["identity"]))
    return {"status": "done", "measures": floor, "others": strangers, "identities": people, "videos": len(set(videos))}


def _as_sets(clips: list[np.ndarray], cell: Cell) -> tuple[ClipSet, ClipSet]:
    images = _evenly(np.concatenate(clips), cell.options["clips"]["images"]) if clips else np.zeros((0, 1, 1, 3), np.uint8)
    return ClipSet.of_images(images), ClipSet(_evenly_list(clips, REAL_CLIPS))


def _show(folder: Path, clips: list[np.ndarray], images: np.ndarray) -> None:
    write_video(folder / "walk.webm", tile_clips([np.concatenate([c, c[::-1]]) for c in clips], columns=3, scale=2), fps=12)
    with atomic(folder / "grid.png") as temporary:
        temporary.write_bytes(png(grid(_evenly(images, 32), columns=8)))


def _run_gan(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    options = cell.options
    training = options["training"]
    module = GAN(**options["model"], seed=cell.seed, log_every=max(1, training["max_steps"] // 60), validation_images=512)
    data = GANData(
        "",
        options["data"]["image_size"],
        training["batch_size"],
        cell.seed,
        identities=options["data"]["gan"],
        validation_frames=512,
    )
    data.frames, _ = _real_parts(study, options)
    history, health = History(), ActivationHealth(max(1, training["max_steps"] // 20))
    collapse = CollapseWatch(max(1, training["max_steps"] // training["validations"]))
    keep = ModelCheckpoint(folder / "checkpoints", "best", monitor="val/frechet", save_last=True, **_KEEP)
    trainer = _trainer(folder, training, [history, health, collapse, keep])
    status, message = "done", ""
    try:
        trainer.fit(module, data, ckpt_path=_resume_from(folder, "gan"), weights_only=True)
    except Diverged as error:
        status, message = "diverged", str(error)
        print(message)
    result: dict[str, Any] = {
        "status": status,
        "message": message,
        "parameters": sum(p.numel() for p in module.generator.parameters()),
        "collapsed_at": collapse.collapsed_at,
        "sites": module.sites,
        "curves": history.rows,
        "health": health.history,
        "measures": [],
    }
    if status == "diverged":
        return result
    module.eval()
    count = options["clips"]
    # Walk and image seeds are the same for every generator: all follow one latent path.
    clips = render_clips(module.sampler, clips=count["count"], frames=count["frames"], keyframes=count["keyframes"])
    images = module.fixed_images(count["images"])
    with atomic(folder / "clips.npy") as temporary:
        np.save(temporary, np.stack(clips))
    loop = render_clips(module.sampler, clips=SHOWN_CLIPS, frames=48, keyframes=count["keyframes"])
    write_video(folder / "walk.webm", tile_clips(loop, columns=3, scale=2), fps=24)
    with atomic(folder / "grid.png") as temporary:
        temporary.write_bytes(png(grid(images[:32], columns=8)))
    reference_images, reference_clips = _reference(study, cell)
    result["measures"] = _measure(reference_images, reference_clips, ClipSet.of_images(images), ClipSet(clips))
    return result


def _fakes(study: Study, key: str, label: str) -> FrameSet | None:
    """The clips of a GAN cell; None if it diverged."""
    if read_json(study.path(key) / "result.json")["status"] != "done":
        return None
    clips = np.load(study.path(key) / "clips.npy", mmap_mode="r")
    table = fake_table(list(clips), method=label, name=label)
    table["row"] = np.arange(len(table))
    return FrameSet(clips.reshape(-1, *clips.shape[2:]), table)


def _control(frames: FrameSet, seed: int) -> FrameSet:
    """Real frames only; in each split a random half of the identities is called fake."""
    table = frames.table.copy()
    rng = np.random.default_rng([seed, 0xC0])
    for split in ("train", "val", "test"):
        people = sorted(set(table.loc[table["split"] == split, "identity"]))
        called = [people[i] for i in rng.permutation(len(people))[: len(people) // 2]]
        chosen = (table["split"] == split) & table["identity"].isin(called)
        table.loc[chosen, "label"] = "fake"
        table.loc[chosen, "method"] = CONTROL
    return FrameSet(frames.images, table)


def _run_detector(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    options, training = cell.options, cell.options["training"]
    frames, split = _real_parts(study, options)
    real = frames.select((split != "train") | frames.table["identity"].isin(options["data"]["detector"]))
    tests: dict[str, FrameSet] = {}
    if cell.label == CONTROL:
        # All training people take part: two identities would not make two classes.
        joined = _control(frames, cell.seed)
        tests[CONTROL] = joined.select(joined.table["split"] == "test")
        if len(set(tests[CONTROL].table["label"])) < 2 or len(set(joined.table.loc[joined.table["split"] == "val", "label"])) < 2:
            return {"status": "skipped", "message": "the control needs two identities in val and in test", "tests": []}
    else:
        labels = list(study.spec.networks())
        made = {label: _fakes(study, key, label) for label, key in zip(labels, cell.needs, strict=True)}
        own = made[cell.label]
        if own is None:
            return {"status": "skipped", "message": "its generator diverged", "tests": []}
        joined = join_frames([real, own])
        for label, fakes in made.items():
            if fakes is not None:
                tests[label] = join_frames([part.select(part.table["split"] == "test") for part in (real, fakes)])
    data = DetectorData.from_frames(
        joined,
        image_size=options["data"]["image_size"],
        batch_size=training["batch_size"],
        seed=cell.seed,
        augmentations=Augmentations(**training["augmentations"]),
    )
    model = {"image_size": options["data"]["image_size"], **training["model"]}
    module = Detector(**model, seed=cell.seed)
    history = History()
    keep = ModelCheckpoint(folder / "checkpoints", "best", monitor="val/loss", save_last=True, **_KEEP)
    trainer = _trainer(folder, training, [history, keep])
    try:
        trainer.fit(module, data, ckpt_path=_resume_from(folder, "detector"), weights_only=True)
    except Diverged as error:
        return {"status": "diverged", "message": str(error), "tests": [], "curves": history.rows}
    best = Detector.from_checkpoint(folder / "checkpoints" / "best.ckpt")
    results, predictions = [], []
    for label, part in tests.items():
        table = part.table[["video", "label", "method", "index"]].assign(score=_predict(best, part))
        figures = summarise(table, float(best.threshold))
        results.append({"tested_on": label, "measures": [{"metric": name, **asdict(e)} for name, e in figures.items()]})
        predictions.append(table.assign(tested_on=label))
    with atomic(folder / "predictions.parquet") as temporary:
        pd.concat(predictions, ignore_index=True).to_parquet(temporary)
    videos = {c: int(joined.table.loc[joined.table["split"] == c, "video"].nunique()) for c in ("train", "val", "test")}
    return {
        "status": "done",
        "threshold": float(best.threshold),
        "tests": results,
        "curves": history.rows,
        "videos": videos,
    }


@torch.inference_mode()
def _predict(detector: Detector, part: FrameSet) -> np.ndarray:
    from toolkit.data.frames import loader, to_float

    batches = loader(ArrayDataset(part.images, part.rows()), None, batch_size=256)
    return np.concatenate([detector(to_float(batch["image"])).cpu().numpy() for batch in batches])
