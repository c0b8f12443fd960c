"""Grids and other small pictures as arrays and encoded bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import cv2
import numpy as np


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arrange ``(N, H, W, 3)`` uint8 images in a grid on white; nearly square unless ``columns`` is given."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, image in enumerate(images):
        y, x = divmod(place, columns)
        sheet[y * (height + gap) : y * (height + gap) + height, x * (width + gap) : x * (width + gap) + width] = image
    return sheet


def tile_clips(clips: Sequence[np.ndarray], columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Clips ``(T, H, W, 3)`` side by side as one clip; enlarged ``scale`` times, pixels kept crisp."""
    frames = [grid(np.stack([clip[t] for clip in clips]), columns) for t in range(min(len(c) for c in clips))]
    return np.stack([enlarge(frame, scale) for frame in frames])


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel ``scale`` times in both directions."""
    return image if scale == 1 else image.repeat(scale, axis=0).repeat(scale, axis=1)


def png(image: np.ndarray) -> bytes:
    """Encode an RGB uint8 image as PNG."""
    ok, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not ok:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def gif(frames: np.ndarray, fps: float) -> bytes:
    """Encode ``(T, H, W, 3)`` uint8 RGB frames as an endless GIF (TensorBoard shows these; pages get WebM)."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()
