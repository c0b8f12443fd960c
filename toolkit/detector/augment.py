"""Augmentations of training frames, each with a probability of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from toolkit.data.faces import resize


@dataclass(frozen=True)
class Augmentations:
    """Probability of each augmentation, applied alike to real and fake.

    Attributes:
        flip: mirror.
        jpeg: compress with a quality of 40 to 95 and decode.
        blur: Gaussian blur with sigma 0.3 to 1.2 pixels.
        resize: shrink to 50 to 95 % and enlarge again.
        noise: Gaussian noise with sigma 1 to 6 grey levels.
    """

    flip: float = 0.5
    jpeg: float = 0.0
    blur: float = 0.0
    resize: float = 0.0
    noise: float = 0.0


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress an ``(H, W, 3)`` uint8 RGB image as JPEG and decode it."""
    ok, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    if not ok:
        raise RuntimeError("OpenCV could not encode a JPEG")
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return decoded[..., ::-1]


def shrink_and_enlarge(image: np.ndarray, factor: float) -> np.ndarray:
    """Reduce a square image by ``factor`` (below 1) and bring it back to its size."""
    side = max(2, round(image.shape[0] * factor))
    return resize(resize(image, side), image.shape[0])


def augmenter(options: Augmentations) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """A function of one ``(H, W, 3)`` uint8 image and a random generator."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Every number is drawn whether or not it is used, so that one probability does not shift the others' draws.
        chance, amount = rng.random(5), rng.random(4)
        if chance[0] < options.flip:
            image = image[:, ::-1]
        if chance[1] < options.blur:
            image = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), 0.3 + 0.9 * amount[0])
        if chance[2] < options.resize:
            image = shrink_and_enlarge(np.ascontiguousarray(image), 0.5 + 0.45 * amount[1])
        if chance[3] < options.noise:
            noise = rng.normal(0, 1 + 5 * amount[2], image.shape)
            image = np.clip(image + noise, 0, 255).round().astype(np.uint8)
        if chance[4] < options.jpeg:
            image = jpeg(image, 40 + round(55 * amount[3]))
        return np.ascontiguousarray(image)

    return apply
