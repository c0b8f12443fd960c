"""Looping walks through latent space, and the clips that a generator makes of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import nn

from toolkit.data.frames import to_uint8
from toolkit.errors import UserError

Interpolation = Literal["spline", "slerp"]


def latent_walk(
    seed: int,
    frames: int,
    latent: int,
    *,
    keyframes: int = 4,
    interpolation: Interpolation = "spline",
    period: int | None = None,
) -> np.ndarray:
    """The first ``frames`` of a closed path through ``keyframes`` seeded latent vectors, ``period`` frames long.

    ``spline`` is a periodic cubic spline (smooth velocity), rescaled to the shell on which normal vectors lie;
    ``slerp`` follows great arcs between neighbours (Shoemake 1985), with a corner at each keyframe.

    Args:
        seed: of the keyframes; the same seed gives the same path to every generator.
        frames: number of frames, at least 1.
        latent: length of the latent vector.
        keyframes: at least 2.
        period: frames of the whole loop, which sets the speed; ``frames`` by default, and then frame ``frames`` would be
            frame 0 again. A longer one gives a section of a slower walk.

    Returns:
        ``(frames, latent)`` float32.

    Raises:
        UserError: too few frames or keyframes, or a loop shorter than the section.
    """
    period = period or frames
    if keyframes < 2 or frames < 1:
        raise UserError(f"a walk needs at least 2 keyframes and 1 frame, not {keyframes} and {frames}")
    if period < frames:
        raise UserError(f"a walk of {frames} frames is longer than its loop of {period}")
    rng = np.random.default_rng([seed, 0x3A1C])
    keys = rng.standard_normal((keyframes, latent))
    where = np.arange(frames) * keyframes / period
    closed = np.concatenate([keys, keys[:1]])
    if interpolation == "spline":
        path = CubicSpline(np.arange(keyframes + 1), closed, bc_type="periodic")(where)
        # Between keyframes a spline cuts through the inside of the shell, where the generator was never trained.
        lengths = np.linalg.norm(closed, axis=1)
        target = np.interp(where, np.arange(keyframes + 1), lengths)
        path *= (target / np.maximum(np.linalg.norm(path, axis=1), 1e-12))[:, None]
        return path.astype(np.float32)
    left = np.floor(where).astype(int)
    t = (where - left)[:, None]
    a, b = closed[left], closed[left + 1]
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    angle = np.arccos(np.clip(cosine, -1, 1))[:, None]
    small = np.sin(angle) < 1e-6
    safe = np.where(small, 1.0, np.sin(angle))
    path = np.where(small, (1 - t) * a + t * b, (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / safe)
    return path.astype(np.float32)


@torch.no_grad()
def render(generator: nn.Module, latents: np.ndarray | torch.Tensor, batch_size: int = 64) -> np.ndarray:
    """Images for ``(N, latent)`` vectors as ``(N, size, size, 3)`` uint8 RGB, in evaluation mode and float32."""
    parameter = next(generator.parameters())
    training = generator.training
    generator.eval()
    try:
        vectors = torch.as_tensor(np.asarray(latents), dtype=torch.float32)
        images = [to_uint8(generator(part.to(parameter.device))).cpu() for part in vectors.split(batch_size)]
    finally:
        generator.train(training)
    return torch.cat(images).numpy()


def clip_seeds(clips: int, seed: int = 0) -> list[int]:
    """Seeds of ``clips`` walks; the first n of them are the same however many are asked for."""
    return [seed * 100_000 + i for i in range(clips)]


def render_clips(
    generator: nn.Module,
    *,
    clips: int,
    frames: int,
    seed: int = 0,
    keyframes: int = 4,
    interpolation: Interpolation = "spline",
    period: int | None = None,
) -> list[np.ndarray]:
    """``clips`` clips, each ``(frames, size, size, 3)`` uint8 RGB, along the walks of :func:`latent_walk`."""
    latent = int(generator.latent)  # type: ignore[arg-type]
    return [
        render(generator, latent_walk(s, frames, latent, keyframes=keyframes, interpolation=interpolation, period=period))
        for s in clip_seeds(clips, seed)
    ]
