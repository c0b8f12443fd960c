"""Training data of the GAN: real frames of one split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from toolkit.data.frames import ArrayDataset, Batches, FrameSet, evenly_spaced, load_frames, loader
from toolkit.data.manifest import Manifest
from toolkit.errors import UserError

PUPPETS = "puppets"
PUPPETS_FOLDER = Path("runs/data/puppets")


def open_manifest(manifest: str | Path) -> Manifest:
    """Load a manifest; the word ``puppets`` means the embedded data set, rendered into ``runs/data`` at first use."""
    if str(manifest) == PUPPETS:
        from toolkit.data.puppets import make_puppets

        return make_puppets(PUPPETS_FOLDER)
    return Manifest.load(manifest)


def start_after_interruption(module: pl.LightningDataModule, batches: Batches) -> Batches:
    """Let a resumed run go on with the batch after the last one it saw, in the middle of an epoch too."""
    trainer = module.trainer
    if trainer is not None and trainer.training:
        # The module's own count: the trainer's differs by one between checkpoints taken before and after a batch's end.
        batches.start_at(int(trainer.lightning_module.batches_done))  # type: ignore[arg-type]
    return batches


class GANData(pl.LightningDataModule):
    """Real frames for a GAN.

    Args:
        manifest: ``manifest.csv`` of a prepared dataset, or ``puppets`` for the embedded one.
        image_size: side of the images in pixels; follows the model.
        batch_size: total batch over all processes.
        seed: of the order of the frames.
        workers: loader processes; 0 is fastest for frames that fit in memory.
        identities: train on these identities only; all of the training split by default.
        validation_frames: at most this many frames for validation and test, evenly spaced.
    """

    def __init__(
        self,
        manifest: str = PUPPETS,
        image_size: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        workers: int = 0,
        identities: list[str] | None = None,
        validation_frames: int = 1024,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "manifest": manifest,
            "image_size": image_size,
            "batch_size": batch_size,
            "seed": seed,
            "workers": workers,
            "identities": identities,
            "validation_frames": validation_frames,
        }
        self.frames: FrameSet | None = None

    def setup(self, stage: str) -> None:
        if self.frames is not None:
            return
        frames = load_frames(open_manifest(self.options["manifest"]), self.options["image_size"])
        self.frames = frames.select(frames.table["label"] == "real")
        if not len(self.part("train")):
            raise UserError(f"{self.options['manifest']} has no real training frames (split train)")

    def part(self, split: str) -> FrameSet:
        """The real frames of a split (of the chosen identities, for ``train``)."""
        assert self.frames is not None
        table = self.frames.table
        keep = table["split"] == split
        if split == "train" and self.options["identities"] is not None:
            unknown = set(self.options["identities"]) - set(table["identity"][keep])
            if unknown:
                raise UserError(f"identities not in the training split: {', '.join(sorted(unknown))}")
            keep &= table["identity"].isin(self.options["identities"])
        return self.frames.select(keep)

    def train_dataloader(self) -> Any:
        part = self.part("train")
        batches = Batches(len(part), self.options["batch_size"], self.options["seed"])
        dataset = ArrayDataset(part.images, part.rows())
        return loader(dataset, start_after_interruption(self, batches), workers=self.options["workers"])

    def _evaluation(self, split: str) -> Any:
        part = self.part(split)
        if not len(part):
            return []
        rows = part.rows()
        rows = rows[evenly_spaced(len(rows), int(self.options["validation_frames"]))]
        return loader(ArrayDataset(part.images, rows), None, batch_size=256)

    def val_dataloader(self) -> Any:
        return self._evaluation("val")

    def test_dataloader(self) -> Any:
        return self._evaluation("test")
