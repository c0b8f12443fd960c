"""Named feature spaces for distances between image sets. A distance is only as meaningful as the name it carries."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.data.frames import as_float
from toolkit.errors import UserError, closest
from toolkit.files import atomic


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """A network whose features are compared.

    Attributes:
        name: what tables and reports call it: ``random``, ``trained``, ``inception``, or a timm model's name.
        network: maps ``(N, 3, H, W)`` in [-1, 1] to ``(N, D)``, in evaluation mode.
    """

    name: str
    network: nn.Module
    _kept: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def hash(self) -> str:
        """:func:`network_hash` of the network, which is taken not to change."""
        if "hash" not in self._kept:
            self._kept["hash"] = network_hash(self.network)
        return self._kept["hash"]

    def __str__(self) -> str:
        return f"{self.name} {self.hash}"


class RandomConv(nn.Module):
    """A fixed random convolutional network: 256 features, no download, the same on every machine.

    Three 3 x 3 convolutions (32, 64, 64 channels) with fixed He-normal weights, leaky ReLU and average pooling, then a
    2 x 2 grid of means. Random features see colour, texture and coarse layout, not identity or expression.
    """

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
        x = _at_most(x, 64)
        for i, weight in enumerate(self.weights):
            x = F.leaky_relu(F.conv2d(x, weight, padding=1), 0.2)
            if i < len(self.weights) - 1:
                x = F.avg_pool2d(x, 2)
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


def _at_most(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="area") if x.shape[-1] > side else x


class DenoisingAutoencoder(nn.Module):
    """A convolutional denoising autoencoder (Vincent et al. 2008) of 32 px images.

    Its features are the 64 numbers of its code, which say where on the data's manifold an image lies, and the logarithm of
    the reconstruction error in each of 4 x 4 parts of the image, which say how far off it lies: to the code alone white
    noise is an average image. Needs no labels, so it can be trained on any dataset, however few its people: see
    :func:`train_features`.
    """

    mean: Tensor
    std: Tensor

    SIDE, WIDTH, CODE = 32, 32, 64

    def __init__(self) -> None:
        super().__init__()
        w = self.WIDTH

        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 4, 2, 1), nn.GroupNorm(8, o), nn.SiLU()]

        def up(i: int, o: int) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, 1, 1), nn.GroupNorm(8, o), nn.SiLU()]

        self.encoder = nn.Sequential(*down(3, w), *down(w, 2 * w), *down(2 * w, 4 * w), nn.Flatten(), nn.Linear(64 * w, self.CODE))
        self.decoder = nn.Sequential(
            nn.Linear(self.CODE, 64 * w),
            nn.Unflatten(1, (4 * w, 4, 4)),
            *up(4 * w, 2 * w),
            *up(2 * w, w),
            *up(w, w),
            nn.Conv2d(w, 3, 3, 1, 1),
        )
        self.register_buffer("mean", torch.zeros(self.CODE + 16))
        self.register_buffer("std", torch.ones(self.CODE + 16))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1] -> ``(N, 80)``, standardised; other sizes are brought to 32 px first."""
        x = _at_most(x, self.SIDE)
        if x.shape[-1] < self.SIDE:
            x = F.interpolate(x, size=(self.SIDE, self.SIDE), mode="bilinear", align_corners=False)
        code = self.encoder(x)
        error = F.avg_pool2d((self.decoder(code) - x).square().mean(dim=1, keepdim=True), self.SIDE // 4)
        return (torch.cat([code, torch.log(error.flatten(1) + 1e-4)], dim=1) - self.mean) / self.std

    def reconstruct(self, x: Tensor) -> Tensor:
        """``(N, 3, 32, 32)`` -> its reconstruction."""
        return self.decoder(self.encoder(x))


def train_features(images: np.ndarray, *, steps: int | None = None, batch_size: int = 64, seed: int = 0) -> DenoisingAutoencoder:
    """Train the feature network of the dataset at hand on its real training frames.

    Args:
        images: ``(N, H, W, 3)`` uint8 real frames; none that a measure shall be blind to.
        steps: updates with Adam; by default 80 passes over the images, but at least 300 and at most 1500 updates.
        batch_size: images in each.
        seed: of weights, order, flips and noise; the same seed gives the same network.

    Returns:
        The network in evaluation mode, its features of zero mean and unit variance over ``images``.

    Raises:
        UserError: there is no image.
    """
    if not len(images):
        raise UserError("a feature network cannot be trained on no images")
    if steps is None:
        steps = int(np.clip(80 * len(images) / batch_size, 300, 1500))
    rng = np.random.default_rng([seed, 0xDAE])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DenoisingAutoencoder()
    small = torch.cat([_at_most(as_float(images[i : i + 512]), network.SIDE) for i in range(0, len(images), 512)])
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        batch = small[rng.integers(0, len(small), batch_size)]
        batch = torch.where(torch.from_numpy(rng.random(batch_size) < 0.5).view(-1, 1, 1, 1), batch.flip(3), batch)
        noise = torch.from_numpy(rng.standard_normal(batch.shape, dtype=np.float32))
        loss = F.mse_loss(network.reconstruct(batch + 0.2 * noise), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(part) for part in small.split(512)])
        # No feature shall count more because the decoder happened to need it larger.
        network.mean.copy_(found.mean(dim=0))
        network.std.copy_(found.std(dim=0, correction=0).clamp_min(1e-6))
    return network.requires_grad_(False)


