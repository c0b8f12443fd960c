"""DCGAN (Radford et al. 2016, arXiv:1511.06434) with every activation, normalisation and upsampling an option."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as apply_spectral_norm

from toolkit.activations.assign import Site
from toolkit.activations.module import ActivationModule
from toolkit.errors import UserError

Upsampling = Literal["transposed", "nearest", "bilinear", "zero"]
Norm = Literal["batch", "instance", "layer", "none"]


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A normalisation layer over ``(N, channels, H, W)``; ``layer`` normalises over channels and positions together."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "layer":
        return nn.GroupNorm(1, channels)
    return nn.Identity()


class ZeroInsertion(nn.Module):
    """Upsampling by two with zeros between the pixels: a transposed convolution without its filter."""

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, C, 2H, 2W)``."""
        n, c, h, w = x.shape
        out = x.new_zeros((n, c, 2 * h, 2 * w)).contiguous(memory_format=torch.channels_last)
        out[:, :, ::2, ::2] = x
        return out


class Project(nn.ConvTranspose2d):
    """The generator's first layer: a latent vector to a 4 x 4 map.

    A 4 x 4 transposed convolution over one pixel, computed as the matrix product that it is; weights are stored as in
    the DCGAN example.
    """

    def __init__(self, latent: int, channels: int) -> None:
        super().__init__(latent, channels, 4, 1, 0, bias=False)

    def forward(self, z: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``(N, latent)`` -> ``(N, channels, 4, 4)``."""
        # Output positions come first, so that the product is channels-last without a copy.
        weight = self.weight.permute(2, 3, 1, 0).reshape(-1, self.in_channels)
        return F.linear(z, weight).view(-1, 4, 4, self.out_channels).permute(0, 3, 1, 2)


class Score(nn.Conv2d):
    """The discriminator's last layer: a 4 x 4 map to one number.

    A convolution over all positions at once, computed as the matrix product that it is; weights as in the DCGAN example.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, 4, 4)`` -> ``(N, 1)``."""
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), self.weight.permute(0, 2, 3, 1).flatten(1))


def upsample(kind: Upsampling, inputs: int, outputs: int, *, bias: bool) -> nn.Sequential | nn.ConvTranspose2d:
    """A layer that doubles height and width: ``(N, inputs, H, W)`` -> ``(N, outputs, 2H, 2W)``."""
    if kind == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=bias)
    grow: nn.Module = ZeroInsertion()
    if kind != "zero":
        grow = nn.Upsample(scale_factor=2, mode=kind, align_corners=False if kind == "bilinear" else None)
    return nn.Sequential(grow, nn.Conv2d(inputs, outputs, 3, 1, 1, bias=bias))


class Block(nn.Module):
    """Convolution, normalisation, activation."""

    def __init__(self, conv: nn.Module, norm: nn.Module, default: str) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, Site(default)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def _levels(image_size: int) -> int:
    levels = int(math.log2(image_size)) if image_size > 0 else 0
    if image_size != 2**levels or not 16 <= image_size <= 256:
        raise UserError(f"image_size is 16, 32, 64, 128 or 256, not {image_size}")
    return levels - 2


class Generator(nn.Module):
    """DCGAN generator.

    Sites: ``up1.act`` (4 x 4) to ``upK.act``, and ``output``. For 64 px K is 4 and the layers are those of the PyTorch
    DCGAN example.

    Args:
        image_size: side of the images: 16 to 256, a power of two.
        latent: length of the latent vector.
        width: channels before the last layer; each earlier layer has twice as many.
        upsampling: ``transposed`` convolution, or ``nearest``, ``bilinear`` or ``zero`` insertion before a convolution.
        norm: normalisation before each activation.
        spectral_norm: divide every weight by its largest singular value (Miyato et al. 2018).
    """

    def __init__(
        self,
        image_size: int = 64,
        latent: int = 100,
        width: int = 64,
        upsampling: Upsampling = "transposed",
        norm: Norm = "batch",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if latent < 1 or width < 1:
            raise UserError(f"latent and width must be at least 1, not {latent} and {width}")
        self.latent, self.image_size = latent, image_size
        levels = _levels(image_size)
        channels = [width * 2 ** (levels - 1 - i) for i in range(levels)]
        bias = norm == "none"
        self.up1 = Block(Project(latent, channels[0]), make_norm(norm, channels[0]), "relu")
        for i in range(1, levels):
            conv = upsample(upsampling, channels[i - 1], channels[i], bias=bias)
            self.add_module(f"up{i + 1}", Block(conv, make_norm(norm, channels[i]), "relu"))
        self.rgb = upsample(upsampling, channels[-1], 3, bias=upsampling != "transposed")
        self.output = Site("tanh")
        self.depth = levels
        self._range = (-1.0, 1.0)
        if spectral_norm:
            _add_spectral_norm(self)

    def example(self) -> Tensor:
        """An input for a traced forward pass."""
        return torch.zeros(2, self.latent)

    def forward(self, z: Tensor) -> Tensor:
        """``(N, latent)`` standard normal -> ``(N, 3, size, size)``; in [-1, 1] if ``output`` is bounded.

        A bounded output activation with another range, such as sigmoid, is mapped to [-1, 1].
        """
        x = z
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"up{i}")(x)
        x = self.output(self.rgb(x))
        low, high = self._range
        if (low, high) != (-1.0, 1.0):
            x = (x - low) * (2.0 / (high - low)) - 1.0
        return x

    def on_activations_set(self) -> None:
        """Called by ``apply_rules``: takes note of the output activation's range."""
        low, high = self.output.output_range() if isinstance(self.output, ActivationModule) else (-1.0, 1.0)
        self._range = (low, high) if math.isfinite(low) and math.isfinite(high) and high > low else (-1.0, 1.0)


