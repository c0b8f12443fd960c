"""Health of a network while it trains: dead, dormant and saturated units, effective rank and gradient norm of every
site, and how far an update moves every weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from toolkit.activations.module import ActivationModule

SATURATED = 0.01
SAMPLES = 16
RANK_ROWS = 1024


@torch.no_grad()
def unit_health(module: ActivationModule, x: Tensor, y: Tensor) -> dict[str, float]:
    """Health of one site from its input and output.

    Args:
        module: the activation.
        x, y: its input and output, ``(N, C, ...)`` (or channels last after a linear layer).

    Returns:
        ``dead``: share of units (channels) with derivative zero for every sample and position;
        ``dormant_0.025``, ``dormant_0.1``: share of units whose mean |output| is at most tau times the layer's mean over
        units (Sokar et al. 2023, arXiv:2302.12902, eq. 1);
        ``saturated``: share of inputs where the derivative is below 0.01 in absolute value;
        ``effective_rank``: of the outputs, see :func:`effective_rank`; between 1 and the number of units.
        A function without a formula has only the dormant shares.
    """
    dim = module.channel_dim if x.dim() > 1 else 0
    x, y = x.detach()[:SAMPLES].float(), y.detach()[:SAMPLES].float()
    units = y.abs().movedim(dim, -1).reshape(-1, y.shape[dim]).mean(dim=0)
    score = units / units.mean().clamp_min(1e-12)
    result = {f"dormant_{tau:g}": float((score <= tau).float().mean()) for tau in (0.025, 0.1)}
    result["effective_rank"] = effective_rank(y.movedim(dim, -1).reshape(-1, y.shape[dim]))
    if module.activation.formula is not None:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            point = x.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(module.reference(point).sum(), point)
        slope = slope.abs()
        flat = slope.movedim(dim, -1).reshape(-1, slope.shape[dim])
        result["dead"] = float((flat.amax(dim=0) < 1e-8).float().mean())
        result["saturated"] = float((slope < SATURATED).float().mean())
    return result


def effective_rank(activity: Tensor) -> float:
    """Effective rank of a matrix (Roy & Vetterli 2007, eq. 4): ``exp(H(s / sum(s)))`` of its singular values ``s``.

    Args:
        activity: ``(rows, units)``; of more than 1024 rows every k-th is taken.

    Returns:
        1 for a matrix of rank one, ``units`` for equal singular values; NaN for a matrix of zeros or one not finite.
    """
    rows = activity[:: max(1, -(-len(activity) // RANK_ROWS))].double()
    if not bool(torch.isfinite(rows).all()):
        return float("nan")
    singular = torch.linalg.svdvals(rows)
    if float(singular.sum()) == 0.0:
        return float("nan")
    share = singular / singular.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def _weights(pl_module: nn.Module) -> dict[str, Tensor]:
    """Layer -> weight that trains, biases and per-channel vectors left out."""
    return {
        name.removesuffix(".parametrizations.weight.original").removesuffix(".weight"): p
        for name, p in pl_module.named_parameters()
        if p.requires_grad and p.dim() > 1
    }


class ActivationHealth(pl.Callback):
    """Measures every site of the module's networks each ``every`` steps, from the first forward pass of that step, and
    every weight's update: ``update_ratio`` is ``|new - old| / |old|`` over that step.

    Values are logged as ``health/SITE/MEASURE``; ``history`` keeps them as rows ``(step, site, measure, value)`` and
    is saved with the checkpoint.

    Args:
        every: steps between measurements.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every
        self.history: list[tuple[int, str, str, float]] = []
        self._handles: list[Any] = []
        self._measured: dict[str, dict[str, float]] = {}
        self._before: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [(int(s), str(site), str(m), float(v)) for s, site, m, v in state_dict["history"]]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        self._measured = {}
        self._before = {name: weight.detach().clone() for name, weight in _weights(pl_module).items()}
        for name, module in pl_module.named_modules():
            if isinstance(module, ActivationModule) and any(p.requires_grad for p in _owner(pl_module, name).parameters()):
                self._handles.append(module.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in self._measured or not module.training:
                return
            assert isinstance(module, ActivationModule)
            measured = self._measured[name] = unit_health(module, args[0], output)
            if output.requires_grad:
                output.register_hook(_gradient_norm(measured))

        return hook

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._before:
            return
        for name, weight in _weights(pl_module).items():
            old = self._before[name]
            self._measured.setdefault(name, {})["update_ratio"] = float((weight.detach() - old).norm() / old.norm().clamp_min(1e-12))
        self._before = {}
        for handle in self._handles:
            handle.remove()
        self._handles = []
        step = trainer.global_step
        for site, measures in self._measured.items():
            for measure, value in measures.items():
                self.history.append((step, site, measure, value))
        values = {f"health/{site}/{m}": v for site, measures in self._measured.items() for m, v in measures.items()}
        # Straight to the loggers: these steps are not those at which the trainer writes what was logged.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


def _gradient_norm(measured: dict[str, float]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        measured.setdefault("gradient_norm", float(gradient.detach().float().norm()))

    return hook


def _owner(module: nn.Module, name: str) -> nn.Module:
    """The top-level network that a site belongs to (an averaged copy does not train, so its sites are not watched)."""
    return module.get_submodule(name.split(".")[0])
