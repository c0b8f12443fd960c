"""Named feature spaces for distances between image sets. A distance is only as meaningful as the name it carries."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomConv(nn.Module):
    """A fixed random convolutional network: 256 features, no download, the same on every machine.

    Three 3 x 3 convolutions (32, 64, 64 channels) with fixed He-normal weights, leaky ReLU and average pooling, then a
    2 x 2 grid of means. Random features see colour, texture and coarse layout, not identity or expression.
    """

    name = "random-conv256"

    def __init__(self, seed: int = 0x70616C) -> None:
        super().__init__()
        # NumPy's generator: its stream is fixed for good, PyTorch's may change between versions.
        rng = np.random.default_rng(seed)
        widths = [3, 32, 64, 64]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(rng.standard_normal((o, i, 3, 3)).astype(np.float32) * math.sqrt(2 / (9 * i))), False)
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1] -> ``(N, 256)``; images above 64 px are reduced to 64 by area first."""
        if x.shape[-1] > 64:
            x = F.interpolate(x, size=(64, 64), mode="area")
        for i, weight in enumerate(self.weights):
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2)
            if i < len(self.weights) - 1:
                x = F.avg_pool2d(x, 2)
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


def network_hash(network: nn.Module) -> str:
    """The first 12 hex digits of SHA-256 over the network's weights, in order."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def random_conv() -> RandomConv:
    """The process's instance of :class:`RandomConv`."""
    return RandomConv().eval()


@torch.no_grad()
def extract(network: nn.Module, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Features of ``(N, H, W, 3)`` uint8 images as ``(N, D)`` float64."""
    from toolkit.data.frames import to_float

    device = next(network.parameters()).device
    parts = [
        network(to_float(torch.from_numpy(np.ascontiguousarray(images[i : i + batch_size]))).to(device)).cpu()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts).double().numpy()