class Discriminator(nn.Module):
    """DCGAN discriminator. Sites: ``down1.act`` to ``downK.act``, and ``output`` (``identity`` leaves logits).

    Args:
        image_size: side of the images: 16 to 256, a power of two.
        width: channels after the first layer; each later layer has twice as many.
        norm: normalisation of all but the first layer. ``batch`` mixes the samples of a batch, which gradient penalties
            do not allow.
        spectral_norm: divide every weight by its largest singular value.
    """

    def __init__(self, image_size: int = 64, width: int = 64, norm: Norm = "batch", spectral_norm: bool = False) -> None:
        super().__init__()
        levels = _levels(image_size)
        self.image_size, self.depth = image_size, levels
        inputs = 3
        for i in range(levels):
            outputs = width * 2**i
            kind: Norm = "none" if i == 0 else norm
            conv = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=kind == "none" and i > 0)
            self.add_module(f"down{i + 1}", Block(conv, make_norm(kind, outputs), "leaky_relu(negative_slope=0.2)"))
            inputs = outputs
        self.score = Score(inputs)
        self.output = Site("identity")
        if spectral_norm:
            _add_spectral_norm(self)

    def example(self) -> Tensor:
        """An input for a traced forward pass."""
        return torch.zeros(2, 3, self.image_size, self.image_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, size, size)`` in [-1, 1] -> ``(N,)`` scores, higher for real."""
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"down{i}")(x)
        return self.output(self.score(x)).flatten()


def _add_spectral_norm(network: nn.Module) -> None:
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            apply_spectral_norm(module, dim=1 if isinstance(module, nn.ConvTranspose2d) else 0)


def initialise(network: nn.Module, how: Literal["dcgan", "gain"] = "dcgan") -> None:
    """Initialise weights in place, in module order.

    ``dcgan``: N(0, 0.02) for convolutions and N(1, 0.02) for norm weights (Radford et al. 2016, section 4).
    ``gain``: N(0, g^2 / fan_in) for convolutions, with the gain g of the activation that follows in its block (He et al. 2015).
    """
    gains: dict[int, float] = {}
    for module in network.modules():
        if isinstance(module, Block) and isinstance(module.act, ActivationModule):
            gains.update({id(m): module.act.gain() for m in module.conv.modules()})
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            weight = module.parametrizations.weight.original if hasattr(module, "parametrizations") else module.weight  # type: ignore[union-attr]
            std = 0.02
            if how == "gain":
                # Of a transposed convolution with stride s only k^2 / s^2 taps reach each output.
                taps = math.prod(module.kernel_size) / (math.prod(module.stride) if isinstance(module, nn.ConvTranspose2d) else 1)
                taps = 1 if isinstance(module, Project) else taps
                std = gains.get(id(module), 1.0) / math.sqrt(module.in_channels * taps)
            nn.init.normal_(weight, 0.0, std)  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