def save_features(network: DenoisingAutoencoder, path: Path) -> None:
    """Write the weights of a trained feature network to ``path``."""
    with atomic(path) as temporary:
        torch.save(network.state_dict(), temporary)


class _Timm(nn.Module):
    """A timm backbone with its own input normalisation and size."""

    def __init__(self, name: str, weights: Path) -> None:
        super().__init__()
        import timm

        from toolkit.detector.networks import load_pretrained

        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}.{closest(name, timm.list_models())}")
        self.backbone = timm.create_model(name, pretrained=False, num_classes=0)
        load_pretrained(self.backbone, weights)
        config: dict[str, Any] = dict(self.backbone.pretrained_cfg)  # type: ignore[arg-type]
        self.side = int(config["input_size"][-1])
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1] -> ``(N, D)``; resized to the model's own size (bicubic, antialiased)."""
        if x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        mean, std = self.mean, self.std
        assert isinstance(mean, Tensor)
        assert isinstance(std, Tensor)
        return self.backbone(((x.clamp(-1, 1) + 1) / 2 - mean) / std)


class _Inception(nn.Module):
    """The Inception network of the published FID, as torch-fidelity ports it from TensorFlow, resizing included."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("inception features need torch-fidelity: pip install torch-fidelity") from error
        if not weights.is_file():
            raise UserError(
                f"the weights {weights} are not there; FID needs weights-inception-2015-12-05-6726825d.pth of the torch-fidelity project"
            )
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
        except Exception as error:
            # torch.load raises anything from KeyError to RuntimeError, depending on what the file really is.
            raise UserError(f"{weights} does not hold the weights of FID's Inception: {str(error).splitlines()[0][:200]}") from error

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1] -> ``(N, 2048)``."""
        return self.network(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))[0]


SPACES = "random, trained, inception@WEIGHTS, or MODEL@WEIGHTS with a timm model's name"


def feature_space(text: str, trained: Path | None = None) -> FeatureSpace:
    """The feature space that ``text`` names. Nothing is ever fetched: weights come from files.

    Args:
        text: ``random`` (:class:`RandomConv`), ``trained`` (:class:`DenoisingAutoencoder`), ``inception@FILE`` (the
            network of the published FID) or ``MODEL@FILE`` (a timm model).
        trained: weights of the trained network, as :func:`save_features` wrote them.

    Raises:
        UserError: an unknown form or name, or weights that are not there or do not fit.
    """
    name, at, file = text.partition("@")
    if text == "random":
        return random_space()
    if text == "trained":
        if trained is None or not trained.is_file():
            raise UserError(f"the trained feature network {trained or ''} is not there")
        network = DenoisingAutoencoder()
        network.load_state_dict(torch.load(trained, map_location="cpu", weights_only=True))
        return FeatureSpace("trained", network.eval().requires_grad_(False))
    if not at or not file:
        raise UserError(f"unknown feature space {text!r}; known: {SPACES}")
    make: Callable[[Path], nn.Module] = _Inception if name == "inception" else functools.partial(_Timm, name)
    return FeatureSpace(name, make(Path(file).expanduser()).eval().requires_grad_(False))


def network_hash(network: nn.Module) -> str:
    """The first 12 hex digits of SHA-256 over the network's weights, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def random_space() -> FeatureSpace:
    """The space of :class:`RandomConv`, one for the process."""
    return FeatureSpace("random", RandomConv().eval())


@torch.no_grad()
def extract(network: nn.Module, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Features of ``(N, H, W, 3)`` uint8 images as ``(N, D)`` float64."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    parts = [network(as_float(images[i : i + batch_size]).to(device)).cpu() for i in range(0, len(images), batch_size)]
    return torch.cat(parts).double().numpy()
