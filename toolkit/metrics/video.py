"""Measures of motion in clips. Each is meaningful only beside the same figure for real clips."""

from __future__ import annotations

import cv2
import numpy as np

FLOW_SIZE = 128
MOVING = 0.2  # per cent of the side per frame: a quarter of a pixel of 128, below which flow is mostly its own error


def motion(clip: np.ndarray) -> float:
    """Mean absolute change from frame to frame of a ``(T, H, W, 3)`` uint8 clip, in grey levels of 0..255."""
    x = clip.astype(np.float32)
    return float(np.abs(np.diff(x, axis=0)).mean()) if len(x) > 1 else float("nan")


def flicker(clip: np.ndarray) -> float:
    """Change that comes and goes: mean of ``|x[t+1] - 2 x[t] + x[t-1]| / 2`` in grey levels of 0..255.

    A steady drift scores 0; a pixel that alternates scores its full amplitude.
    """
    x = clip.astype(np.float32)
    return float(np.abs(np.diff(x, n=2, axis=0)).mean() / 2) if len(x) > 2 else float("nan")


def _flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dense flow from ``a`` to ``b`` (``(H, W)`` uint8) by DIS (Kroeger et al. 2016): ``(H, W, 2)`` in pixels."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    flow: np.ndarray = dis.calc(a, b, None)  # type: ignore[call-overload]
    return flow


def _sample(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(image, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def flow_figures(clip: np.ndarray) -> np.ndarray:
    """What the optical flow of a clip tells, all from one computation of it.

    Frames smaller than 128 px are enlarged first, for the sake of the flow (DIS). Pixels that are occluded, by the
    forward-backward test of Sundaram et al. 2010, are left out everywhere.

    Args:
        clip: ``(T, H, W, 3)`` uint8 with T at least 2.

    Returns:
        ``(4,)`` float64, each a mean over the pairs of frames; NaN where T is too small or every pixel is occluded:

        - warping error: mean absolute difference of a frame and the next one warped back, in grey levels of 0..255
          (Lai et al. 2018, arXiv:1808.00449, eq. 10 and 11);
        - speed: mean length of the flow, in per cent of the frame's side per frame;
        - speed of what moves: the same over pixels that move by 0.2 per cent at least;
        - acceleration of what moves: mean length of the difference between their flow and that one frame later, followed
          along the flow, in the same unit. A pixel that moves on evenly has none.
    """
    scale = max(1.0, FLOW_SIZE / clip.shape[1])
    size = (round(clip.shape[2] * scale), round(clip.shape[1] * scale))
    frames = [cv2.resize(f, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else f for f in clip]
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    errors, speeds, moving_speeds, accelerations = [], [], [], []
    before: tuple[np.ndarray, np.ndarray] | None = None
    for t in range(len(frames) - 1):
        forward, backward = _flow(grey[t], grey[t + 1]), _flow(grey[t + 1], grey[t])
        back = _sample(backward, forward)
        visible = ((forward + back) ** 2).sum(-1) <= 0.01 * ((forward**2).sum(-1) + (back**2).sum(-1)) + 0.5
        height, width = visible.shape
        x = np.arange(width)[None, :] + forward[..., 0]
        y = np.arange(height)[:, None] + forward[..., 1]
        visible &= (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        percent = 100.0 / max(height, width)
        if visible.any():
            difference = np.abs(frames[t].astype(np.float32) - _sample(frames[t + 1], forward).astype(np.float32)).mean(-1)
            errors.append(float(difference[visible].mean()))
            speeds.append(percent * float(np.linalg.norm(forward[visible], axis=-1).mean()))
        if before is not None:
            flow, moved = before
            moved &= percent * np.linalg.norm(flow, axis=-1) >= MOVING
            if moved.any():
                change = np.linalg.norm(_sample(forward, flow) - flow, axis=-1)
                accelerations.append(percent * float(change[moved].mean()))
                moving_speeds.append(percent * float(np.linalg.norm(flow[moved], axis=-1).mean()))
        before = forward, visible
    figures = (errors, speeds, moving_speeds, accelerations)
    return np.array([float(np.mean(v)) if v else float("nan") for v in figures])
