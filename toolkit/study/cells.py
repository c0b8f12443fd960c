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

from toolkit.activations.health import ActivationHealth
from toolkit.checkpoints import AtomicCheckpoints, Checkpoints, load_checkpoint
from toolkit.detector.augment import Augmentations
from toolkit.detector.data import DetectorData
from toolkit.detector.module import Detector, summarise
from toolkit.errors import UserError
from toolkit.files import atomic, write_json
from toolkit.gan.data import GANData
from toolkit.gan.module import GAN
from toolkit.gan.walks import render_clips
from toolkit.metrics.features import network_hash, save_features, train_features
from toolkit.study import judge
from toolkit.study.material import detector_frames, real_frames
from toolkit.study.spec import Cell, Study
from toolkit.training import CollapseWatch, Diverged, History, versions

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
    # A backbone with dropout draws from PyTorch's own generator, which else would depend on what the worker did before.
    pl.seed_everything(cell.seed, verbose=False)
    result = RUN[cell.kind](study, cell, folder)
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
        plugins=[AtomicCheckpoints()],
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
    data.frames = real_frames(study, cell)
    history, health = History(), ActivationHealth(max(1, training["max_steps"] // 20))
    collapse = CollapseWatch(max(1, training["max_steps"] // training["validations"]))
    keep = Checkpoints(folder / "checkpoints", "best", monitor="val/frechet", **_KEEP)
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
    }
    if status == "diverged":
        return result
    module.eval()
    count = options["clips"]
    # Walk and image seeds are the same for every generator: all follow one latent path.
    walk = {"frames": count["frames"], "keyframes": count["keyframes"], "period": count["period"]}
    _save(folder / "clips.npy", np.stack(render_clips(module.sampler, clips=count["count"], **walk)))
    images = module.fixed_images(count["images"])
    _save(folder / "images.npy", images)
    best = folder / "checkpoints" / "best.ckpt"
    if best.is_file():
        result["best_step"] = int(load_checkpoint(best, "gan")["global_step"])
        _save(folder / "images-best.npy", GAN.from_checkpoint(best).fixed_images(count["images"]))
    whole = {"frames": 2 * count["period"], "keyframes": 2 * count["keyframes"]}
    judge.show(folder, render_clips(module.sampler, clips=judge.SHOWN_CLIPS, **whole), images[:32])
    return result


def _run_features(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    frames = real_frames(study, cell)
    images = frames.select(frames.table["split"] == "train").array()
    network = train_features(images)
    save_features(network, folder / "features.pt")
    return {"status": "done", "network": network_hash(network), "images": len(images)}


def _save(path: Path, array: np.ndarray) -> None:
    with atomic(path) as temporary:
        np.save(temporary, array)


def _run_detector(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    options, training = cell.options, cell.options["training"]
    found = detector_frames(study, cell)
    if isinstance(found, str):
        return {"status": "skipped", "message": found, "tests": []}
    joined, tests = found
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
    keep = Checkpoints(folder / "checkpoints", "best", monitor="val/loss", **_KEEP)
    trainer = _trainer(folder, training, [history, keep])
    try:
        trainer.fit(module, data, ckpt_path=_resume_from(folder, "detector"), weights_only=True)
    except Diverged as error:
        return {"status": "diverged", "message": str(error), "tests": [], "curves": history.rows}
    best = Detector.from_checkpoint(folder / "checkpoints" / "best.ckpt")
    results, predictions = [], []
    for label, part in tests.items():
        table = part.table[["video", "group", "label", "method", "index"]].assign(score=judge.predict(best, part.array()))
        figures = summarise(table, float(best.threshold))
        results.append({"tested_on": label, "measures": [{"metric": name, **asdict(e)} for name, e in figures.items()]})
        predictions.append(table.assign(tested_on=label))
    with atomic(folder / "predictions.parquet") as temporary:
        pd.concat(predictions, ignore_index=True).to_parquet(temporary)
    videos = {c: int(joined.table.loc[joined.table["split"] == c, "video"].nunique()) for c in ("train", "val", "test")}
    return {
        "status": "done",
        "threshold": float(best.threshold),
        "temperature": float(best.temperature),
        "tests": results,
        "curves": history.rows,
        "videos": videos,
    }


RUN = {
    "features": _run_features,
    "real": judge.run_real,
    "gan": _run_gan,
    "quality": judge.run_quality,
    "detector": _run_detector,
    "robustness": judge.run_robustness,
    "audit": judge.run_audit,
}
