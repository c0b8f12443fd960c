"""The detector's network: a front end, a timm backbone, a linear head with a site for its activation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.activations.assign import Site
from toolkit.errors import UserError, closest

FrontEnd = Literal["rgb", "residual", "spectrum"]
Stem = Literal["auto", "dense", "model"]
SPECTRUM = "spectrum-linear"
DENSE_BELOW = 96


class Rgb(nn.Module):
    """The image as it is."""

    channels = 3

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [-1, 1], unchanged."""
        return x


class Residual(nn.Module):
    """What nearest-neighbour down- and upsampling cannot restore: ``x - up(down(x))``, times 2/3.

    Neighbouring-pixel relationships of Tan et al. 2024 (arXiv:2312.10461, eq. 4, and the scale of its code): the trace that
    a generator's last upsampling leaves, with most of the content gone.
    """

    channels = 3

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` -> the same shape; an odd last row or column is compared with its neighbour."""
        down = x[:, :, ::2, ::2]
        up = down.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, : x.shape[2], : x.shape[3]]
        return (x - up) * (2.0 / 3.0)


class LogSpectrum(nn.Module):
    """Azimuthally averaged log power spectrum of the grey image (Durall et al. 2020, eq. 3)."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.bins = image_size // 2 + 1
        y, x = torch.meshgrid(torch.arange(image_size), torch.arange(image_size), indexing="ij")
        radius = torch.hypot((x - image_size // 2).float(), (y - image_size // 2).float()).round().long()
        inside = radius <= image_size // 2
        rings = torch.zeros(self.bins, image_size * image_size)
        rings[radius[inside], torch.arange(image_size * image_size).view(image_size, image_size)[inside]] = 1.0
        self.register_buffer("rings", rings / rings.sum(dim=1, keepdim=True), persistent=False)
        self.norm = nn.BatchNorm1d(self.bins, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [-1, 1] -> ``(N, S // 2 + 1)`` standardised log power."""
        with torch.autocast(x.device.type, enabled=False):
            grey = (x.float() * x.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(1, 3, 1, 1)).sum(dim=1)
            power = torch.fft.fftshift(torch.fft.fft2(grey), dim=(1, 2)).abs().square().flatten(1)
            rings = self.rings
            assert isinstance(rings, Tensor)
            return self.norm(torch.log(power @ rings.T + 1e-8))


def _dense_stem(backbone: nn.Module, name: str) -> None:
    """Take stride and pooling out of a backbone's stem, in place: small frames have no pixels to give away."""
    stem = getattr(backbone, "conv1", None) or getattr(backbone, "conv_stem", None)
    if stem is None:
        raise UserError(
            f"stem: dense is known for ResNet- and EfficientNet-like backbones, ConvNeXt and ViT, not for {name}; use stem: model"
        )
    for module in stem.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    if hasattr(backbone, "maxpool"):
        backbone.maxpool = nn.Identity()


def make_backbone(name: str, image_size: int, stem: Stem = "auto", weights: str | None = None) -> tuple[nn.Module, int]:
    """Make a timm backbone without its classifier.

    Args:
        name: any name of ``timm.list_models()``.
        image_size: side of the input in pixels.
        stem: ``dense`` without stride and pooling (a 4 x 4 patch for a ViT), ``model`` as published, ``auto`` dense below 96 px.
        weights: a file of pretrained weights; nothing is ever fetched.

    Returns:
        The backbone, ``(N, 3, S, S) -> (N, D)``, and D.

    Raises:
        UserError: an unknown name, a backbone that does not take this image size, or weights that do not fit.
    """
    import timm

    if not timm.is_model(name):
        near = [n for n in timm.list_models() if n.startswith(name[:4])][:8]
        raise UserError(f"timm has no model {name!r}.{closest(name, timm.list_models())} Similar: {', '.join(near) or 'none'}")
    dense = stem == "dense" or (stem == "auto" and image_size < DENSE_BELOW)
    options: dict[str, Any] = {}
    family = name.split(".")[0]
    is_vit = family.startswith(("vit_", "deit", "test_vit"))
    if is_vit:
        options["img_size"] = image_size
        if dense:
            options["patch_size"] = 4
    elif family.startswith(("convnext", "test_convnext")) and dense:
        options["patch_size"] = 1
    try:
        backbone = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"timm cannot make {name} for {image_size} px: {str(error).splitlines()[0]}") from error
    if dense and not options and (stem == "dense" or hasattr(backbone, "conv1") or hasattr(backbone, "conv_stem")):
        _dense_stem(backbone, name)
    if weights:
        load_pretrained(backbone, Path(weights))
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{name} does not take images of {image_size} px: {str(error).splitlines()[0]}") from error
    return backbone, int(features.shape[1])


def load_pretrained(backbone: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"weights {path} are not there")
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        result = backbone.load_state_dict(state, strict=False)
    except Exception as error:
        # Loaders raise anything from KeyError to RuntimeError, depending on what the file really is.
        raise UserError(f"{path} cannot be loaded into this backbone: {str(error).splitlines()[0][:200]}") from error
    if result.missing_keys:
        raise UserError(f"{path} lacks {len(result.missing_keys)} weights of this backbone, e.g. {result.missing_keys[0]}")


class DetectorNetwork(nn.Module):
    """Front end, backbone, linear layer, and the head's activation at the site ``head.output``.

    Args:
        backbone: a timm model's name, or ``spectrum-linear`` for the baseline: a linear classifier on the log spectrum.
        image_size: side of the frames in pixels.
        front_end: ``rgb``, ``residual`` (NPR), or ``spectrum`` (only with the baseline).
        stem: see :func:`make_backbone`.
        outputs: number of outputs of the linear layer.
        weights: pretrained weights of the backbone.
    """

    def __init__(self, backbone: str, image_size: int, front_end: FrontEnd, stem: Stem, outputs: int, weights: str | None = None) -> None:
        super().__init__()
        if (backbone == SPECTRUM) != (front_end == "spectrum"):
            raise UserError(f"front_end: spectrum and backbone: {SPECTRUM} go together")
        self.front_end: nn.Module
        if backbone == SPECTRUM:
            self.front_end = LogSpectrum(image_size)
            self.backbone: nn.Module = nn.Identity()
            width = self.front_end.bins
        else:
            self.front_end = Residual() if front_end == "residual" else Rgb()
            self.backbone, width = make_backbone(backbone, image_size, stem, weights)
        self.head = nn.ModuleDict({"fc": nn.Linear(width, outputs), "output": Site("sigmoid")})

    def logits(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [-1, 1] -> ``(N, outputs)`` before the head's activation, float32."""
        features = self.backbone(self.front_end(x))
        return self.head["fc"](features).float()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [-1, 1] -> ``(N, outputs)`` after the head's activation."""
        return self.head["output"](self.logits(x))


def classification_loss(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss that fits the head's activation.

    ``sigmoid``: binary cross-entropy with targets 0 or 1 (1 = fake); ``softmax``: cross-entropy with class numbers;
    ``identity``: mean squared error with real-valued targets.

    Raises:
        UserError: there is no loss for that activation.
    """
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.float())
    if kind == "softmax":
        return F.cross_entropy(logits, targets.long())
    if kind == "identity":
        return F.mse_loss(logits[:, 0], targets.float())
    raise UserError(
        f"the detector's head has the activation {kind}; use sigmoid (real or fake), softmax (real, or which generator) or "
        "linear (a regression target), as in activations: {head: {output: sigmoid}}"
    )
