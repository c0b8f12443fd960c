"""The activation module that computes with Triton kernels where it can, and as its formula elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.activations.declare import Activation
from toolkit.activations.module import ActivationModule
from toolkit.activations.spec import ActivationSpec, Value
from toolkit.errors import UserError
from toolkit_triton.formula import MAX_PARAMETERS, NoTriton, Scalars, write

log = logging.getLogger("toolkit")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_written: dict[Any, Scalars | str] = {}


def scalars_of(activation: Activation, values: dict[str, Value], learned: tuple[str, ...]) -> Scalars:
    """The scalar functions of an activation at these fixed parameters, made once in a process.

    Raises:
        UserError: it has no Triton version; the message says why.
    """
    key = (id(activation.formula), activation.name, tuple((n, v) for n, v in values.items() if n not in learned), learned)
    if key not in _written:
        try:
            if len(learned) > MAX_PARAMETERS:
                raise NoTriton(f"it has more than {MAX_PARAMETERS} learned parameters")
            _written[key] = write(activation, values, learned)
        except NoTriton as error:
            _written[key] = str(error)
    found = _written[key]
    if isinstance(found, str):
        raise UserError(found)
    return found


def triton_version(activation: Activation) -> Activation:
    """``activation`` with its Triton implementation.

    Raises:
        UserError: it has none; the message says why.
    """
    values, learned = activation.configure(ActivationSpec(activation.name))
    scalars_of(activation, values, learned)
    return dataclasses.replace(activation, implementation=TritonActivation)


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (``TRITON_INTERPRET=1`` at import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def available() -> bool:
    """Whether kernels can run in this process: with Triton, and a GPU or its interpreter. Says so once where they cannot."""
    if importlib.util.find_spec("triton") is None:
        why = "Triton is not installed"
    elif not torch.cuda.is_available() and not interpreting():
        why = "there is no GPU"
    else:
        return True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("triton activations run as plain PyTorch formulas: %s", why)
    return False


@functools.cache
def _no_parameters(device: torch.device) -> Tensor:
    return torch.empty((0, 1), device=device)


class TritonActivation(ActivationModule):
    """An activation at one site, by Triton kernels.

    On a CPU, under ``torch.compile`` (whose compiler fuses the formula itself), in float64 and for subclasses of
    ``Tensor`` it computes the formula, like any :class:`~toolkit.activations.module.ActivationModule`.
    """

    fusible = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scalars = scalars_of(self.activation, self.values, self.learned)
        available()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "scalars"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scalars = scalars_of(self.activation, self.values, self.learned)

    @classmethod
    def conformance(cls, activation: Activation, spec: ActivationSpec) -> str:
        """Compile its kernels ahead of time, and run them in Triton's interpreter against float64; what went wrong."""
        if importlib.util.find_spec("triton") is None:
            return ""
        arguments = [sys.executable, "-m", "toolkit_triton.conform", f"triton/{activation.name}", str(spec)]
        for interpret in ("0", "1"):
            env = {**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                return (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["the process failed"])[-1]
        return ""

    @classmethod
    def source(cls, activation: Activation, spec: ActivationSpec) -> str:
        """The scalar Triton functions that the kernels are compiled with."""
        return scalars_of(activation, *activation.configure(spec)).source

    def can_fuse(self, x: Any) -> bool:
        """Whether the kernels take ``x``."""
        return (
            not torch.compiler.is_compiling()
            and type(x) in (Tensor, nn.Parameter)
            and (x.is_cuda or (interpreting() and x.device.type == "cpu"))
            and x.dtype in DTYPES
            and (x.dim() > 1 or not self.spec.per_channel)
            and available()
        )

    def _parameters_tensor(self, x: Tensor) -> Tensor:
        """The learned parameters as ``(P, 1)`` or ``(P, C)`` float32."""
        if not self.learned:
            return _no_parameters(x.device)
        bounded = [self._bounded(n).float() for n in self.learned]
        return bounded[0].view(1, -1) if len(bounded) == 1 else torch.stack(bounded)

    def compute(self, x: Tensor) -> Tensor:
        """The function alone, of an ordinary tensor."""
        if self.scalars.identity or not self.can_fuse(x):
            return super().compute(x)
        from toolkit_triton.ops import activate

        return activate(self.scalars, x, None, None, self._parameters_tensor(x), self.channel_dim % max(x.dim(), 1))

    def bias_act(self, x: Tensor, bias: Tensor) -> Tensor:
        """``f(x + bias)`` by one kernel; backward keeps one tensor."""
        if not self.can_fuse(x) or x.dim() < 2:
            return super().bias_act(x, bias)
        from toolkit_triton.ops import activate

        return activate(self.scalars, x, bias, None, self._parameters_tensor(x), 1)

    def add_act(self, x: Tensor, residual: Tensor) -> Tensor:
        """``f(x + residual)`` by one kernel; backward keeps one tensor."""
        same = x.shape == residual.shape and x.dtype == residual.dtype and x.device == residual.device
        if not same or not self.can_fuse(x):
            return super().add_act(x, residual)
        from toolkit_triton.ops import activate

        return activate(self.scalars, x, None, residual, self._parameters_tensor(x), self.channel_dim % max(x.dim(), 1))

    def norm_act(self, x: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
        """``f(norm(x) + residual)``; backward keeps x and two numbers per channel (and one tensor for a residual).

        Equal to ``nn.BatchNorm2d`` and its kin (``SyncBatchNorm`` over its process group) followed by the activation, with
        the running statistics moved as these do.
        """
        if (
            not isinstance(norm, _BatchNorm)
            or not self.can_fuse(x)
            or x.dim() < 2
            or x.numel() == 0
            or (norm.weight is None) != (norm.bias is None)
            or (residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype))
        ):
            return super().norm_act(x, norm, residual)
        from toolkit_triton.launch import Running
        from toolkit_triton.ops import norm_activate

        norm._check_input_dim(x)
        running = statistics = group = None
        if norm.training and norm.track_running_stats:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            if norm.running_mean is not None and norm.running_var is not None:
                running = Running(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)
        if not norm.training and norm.running_mean is not None and norm.running_var is not None:
            statistics = (norm.running_mean, norm.running_var)
        elif isinstance(norm, nn.SyncBatchNorm) and norm.training:
            group = _group_of(norm)
        if statistics is None and group is None and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        parameters = self._parameters_tensor(x)
        return norm_activate(
            self.scalars, x, residual, norm.weight, norm.bias, statistics, parameters, norm.eps, running=running, group=group
        )


def _group_of(norm: nn.SyncBatchNorm) -> Any:
    """The process group over which ``norm`` takes its statistics; None for one process."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
