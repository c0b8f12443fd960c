"""What a detector sees: Grad-CAM maps, and spectra of the residual that its front end looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from toolkit.data.frames import FrameSet, as_float
from toolkit.detector.module import Detector
from toolkit.detector.networks import Residual
from toolkit.errors import UserError
from toolkit.files import atomic
from toolkit.pictures import enlarge, grid, png


@torch.inference_mode()
def predict(detector: Detector, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Calibrated P(fake) of ``(N, S, S, 3)`` uint8 frames, ``(N,)``."""
    parts = (as_float(images[i : i + batch_size]) for i in range(0, len(images), batch_size))
    return np.concatenate([detector(part.to(detector.device)).cpu().numpy() for part in parts])


def _as_map(output: Any) -> Tensor | None:
    """A module's output as ``(N, C, H, W)``: feature maps as they are, tokens of a transformer as a square."""
    if not isinstance(output, Tensor):
        return None
    if output.dim() == 4 and min(output.shape[2:]) > 1:
        return output
    if output.dim() == 3 and output.shape[1] > 2:
        side = int((output.shape[1]) ** 0.5)  # a class token, if any, stands first
        return output[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    return None


def grad_cam(detector: Detector, images: np.ndarray) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) of the log-odds of *fake* at the backbone's last feature map.

    Args:
        detector: with a backbone that has feature maps.
        images: ``(N, S, S, 3)`` uint8.

    Returns:
        ``(N, S, S)`` float32 in [0, 1], each map over its own maximum: where the evidence for *fake* lies. Zero everywhere
        if nothing speaks for it.

    Raises:
        UserError: the network has no feature map (the spectrum baseline).
    """
    last: dict[str, tuple[Any, Tensor]] = {}

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        found = _as_map(output)
        if found is not None:
            last["map"] = (output, found)

    handles = [module.register_forward_hook(watch) for module in detector.net.backbone.modules()]
    detector.eval()
    try:
        with torch.enable_grad():
            # A gradient on the input, so that maps have a history even where no weight is trained.
            batch = as_float(images).to(detector.device).requires_grad_(True)
            odds = detector.log_odds(detector.net.logits(batch))
            if "map" not in last:
                raise UserError("this detector has no feature map, so Grad-CAM has nothing to show (the spectrum baseline is linear)")
            output, feature_map = last["map"]
            (gradient,) = torch.autograd.grad(odds.sum(), output)
    finally:
        for handle in handles:
            handle.remove()
    slope = _as_map(gradient)
    assert slope is not None
    weights = slope.mean(dim=(2, 3), keepdim=True)
    cam = torch.relu((weights * feature_map).sum(dim=1)).detach().float().cpu().numpy()
    peak = cam.max(axis=(1, 2), keepdims=True)
    cam = np.where(peak > 0, cam / np.maximum(peak, 1e-12), 0.0).astype(np.float32)
    size = (images.shape[2], images.shape[1])
    return np.stack([np.clip(cv2.resize(one, size, interpolation=cv2.INTER_LINEAR), 0, 1) for one in cam])


def residual_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean power spectrum of what nearest-neighbour down- and upsampling cannot restore, in decibels.

    The residual is that of :class:`toolkit.detector.networks.Residual` (NPR, Tan et al. 2024), of the green channel with
    images in [-1, 1]; a generator's last upsampling shows in it as bright spots.

    Args:
        images: ``(N, S, S, 3)`` uint8.

    Returns:
        ``(S, S)`` float64, frequency zero in the middle.
    """
    total, front = np.zeros(images.shape[1:3]), Residual()
    for start in range(0, len(images), 256):
        residual = front(as_float(images[start : start + 256]))[:, 1].double().numpy()
        total += (np.abs(np.fft.fft2(residual)) ** 2).sum(axis=0)
    return 10 * np.log10(np.fft.fftshift(total) / (len(images) * total.size) + 1e-12)


def in_colour(spectra: Sequence[np.ndarray]) -> tuple[np.ndarray, float, float]:
    """Spectra ``(S, S)`` as pictures ``(K, S, S, 3)`` uint8 RGB on one scale, dark to bright, and the scale's ends in decibels."""
    low, high = np.percentile(spectra, [1, 99.8])
    levels = (np.clip((s - low) / max(high - low, 1e-9), 0, 1) for s in spectra)
    pictures = [cv2.applyColorMap((level * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1] for level in levels]
    return np.stack(pictures), float(low), float(high)


def overlay(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images with their Grad-CAM maps laid over, ``(N, S, S, 3)`` uint8."""
    heat = np.stack([cv2.applyColorMap((m * 255).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1] for m in maps])
    return (0.45 * images + 0.55 * heat).round().astype(np.uint8)


def examples(frames: FrameSet, label: str, count: int = 8) -> np.ndarray:
    """``count`` frames with this label, of as many videos as there are: ``(count, S, S, 3)``."""
    table = frames.table[frames.table["label"] == label].sort_values(["video", "index"])
    table = table.assign(turn=table.groupby("video").cumcount()).sort_values(["turn", "video"])
    return frames.images[table["row"].to_numpy()[:count]]


def cam_picture(detector: Detector, frames: FrameSet, count: int = 8) -> np.ndarray:
    """Four rows: fakes, their maps, real frames, their maps."""
    rows = []
    for label in ("fake", "real"):
        shown = examples(frames, label, count)
        rows += [*shown, *np.zeros((count - len(shown), *shown.shape[1:]), np.uint8)]
        rows += [*overlay(shown, grad_cam(detector, shown)), *np.zeros((count - len(shown), *shown.shape[1:]), np.uint8)]
    return grid(np.stack(rows), columns=count)


def write_pictures(detector: Detector, frames: FrameSet, out: Path) -> None:
    """Write ``gradcam.png`` (where the network has feature maps) and ``spectra.png`` (real, then every method's fakes)."""
    size = frames.images.shape[1]
    try:
        with atomic(out / "gradcam.png") as temporary:
            temporary.write_bytes(png(enlarge(cam_picture(detector, frames), max(1, 128 // size))))
    except UserError as error:
        print(f"no gradcam.png: {error}")
        (out / "gradcam.png").unlink(missing_ok=True)
    kinds = {"real": frames.table["label"] == "real"}
    kinds |= {
        method: (frames.table["label"] == "fake") & (frames.table["method"] == method)
        for method in sorted(set(frames.table.loc[frames.table["label"] == "fake", "method"]))
    }
    spectra = {name: residual_spectrum(frames.select(keep).array()) for name, keep in kinds.items()}
    pictures, low, high = in_colour(list(spectra.values()))
    with atomic(out / "spectra.png") as temporary:
        temporary.write_bytes(png(enlarge(grid(pictures, columns=min(8, len(pictures))), max(1, 128 // size))))
    print(f"spectra.png, from left to right: {', '.join(spectra)}; {low:.0f} to {high:.0f} dB")
