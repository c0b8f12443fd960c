"""What several processes of one training must share: statistics of batch norm, and results of an evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.activations.fuse import fused_again


def from_all_processes(parts: list[Any]) -> list[Any]:
    """``parts`` of every process, interleaved: what was dealt out item by item comes back in about its order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return parts
    gathered: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, parts)
    most = max(len(own) for own in gathered)
    return [own[place] for place in range(most) for own in gathered if place < len(own)]


class _Sum(torch.autograd.Function):
    """Sum over all processes. The gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient.contiguous())


def _normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Batch norm of ``(N, C, ...)`` over the batches of all processes, in float32 at least."""
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    wide = x if x.dtype == torch.float64 else x.float()
    sums = _Sum.apply(torch.cat([wide.sum(dims), wide.new_tensor([x.numel() / x.shape[1]])]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    centred = wide - mean.view(shape)
    variance = _Sum.apply((centred**2).sum(dims)) / count
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum  # type: ignore[arg-type]
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(variance * count / (count - 1), share)
    result = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        result = result * norm.weight.view(shape) + norm.bias.view(shape)
    return result.to(x.dtype)


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm of ``network`` take its statistics over all processes; names and parameters stay the same.

    On GPUs these are PyTorch's ``SyncBatchNorm`` (or timm's, for norms with an activation). That refuses CPUs, where each
    norm gets a forward of its own that reduces with gloo.

    Returns:
        The network; it may be another object if it was a norm itself.
    """
    if device.type != "cpu":
        from timm.layers import convert_sync_batchnorm

        with fused_again(network):
            converted: nn.Module = convert_sync_batchnorm(network)
        return converted
    for module in network.modules():
        if not isinstance(module, _BatchNorm):
            continue
        # timm's norms with an activation (BatchNormAct2d) go on with these two.
        after = [getattr(module, name) for name in ("drop", "act") if hasattr(module, name)]

        def forward(x: Tensor, norm: _BatchNorm = module, after: list[nn.Module] = after) -> Tensor:
            y = _normalise(norm, x)
            for part in after:
                y = part(y)
            return y

        module.forward = forward  # type: ignore[method-assign, assignment]
    return network
