"""Sample grids and clips while a GAN trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from toolkit.data.video import write_video
from toolkit.files import atomic
from toolkit.gan.walks import render_clips
from toolkit.pictures import gif, grid, png, tile_clips


class Samples(pl.Callback):
    """Every ``every`` steps: a grid of fakes and a looping clip, from the same latents each time, as files in
    ``samples/`` of the run's folder and in TensorBoard where that is the logger.

    Args:
        every: generator steps between samples.
        images: fakes in the grid.
        clips: walks in the clip.
        frames: frames of the clip; 0 makes none.
    """

    def __init__(self, every: int = 500, images: int = 64, clips: int = 8, frames: int = 48) -> None:
        self.every, self.images, self.clips, self.frames = every, images, clips, frames
        self._last = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._last:
            self._make(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self._last:
            self._make(trainer, pl_module)

    def _make(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last = step = trainer.global_step
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "samples"
        sheet = png(grid(pl_module.fixed_images(self.images)))
        with atomic(folder / f"step-{step:07d}.png") as temporary:
            temporary.write_bytes(sheet)
        clip: np.ndarray | None = None
        if self.frames:
            clip = tile_clips(render_clips(pl_module.sampler, clips=self.clips, frames=self.frames), columns=4)
            write_video(folder / f"step-{step:07d}.webm", clip, fps=25)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                _to_tensorboard(logger, "samples", sheet, step)
                if clip is not None:
                    _to_tensorboard(logger, "walk", gif(clip, 25), step)


def _to_tensorboard(logger: pl.loggers.TensorBoardLogger, tag: str, encoded: bytes, step: int) -> None:
    """Log an encoded picture; SummaryWriter.add_video would need moviepy and ffmpeg for the same GIF."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    value = Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=encoded, colorspace=3))
    logger.experiment._get_file_writer().add_summary(Summary(value=[value]), step)
