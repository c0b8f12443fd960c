"""Finding faces and cropping them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from toolkit.errors import UserError
from toolkit.hookspecs import hookimpl
from toolkit.plugins import plugins

MODEL_VARIABLE = "TOOLKIT_YUNET_MODEL"
DETECTION_SIZE = 320
MARGIN = 0.3


@dataclass(frozen=True)
class Face:
    """A face in pixels of its frame: top left corner, width, height, and the detector's confidence in [0, 1]."""

    x: float
    y: float
    width: float
    height: float
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box."""
        return (self.x + self.width / 2, self.y + self.height / 2)


def _face(box: np.ndarray, score: float) -> Face:
    x, y, width, height = (float(v) for v in box)
    return Face(x, y, width, height, float(score))


FaceDetector = Callable[[np.ndarray], list[Face]]


def yunet_model(model: Path | None = None) -> Path | None:
    """The YuNet model file: the one given, that of ``TOOLKIT_YUNET_MODEL``, or one in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "toolkit"
    for candidate in [model, os.environ.get(MODEL_VARIABLE), *sorted(cache.glob("*yunet*.onnx"))]:
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    return None


def _shrink(frame: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    scale = size / max(frame.shape[:2])
    if scale >= 1:
        return frame, 1.0
    shape = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(frame, shape, interpolation=cv2.INTER_AREA), scale


class YuNet:
    """YuNet (Wu et al. 2023) through ``cv2.FaceDetectorYN``.

    Args:
        model: the ONNX file; see :func:`yunet_model` for where else it is looked for.
        size: frames are shrunk to this long side first.

    Raises:
        UserError: there is no model file, or it is not a YuNet model.
    """

    def __init__(self, model: Path | None = None, size: int = DETECTION_SIZE) -> None:
        path = yunet_model(model)
        if path is None:
            raise UserError(
                "the yunet face detector needs its model file, face_detection_yunet*.onnx of the OpenCV Zoo: "
                f"give --face-model FILE, set {MODEL_VARIABLE}, or use --faces haar"
            )
        self.size = size
        try:
            self._detector = cv2.FaceDetectorYN.create(str(path), "", (size, size), 0.7, 0.3, 50)
        except cv2.error as error:
            raise UserError(f"{path} is not a YuNet model that OpenCV can load") from error

    def __call__(self, frame: np.ndarray) -> list[Face]:
        """Faces of an ``(H, W, 3)`` uint8 BGR frame, most confident first."""
        small, scale = _shrink(frame, self.size)
        self._detector.setInputSize((small.shape[1], small.shape[0]))
        found = self._detector.detect(small)[1]
        if found is None:
            return []
        boxes = [_face(row[:4] / scale, row[-1]) for row in found]
        return sorted(boxes, key=lambda f: -f.score)


class Haar:
    """Viola & Jones 2001, the frontal-face cascade that opencv-python 4 ships."""

    def __init__(self, model: Path | None = None, size: int = 2 * DETECTION_SIZE) -> None:
        self.size = size
        file = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
        self._cascade = cv2.CascadeClassifier(str(file))

    def __call__(self, frame: np.ndarray) -> list[Face]:
        """Faces of an ``(H, W, 3)`` uint8 BGR frame, best supported first."""
        small, scale = _shrink(frame, self.size)
        grey = cv2.equalizeHist(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))
        least = max(24, min(grey.shape) // 10)
        boxes, _, weights = self._cascade.detectMultiScale3(
            grey, scaleFactor=1.1, minNeighbors=5, minSize=(least, least), outputRejectLevels=True
        )
        faces = [_face(np.asarray(box) / scale, 1 / (1 + np.exp(-w))) for box, w in zip(boxes, np.ravel(weights), strict=True)]
        return sorted(faces, key=lambda f: -f.score)


def _whole_frame(model: Path | None = None) -> FaceDetector:
    return lambda frame: [Face(0.0, 0.0, float(frame.shape[1]), float(frame.shape[0]), 1.0)]


@hookimpl
def toolkit_face_detectors() -> dict[str, Callable[..., FaceDetector]]:
    """``yunet``, ``haar``, and ``none`` for frames that are cropped already."""
    return {"yunet": YuNet, "haar": Haar, "none": _whole_frame}


def face_detector(name: str = "auto", model: Path | None = None) -> tuple[str, FaceDetector]:
    """Make the face detector ``name``; ``auto`` is yunet where its model is found and haar otherwise.

    Returns:
        The name of the detector that was chosen, and the detector.

    Raises:
        UserError: an unknown name, or the detector's model is missing.
    """
    known = plugins().mapping("toolkit_face_detectors")
    if name == "auto":
        name = "yunet" if yunet_model(model) else "haar"
    if name not in known:
        raise UserError(f"unknown face detector {name!r}; known: auto, {', '.join(known)}")
    return name, known[name](model=model)


def follow(faces: list[Face], previous: Face | None) -> Face | None:
    """Choose one face of a frame: the nearest to the ``previous`` frame's, or else the largest (confident) one."""
    if not faces:
        return None
    if previous is None:
        return max(faces, key=lambda f: f.width * f.height * f.score)
    x, y = previous.centre
    return min(faces, key=lambda f: (f.centre[0] - x) ** 2 + (f.centre[1] - y) ** 2)


def square_box(face: Face, margin: float = MARGIN) -> tuple[int, int, int]:
    """The square crop around ``face`` as ``(left, top, side)`` in pixels, its side larger than the face by ``margin``.

    It may reach over the frame's edge; :func:`crop` repeats the border there.
    """
    side = max(2, round(max(face.width, face.height) * (1 + margin)))
    x, y = face.centre
    return (round(x - side / 2), round(y - side / 2), side)


def crop(frame: np.ndarray, box: tuple[int, int, int], size: int | None = None) -> np.ndarray:
    """Cut the square ``box`` out of ``frame`` and resize it to ``size`` pixels (area for smaller, cubic for larger)."""
    left, top, side = box
    height, width = frame.shape[:2]
    inside = frame[max(0, top) : max(0, min(height, top + side)), max(0, left) : max(0, min(width, left + side))]
    if inside.size == 0:
        inside = np.zeros((1, 1, 3), np.uint8)
    pads = (max(0, -top), max(0, top + side - height), max(0, -left), max(0, left + side - width))
    if any(pads):
        inside = cv2.copyMakeBorder(inside, *pads, borderType=cv2.BORDER_REPLICATE)
    return resize(inside, size) if size else np.ascontiguousarray(inside)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize to ``size`` x ``size``. One kernel for real and fake alike: a detector can learn a resize kernel."""
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image)
    interpolation = cv2.INTER_AREA if min(image.shape[:2]) >= size else cv2.INTER_CUBIC
    resized: Any = cv2.resize(image, (size, size), interpolation=interpolation)
    return resized
