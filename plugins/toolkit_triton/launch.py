"""Launching the generic kernels: how a tensor is seen, how it is cut into tiles, and which kernel does what."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from toolkit.files import write_text
from toolkit_triton import kernels
from toolkit_triton.formula import Scalars

STREAM_TILE = 2048
"""Elements of a tile of kernels that only stream: 16 a thread."""
SUM_TILE = 1024
"""The same with sums over channels, whose running sums take registers: 8 a thread."""
WARPS = 4
SUM_WARPS = 8
"""With sums that take more registers, over learned parameters and in the second derivative."""
MAX_SPLITS = 1024
OPTIONS = {"enable_fp_fusion": True}
"""Multiply and add in one rounding, whatever the version of Triton takes for granted."""


@functools.cache
def functions(scalars: Scalars) -> ModuleType:
    """The Triton functions of an activation, imported from the file that its source is kept in.

    Triton reads a function's source from its file, so there has to be one: in ``TOOLKIT_CACHE``, else in
    ``~/.cache/deepfake-toolkit``, else in the temporary folder.
    """
    path = source_file(scalars)
    name = f"toolkit_triton_generated_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_file(scalars: Scalars) -> Path:
    """Write the source of an activation's functions where it is kept, once; returns the file."""
    spec, _, digest = scalars.key.rpartition("@")
    file = f"{spec.split('(')[0]}_{digest}.py"
    home = Path(os.environ.get("TOOLKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepfake-toolkit")
    for folder in (home / "triton", Path(tempfile.gettempdir()) / f"deepfake-toolkit-{os.getuid()}" / "triton"):
        path = folder / file
        try:
            if not path.is_file() or path.read_text(encoding="utf-8") != scalars.source:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(path, scalars.source)
        except OSError:
            continue
        return path
    raise OSError(f"neither {home} nor the temporary folder can be written; set TOOLKIT_CACHE to a folder that can")


@dataclass(frozen=True)
class View:
    """A tensor as the kernels see it: ``(N, C, S)``, or ``(N, C)`` with the channels last; and how it is cut.

    Attributes:
        n, c, s: samples, channels, positions; with ``last`` positions count as samples.
        last: whether channels are adjacent in memory.
        rows, columns: of a tile.
        blocks: groups of channels that a program handles together.
        tiles: of one block.
    """

    n: int
    c: int
    s: int
    last: bool
    rows: int
    columns: int
    blocks: int
    tiles: int

    def cut(self, many_sums: bool = False) -> dict[str, Any]:
        """Keyword arguments of every kernel."""
        return {"LAST": self.last, "R": self.rows, "K": self.columns, "num_warps": SUM_WARPS if many_sums else WARPS, **OPTIONS}

    def splits(self, device: torch.device, summing: bool) -> tuple[int, int]:
        """Splits of a block, and tiles in each: one tile a split, or enough programs to fill the device when summing."""
        if not summing:
            return self.tiles, 1
        each = triton.next_power_of_2(max(1, min(self.tiles, -(-self.tiles * self.blocks // _programs(device)))))
        while -(-self.tiles // each) > MAX_SPLITS:
            each *= 2
        return -(-self.tiles // each), each


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=1024)
def _view(n: int, c: int, s: int, tile: int) -> View:
    last = s == 1 and c > 1
    if last:
        columns = min(triton.next_power_of_2(c), 128)
        rows = min(tile // columns, triton.next_power_of_2(n))
        return View(n, c, s, True, rows, columns, -(-c // columns), -(-n // rows))
    columns = min(triton.next_power_of_2(s), tile)
    rows = min(tile // columns, triton.next_power_of_2(n))
    return View(n, c, s, False, rows, columns, c, -(-n // rows) * -(-s // columns))


def view(x: Tensor, channel_dim: int | None, tile: int = STREAM_TILE) -> View:
    """How kernels see ``x``, dense in memory; ``channel_dim`` is None where channels do not matter."""
    if channel_dim is None or x.shape[channel_dim] == 1:
        return _view(1, 1, x.numel(), tile)
    # In a tensor without gaps the stride of a dimension is the size of all that lies inside it.
    c, s = x.shape[channel_dim], x.stride(channel_dim)
    return _view(x.numel() // (c * s), c, s, tile)


def dense(x: Tensor) -> Tensor:
    """``x`` itself if its memory has no gaps and no overlaps, else a copy in the same order of dimensions."""
    like = torch.empty_like(x, device="meta") if x.device.type == "meta" else torch.empty_like(x)
    return x if like.stride() == x.stride() else like.copy_(x)


def as_laid_out(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the memory layout of ``x``, copied only if it has another."""
    # The stride of a dimension of one means nothing.
    if t.stride() == x.stride() or all(n == 1 or a == b for n, a, b in zip(x.shape, t.stride(), x.stride(), strict=True)):
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if x.is_cuda and torch.cuda.current_device() != x.device.index:
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _p(parameters: Tensor) -> dict[str, Any]:
    return {"NP": parameters.shape[0], "PER_CHANNEL": parameters.shape[1] > 1}


def _channels(parameters: Tensor, channel_dim: int, needed: bool) -> int | None:
    return channel_dim if needed or parameters.shape[1] > 1 else None


def forward(
    scalars: Scalars,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    parameters: Tensor,
    channel_dim: int,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, float] | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``value(x + bias + residual)``, or ``value(batch_norm(x) + residual)`` with ``norm = (mean, variance, weight, eps)``.

    Args:
        x: dense; ``residual`` is laid out like it.
        bias: ``(C,)``; with ``norm`` that of the norm.
        parameters: ``(P, 1)`` or ``(P, C)`` float32.
        keep: also return the argument of the function.
    """
    y = torch.empty_like(x)
    z = torch.empty_like(x) if keep else None
    if x.numel() == 0:
        return y, z
    v = view(x, _channels(parameters, channel_dim, bias is not None or norm is not None))
    mean, variance, weight, eps = norm or (x, x, None, 0.0)
    f = functions(scalars)
    with _on(x):
        kernels.forward_kernel[(v.blocks * v.tiles,)](
            x, x if residual is None else residual, y, y if z is None else z, mean, variance,
            x if weight is None else weight, x if bias is None else bias, parameters, eps, v.n, v.c, v.s, v.blocks,
            VALUE=f.value, **_p(parameters), NORM=norm is not None, AFFINE=bias is not None, RESIDUAL=residual is not None,
            KEEP=keep, **v.cut(),
        )  # fmt: skip
    return y, z


def backward(
    scalars: Scalars,
    dy: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    parameters: Tensor,
    channel_dim: int,
    *,
    from_output: bool,
    sum_g: bool,
    sum_p: bool,
) -> tuple[Tensor, Tensor]:
    """``g = dy * dx(z)``, and its sums: ``(Q, C)`` of g per channel (``sum_g``), then of each parameter (``sum_p``).

    Args:
        dy: laid out like ``saved``.
        saved: the output with ``from_output``, else what ``bias`` is added to; None where the slope is constant.
    """
    g = torch.empty_like(dy)
    quantities = int(sum_g) + int(sum_p) * parameters.shape[0]
    channels = _channels(parameters, channel_dim, sum_g or (bias is not None and not from_output))
    if dy.numel() == 0:
        return g, dy.new_zeros((quantities, 1 if channels is None else dy.shape[channels]), dtype=torch.float32)
    v = view(dy, channels, SUM_TILE if quantities else STREAM_TILE)
    splits, each = v.splits(dy.device, quantities > 0)
    sums = torch.empty((quantities, splits, v.c), dtype=torch.float32, device=dy.device)
    f = functions(scalars)
    slope = "none" if saved is None else "saved" if from_output else "input"
    s = dy if saved is None else saved
    with _on(dy):
        kernels.backward_kernel[(v.blocks * splits,)](
            dy, s, s, s, g, g, sums, s, s, s, s if bias is None else bias, parameters, 0.0, v.n, v.c, v.s, v.blocks, splits,
            DX=f.dx_y if from_output else f.dx, BY=f.by_parameters, **_p(parameters), NORM=False,
            AFFINE=bias is not None and not from_output, RESIDUAL=False, SLOPE_FROM=slope, WRITE_G=True, WRITE_DX=False,
            SUM_G=sum_g, SUM_P=sum_p, TILES=each, **v.cut(sum_p),
        )  # fmt: skip
    return g, sums.sum(1)


def second(
    scalars: Scalars,
    dy: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    parameters: Tensor,
    u: Tensor | None,
    u_bias: Tensor | None,
    u_parameters: Tensor,
    channel_dim: int,
    *,
    from_output: bool,
    sum_s: bool,
    sum_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`backward`: by dy, by what was saved, and the sums ``(Q, C)`` of the latter and by parameters.

    Args:
        u, u_bias, u_parameters: gradients of g, of its sum per channel ``(C,)``, and of the parameters' sums.
    """
    ddy, ds = torch.empty_like(dy), torch.empty_like(saved)
    quantities = int(sum_s) + int(sum_p) * parameters.shape[0]
    channels = _channels(parameters, channel_dim, sum_s or u_bias is not None or bias is not None)
    if dy.numel() == 0:
        return ddy, ds, dy.new_zeros((quantities, 1 if channels is None else dy.shape[channels]), dtype=torch.float32)
    v = view(saved, channels, SUM_TILE // 2 if quantities else STREAM_TILE)
    splits, each = v.splits(dy.device, quantities > 0)
    sums = torch.empty((quantities, splits, v.c), dtype=torch.float32, device=dy.device)
    f = functions(scalars)
    with _on(dy):
        kernels.second_kernel[(v.blocks * splits,)](
            dy, saved, dy if u is None else u, dy if u_bias is None else u_bias, u_parameters, ddy, ds, sums,
            dy if bias is None else bias, parameters, v.n, v.c, v.s, v.blocks, splits,
            SECOND_DY=f.second_dy_y if from_output else f.second_dy, SECOND_DX=f.second_dx_y if from_output else f.second_dx,
            SECOND_P=f.second_parameters, **_p(parameters), BIAS=bias is not None, U=u is not None, U_BIAS=u_bias is not None,
            SUM_S=sum_s, SUM_P=sum_p, TILES=each, **v.cut(quantities > 0),
        )  # fmt: skip
    return ddy, ds, sums.sum(1)


@dataclass(frozen=True)
class Running:
    """Running statistics that a norm in training moves: by ``momentum``, or cumulatively where that is None."""

    mean: Tensor
    variance: Tensor
    batches: Tensor | None
    momentum: float | None


def statistics(x: Tensor, channel_dim: int, running: Running | None, group: Any = None) -> tuple[Tensor, Tensor | None]:
    """Mean and biased variance per channel, ``(2, C)`` float32.

    With a process group they are taken over its processes together, and the number of elements per channel, of all, is
    returned too.
    """
    v = view(x, channel_dim, SUM_TILE)
    splits, each = v.splits(x.device, True)
    parts = torch.empty((3, splits, v.c), dtype=torch.float32, device=x.device)
    with _on(x):
        kernels.statistics_kernel[(v.blocks * splits,)](x, parts, v.n, v.c, v.s, v.blocks, splits, TILES=each, **v.cut())
    if group is None:
        return _join(parts, running), None
    import torch.distributed as dist

    own = torch.cat([_join(parts, None).flatten(), torch.full((1,), x.numel() / v.c, device=x.device)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    everyone = torch.stack(gathered)
    counts = everyone[:, -1:]
    mean, variance = everyone[:, :-1].view(-1, 2, v.c).unbind(1)
    return _join(torch.stack([counts.expand_as(mean), mean, variance * counts]), running), counts.sum(0)


def _join(parts: Tensor, running: Running | None) -> Tensor:
    _, splits, c = parts.shape
    out = torch.empty((2, c), dtype=torch.float32, device=parts.device)
    rows = triton.next_power_of_2(splits)
    columns = min(triton.next_power_of_2(c), max(1, 2048 // rows), 64)
    mean, variance, batches, momentum = (out, out, out, 0.0)
    if running is not None:
        mean, variance = running.mean, running.variance
        batches = out if running.batches is None else running.batches
        momentum = 0.0 if running.momentum is None else running.momentum
    with _on(parts):
        kernels.join_kernel[(-(-c // columns),)](
            parts, out, mean, variance, batches, momentum, splits, c, RUNNING=running is not None,
            CUMULATIVE=running is not None and running.momentum is None, ROWS=rows, K=columns, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return out


def norm_backward(
    scalars: Scalars,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    parameters: Tensor,
    eps: float,
    channel_dim: int,
    *,
    training: bool,
    has_residual: bool,
    sum_g: bool,
    sum_p: bool,
    count: Tensor | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of :func:`forward` with a norm: by x, by the residual, and sums per channel: g, g xhat, each parameter.

    Args:
        y: the output, where the slope is to be had from it (``residual`` is not needed then).
        mean, variance: that the norm used.
        training: whether these came from x itself.
        sum_g: sums of g and g xhat are wanted; in training they are needed.
        count: elements per channel in all processes of ``group``.
    """
    sum_g = sum_g or training
    quantities = 2 * int(sum_g) + int(sum_p) * parameters.shape[0]
    v = view(x, channel_dim, SUM_TILE if quantities else STREAM_TILE)
    splits, each = v.splits(x.device, quantities > 0)
    sums = torch.empty((quantities, splits, v.c), dtype=torch.float32, device=x.device)
    f = functions(scalars)
    dx = torch.empty_like(x)
    g = torch.empty_like(x) if has_residual else None
    with _on(x):
        kernels.backward_kernel[(v.blocks * splits,)](
            dy, x, x if residual is None else residual, x if y is None else y, dx if g is None else g, dx, sums, mean,
            variance, x if weight is None else weight, x if bias is None else bias, parameters, eps, v.n, v.c, v.s,
            v.blocks, splits, DX=f.dx if y is None else f.dx_y, BY=f.by_parameters, **_p(parameters), NORM=True,
            AFFINE=weight is not None, RESIDUAL=residual is not None, SLOPE_FROM="input" if y is None else "saved",
            WRITE_G=g is not None, WRITE_DX=not training, SUM_G=sum_g, SUM_P=sum_p, TILES=each, **v.cut(sum_p),
        )  # fmt: skip
        totals = sums.sum(1)
        if not training:
            return dx, g, totals
        everywhere = totals[:2]
        if group is not None:
            import torch.distributed as dist

            everywhere = everywhere.clone()
            dist.all_reduce(everywhere, group=group)
        v = view(x, channel_dim, SUM_TILE)
        kernels.norm_dx_kernel[(v.blocks * v.tiles,)](
            dy, x, dx if g is None else g, dx, everywhere, mean if count is None else count, mean, variance,
            x if weight is None else weight, x if bias is None else bias, parameters, eps, float(v.n * v.s), v.n, v.c, v.s,
            v.blocks, DX=f.dx, **_p(parameters), AFFINE=weight is not None, HAVE_G=g is not None, COUNTED=count is not None,
            **v.cut(),
        )  # fmt: skip
    return dx, g, totals
