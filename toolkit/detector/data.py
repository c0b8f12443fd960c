"""Training data of the detector: real and fake frames from one or several manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl

from toolkit.data.frames import ArrayDataset, Batches, FrameSet, evenly_spaced, load_frames, loader
from toolkit.data.manifest import Manifest
from toolkit.detector.augment import Augmentations, augmenter
from toolkit.errors import UserError
from toolkit.files import read_json
from toolkit.gan.data import open_manifest, start_after_interruption


def join_frames(parts: list[FrameSet]) -> FrameSet:
    """Several frame sets of one image size as one.

    Raises:
        UserError: a video or an identity stands on both sides of a split once they are together.
    """
    if len(parts) == 1:
        return parts[0]
    offset, tables = 0, []
    for part in parts:
        table = part.table.copy()
        table["row"] = np.arange(offset, offset + len(table))
        tables.append(table)
        offset += len(table)
    joined = pd.concat(tables, ignore_index=True)
    Manifest(Path(), joined.assign(frame="")).check("the manifests together")
    return FrameSet(np.concatenate([part.array() for part in parts]), joined)


class DetectorData(pl.LightningDataModule):
    """Real and fake frames.

    Args:
        manifests: manifests (or their folders) to join; ``puppets`` is the embedded data set, which has no fakes.
        image_size: side of the frames in pixels; follows the model.
        batch_size: total batch over all processes.
        balance: draw real and fake equally often in training (and each method equally often among the fakes).
        augmentations: probabilities of flip, jpeg, blur, resize and noise.
        target: column with the regression target of a linear head.
        seed: of order and augmentations.
        workers: loader processes.
        limit: at most this many frames from each split, evenly spaced; 0 is no limit.
    """

    def __init__(
        self,
        manifests: list[str],
        image_size: int = 64,
        batch_size: int = 64,
        balance: bool = True,
        augmentations: Augmentations | None = None,
        target: str = "",
        seed: int = 0,
        workers: int = 0,
        limit: int = 0,
    ) -> None:
        super().__init__()
        self.manifests, self.image_size, self.batch_size, self.balance = manifests, image_size, batch_size, balance
        self.augmentations = augmentations or Augmentations()
        self.target, self.seed, self.workers, self.limit = target, seed, workers, limit
        self.frames: FrameSet | None = None
        self.preprocessing: dict[str, Any] = {}
        self.classes: list[str] = []

    @classmethod
    def from_frames(cls, frames: FrameSet, **options: Any) -> DetectorData:
        """The same for frames that are in memory already."""
        data = cls([], **options)
        data._take(frames)
        return data

    def setup(self, stage: str) -> None:
        if self.frames is not None:
            return
        if not self.manifests:
            raise UserError("a detector needs data: --data.manifests '[REAL, FAKE, ...]'")
        opened = [open_manifest(m) for m in self.manifests]
        for manifest in opened:
            record = manifest.root / "prepare.json"
            if record.is_file() and not self.preprocessing:
                settings = read_json(record).get("settings", {})
                self.preprocessing = {k: settings[k] for k in ("faces", "margin", "size") if k in settings}
        self._take(join_frames([load_frames(manifest, self.image_size) for manifest in opened]))

    def _take(self, frames: FrameSet) -> None:
        labels = set(frames.table.loc[frames.table["split"] == "train", "label"])
        if not self.target and labels != {"real", "fake"}:
            missing = ({"real", "fake"} - labels).pop()
            raise UserError(f"the training split has no {missing} frames; add a manifest that has (see `toolkit gan sample --manifest`)")
        if self.target and self.target not in frames.table.columns:
            raise UserError(
                f"the manifest has no column {self.target!r} for the target; it has {', '.join(map(str, frames.table.columns))}"
            )
        self.frames = frames
        methods = sorted(set(frames.table["method"][frames.table["label"] == "fake"]))
        self.classes = ["real", *methods]

    def part(self, split: str) -> FrameSet:
        """The frames of a split."""
        assert self.frames is not None
        part = self.frames.select(self.frames.table["split"] == split)
        if self.limit and len(part) > self.limit:
            keep = np.zeros(len(part), dtype=bool)
            keep[evenly_spaced(len(part), self.limit)] = True
            part = part.select(keep)
        return part

    def dataset(self, part: FrameSet, *, train: bool = False) -> ArrayDataset:
        """A dataset of ``image, fake, method, target, item`` for these frames."""
        code = {name: number for number, name in enumerate(self.classes)}
        target = part.table[self.target].to_numpy(np.float32) if self.target else np.zeros(len(part), np.float32)
        columns = {
            "fake": (part.table["label"] == "fake").to_numpy(np.int64),
            "method": np.array(
                [code[m] if label == "fake" else 0 for m, label in zip(part.table["method"], part.table["label"], strict=True)]
            ),
            "target": target,
            "item": np.arange(len(part)),
        }
        return ArrayDataset(part.images, part.rows(), columns, augmenter(self.augmentations) if train else None, self.seed)

    def train_dataloader(self) -> Any:
        part = self.part("train")
        weights = None
        if self.balance and not self.target:
            method = part.table["method"].where(part.table["label"] == "fake", "")
            share = 1.0 / method.map(method.value_counts())
            fakes = method.nunique() - 1
            weights = np.where(method == "", share, share / max(1, fakes)).astype(np.float64)
        batches = start_after_interruption(self, Batches(len(part), self.batch_size, self.seed, weights))
        return loader(self.dataset(part, train=True), batches, workers=self.workers)

    def val_dataloader(self) -> Any:
        part = self.part("val")
        return loader(self.dataset(part), None, batch_size=256) if len(part) else []

    def test_dataloader(self) -> Any:
        part = self.part("test")
        if not len(part):
            raise UserError("there are no test frames (split test)")
        return loader(self.dataset(part), None, batch_size=256)
