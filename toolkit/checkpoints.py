"""Checkpoints: written so that none is ever half there, and read without running any code they may contain."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.files import atomic

M = TypeVar("M", bound=nn.Module)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:160]


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """Read a checkpoint made by this toolkit, without running any code it may contain.

    Args:
        path: the file.
        kind: what it must hold: ``gan`` or ``detector``.

    Raises:
        UserError: it is missing, damaged, carries objects other than tensors and plain values, or is of another kind.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} is not there") from error
    except Exception as error:
        # torch.load raises anything from KeyError to RuntimeError, depending on what the file really is.
        raise UserError(f"{path} cannot be loaded as a checkpoint: {_first_sentence(error)}") from error
    about = checkpoint.get("toolkit") if isinstance(checkpoint, dict) else None
    found = about.get("kind") if isinstance(about, dict) else None
    if found != kind or not isinstance(about, dict):
        what = f"a {found} checkpoint" if isinstance(found, str) else "not a checkpoint of this toolkit"
        raise UserError(f"{path} is {what}; a {kind} checkpoint is needed")
    if not isinstance(about.get("options"), dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} is incomplete: it lacks options or weights; use another checkpoint")
    return dict(checkpoint)


def require_same_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise :class:`UserError` unless ``state`` has the names and shapes of ``network``'s weights."""
    ours = network.state_dict()
    for name in [*ours, *state]:
        here, there = (tuple(s[name].shape) if isinstance(s.get(name), Tensor) else None for s in (ours, state))
        if here != there:
            what = [f"not {where}" if shape is None else f"{shape} {where}" for shape, where in ((there, "there"), (here, "here"))]
            raise UserError(
                f"{path} was made by another architecture: the weight {name} is {' and '.join(what)}; give the same model options"
            )


def load_module(kind: str, make: Callable[..., M], path: Path, prefer: list[str] | None = None) -> tuple[M, dict[str, Any]]:
    """Make a module from the options in its checkpoint, and load its weights.

    Args:
        kind: ``gan`` or ``detector``.
        make: the module's class.
        path: of the checkpoint.
        prefer: providers instead of those it was trained with.

    Returns:
        The module in evaluation mode, and what the checkpoint says about it.

    Raises:
        UserError: another kind of checkpoint, or one of another architecture or of unknown activations.
    """
    checkpoint = load_checkpoint(path, kind)
    saved = checkpoint["toolkit"]
    try:
        module = make(**{**saved["options"], **({"prefer": prefer} if prefer is not None else {})})
    except UserError:
        raise
    except Exception as error:
        # Options of another version, or of a damaged file, can fail anywhere in the making of a network.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} was made by another version of the toolkit, or is damaged: {reason}") from error
    require_same_weights(module, checkpoint["state_dict"], path)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval(), saved


class Checkpoints(pl.callbacks.ModelCheckpoint):
    """Keeps the best checkpoint, and as ``last.ckpt`` that of the last validation (or of the last step, at the end).

    Lightning's own ``save_last`` writes that file only when a checkpoint is among the best: a run that has stopped improving
    would be resumed from long ago.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING:  # not after `trainer.validate`
            self._save_last(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0:
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        path = Path(self.dirpath) / "last.ckpt"
        self.last_model_path = str(path)
        trainer.save_checkpoint(path, self.save_weights_only)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is on disk.

    Lightning writes it to the system's folder for temporary files first: where that is another disk, moving is copying, and a
    process killed meanwhile leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        # One run owns its folder: what an earlier one was killed over is of no use.
        for stale in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
            stale.unlink(missing_ok=True)
        # To memory first: torch reports a full disk as an internal error of its archive.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
