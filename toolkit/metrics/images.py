"""Measures of single images: sliced Wasserstein distance on a Laplacian pyramid, MS-SSIM of pairs, and power spectra."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.data.frames import evenly_spaced

_BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0


def _blur(x: Tensor, gain: float = 1.0) -> Tensor:
    kernel = (_BINOMIAL[:, None] * _BINOMIAL[None, :] * gain).expand(x.shape[1], 1, 5, 5).contiguous()
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def _pyramid_down(x: Tensor) -> Tensor:
    return _blur(x)[:, :, ::2, ::2]


def _pyramid_up(x: Tensor) -> Tensor:
    grown = x.new_zeros(x.shape[0], x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    grown[:, :, ::2, ::2] = x
    return _blur(grown, gain=4.0)


def laplacian_pyramid(x: Tensor, smallest: int = 16) -> list[Tensor]:
    """Laplacian pyramid (Burt & Adelson 1983) of ``(N, C, H, W)`` images, finest level first, down to ``smallest`` px."""
    levels = []
    while x.shape[-1] >= 2 * smallest:
        small = _pyramid_down(x)
        levels.append(x - _pyramid_up(small))
        x = small
    return [*levels, x]


def patches(level: Tensor, per_image: int, generator: torch.Generator, side: int = 7) -> Tensor:
    """``per_image`` random ``side`` x ``side`` patches of each image: ``(N * per_image, C * side * side)``."""
    n, c, height, width = level.shape
    half = side // 2
    total = n * per_image
    ys = torch.randint(half, height - half, (total, 1, 1), generator=generator)
    xs = torch.randint(half, width - half, (total, 1, 1), generator=generator)
    offsets = torch.arange(-half, half + 1)
    image = torch.arange(n).repeat_interleave(per_image).view(-1, 1, 1)
    cut = level.permute(0, 2, 3, 1)[image, ys + offsets.view(1, -1, 1), xs + offsets.view(1, 1, -1)]
    return cut.permute(0, 3, 1, 2).reshape(total, c * side * side)


def normalise_patches(descriptors: Tensor, channels: int) -> Tensor:
    """Subtract each channel's mean and divide by its deviation, over all patches (Karras et al. 2018, section 5)."""
    shaped = descriptors.view(len(descriptors), channels, -1)
    mean = shaped.mean(dim=(0, 2), keepdim=True)
    deviation = shaped.std(dim=(0, 2), keepdim=True, correction=0)
    return ((shaped - mean) / deviation.clamp_min(1e-8)).view(len(descriptors), -1)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean Wasserstein-1 distance of two equally large point sets ``(N, D)`` over projections on ``(D, K)`` directions."""
    # NumPy sorts contiguous rows of floats several times as fast as PyTorch does.
    sorted_a, sorted_b = (np.sort((directions.T @ p.T).numpy(), axis=1) for p in (a, b))
    return float(np.abs(sorted_a - sorted_b).mean(dtype=np.float64))


def pyramid_distance(
    real: np.ndarray, fake: np.ndarray, *, per_image: int = 128, repeats: int = 4, directions: int = 128, seed: int = 0
) -> dict[int, float]:
    """Sliced Wasserstein distance per level of the Laplacian pyramid, times 1000 (Karras et al. 2018, section 5).

    7 x 7 patches, 128 per image; 4 x 128 random directions; one level for each size down to 16 px.

    Args:
        real, fake: ``(N, H, W, 3)`` uint8; the larger set is thinned out evenly to the size of the smaller.

    Returns:
        Size of the level in pixels -> distance; lower is better.
    """
    count = min(len(real), len(fake))
    sets = []
    for images in (real, fake):
        chosen = images[evenly_spaced(len(images), count)]
        # The published code works on intensities in 0..255; the normalisation makes the scale irrelevant.
        sets.append(laplacian_pyramid(torch.from_numpy(chosen).permute(0, 3, 1, 2).float()))
    result: dict[int, float] = {}
    for level_real, level_fake in zip(*sets, strict=True):
        size = level_real.shape[-1]
        generator = torch.Generator().manual_seed(seed * 1000 + size)
        a, b = (normalise_patches(patches(level, per_image, generator), 3) for level in (level_real, level_fake))
        total = 0.0
        for _ in range(repeats):
            axes = torch.randn(a.shape[1], directions, generator=generator)
            total += sliced_wasserstein(a, b, axes / axes.norm(dim=0, keepdim=True))
        result[size] = 1000 * total / repeats
    return result


def radial_spectrum(images: np.ndarray) -> np.ndarray:
    """Azimuthally averaged power spectrum of grey images (Durall et al. 2020, eq. 3), mean over the images.

    Args:
        images: ``(N, S, S, 3)`` uint8.

    Returns:
        ``(S // 2 + 1,)`` power at spatial frequencies 0 to S/2 cycles per image, grey levels in 0..1.
    """
    grey = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255.0
    size = grey.shape[-1]
    power = np.abs(np.fft.fftshift(np.fft.fft2(grey), axes=(1, 2))) ** 2 / size**2
    y, x = np.indices((size, size)) - size // 2
    radius = np.hypot(x, y).round().astype(int).ravel()
    inside = radius <= size // 2
    sums = np.bincount(radius[inside], power.mean(axis=0).ravel()[inside])
    return sums / np.bincount(radius[inside])


def spectrum_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Root mean square difference in decibels of two radial spectra ``(F,)``, over all frequencies but 0."""
    a, b = (10 * np.log10(spectrum[1:] + 1e-12) for spectrum in (real, fake))
    return float(np.sqrt(((a - b) ** 2).mean()))


# Exponents of the scales (Wang et al. 2003, section 3.2), finest first.
_MS_SSIM = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang et al. 2003, eq. 7) of pairs of images, by torchmetrics.

    Five scales from 176 px on. A smaller image has room for fewer under the 11 x 11 window (2 at 32 px, 3 at 64 px, 4 at
    128 px); their exponents are then rescaled to the same sum, so figures compare only at one size.

    Args:
        a, b: ``(N, H, W, 3)`` uint8.

    Returns:
        ``(N,)``, 1 for equal images.

    Raises:
        ValueError: smaller than 11 px.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    side = min(a.shape[1:3])
    if side < 11:
        raise ValueError(f"MS-SSIM needs images of at least 11 px, not {side}")
    scales = max(1, min(5, int(np.log2((side - 1) // 10)) + 1))
    weights = np.array(_MS_SSIM[:scales]) * sum(_MS_SSIM) / sum(_MS_SSIM[:scales])
    parts = []
    for start in range(0, len(a), 64):
        pair = [torch.from_numpy(np.ascontiguousarray(x[start : start + 64])).permute(0, 3, 1, 2).double() / 255 for x in (a, b)]
        parts.append(
            multiscale_structural_similarity_index_measure(
                pair[0], pair[1], data_range=1.0, betas=tuple(weights), normalize="relu", reduction="none"
            )
        )
    return torch.cat([torch.atleast_1d(p) for p in parts]).numpy()
