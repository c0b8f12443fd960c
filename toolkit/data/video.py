"""Reading and writing video files with OpenCV."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import cv2
import numpy as np

from toolkit.errors import UserError
from toolkit.files import atomic

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


# FFmpeg and OpenCV print to standard error what the exceptions here say in words. They look at these once, at the first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

_IMAGES = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
_TIGHT = 64 * 2**20


class VideoError(Exception):
    """A video file that cannot be read; the message says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says. ``frames`` is an estimate for some containers; ``fps`` is 25 where none is given."""

    width: int
    height: int
    fps: float
    frames: int
    codec: str


class VideoReader:
    """Frames of a video, one at a time, as ``(H, W, 3)`` uint8 BGR arrays; memory does not grow with its length.

    Args:
        path: a video file.

    Raises:
        VideoError: the file is missing, empty, or not a video that OpenCV can decode.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoError("no such file")
        if self.path.stat().st_size == 0:
            raise VideoError("the file is empty")
        with open(self.path, "rb") as file:
            begin = file.read(4)
        if kind := next((name for magic, name in _IMAGES.items() if begin.startswith(magic)), ""):
            raise VideoError(f"a {kind} image under the name of a video")
        # Named, so that OpenCV neither guesses an image sequence from digits in the name nor tries a camera.
        self._capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise VideoError("not a video that can be decoded (damaged, truncated, or another kind of file)")
        get = self._capture.get
        fps = get(cv2.CAP_PROP_FPS)
        code = int(get(cv2.CAP_PROP_FOURCC))
        self.info = VideoInfo(
            width=int(get(cv2.CAP_PROP_FRAME_WIDTH)),
            height=int(get(cv2.CAP_PROP_FRAME_HEIGHT)),
            fps=float(fps) if np.isfinite(fps) and 0 < fps <= 1000 else 25.0,
            frames=max(0, int(get(cv2.CAP_PROP_FRAME_COUNT))),
            codec=code.to_bytes(4, "little", signed=False).decode("ascii", "replace").strip("\0 ") if code > 0 else "?",
        )

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Every frame in order. Ends at the first frame that cannot be decoded."""
        while True:
            ok, frame = self._capture.read()
            if not ok or frame is None:
                return
            yield frame

    def select(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The frames with these ``indices`` (any order, repeats ignored), in order; those past the end are left out.

        Frames are skipped by decoding, not by seeking: seeking lands on other frames in some containers.
        """
        wanted = sorted(set(indices))
        position = 0
        for index in wanted:
            while position < index:
                if not self._capture.grab():
                    return
                position += 1
            ok, frame = self._capture.read()
            if not ok or frame is None:
                return
            position += 1
            yield index, frame


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence C code: OpenCV prints to file descriptor 2 that WebM has no four-letter codes, at every file it makes."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def count_frames(path: Path) -> int:
    """The number of frames that really decode, by reading through the file."""
    with VideoReader(path) as reader:
        count = 0
        while reader._capture.grab():
            count += 1
    return count


class VideoWriter:
    """Writes WebM video that browsers play; the file appears under its name when it is complete.

    Args:
        path: the file to make; the name must end in ``.webm``.
        fps: frames per second.
        codec: ``VP90``, or ``VP80``, which is encoded four times as fast and is larger.

    Raises:
        UserError: the name has another ending.
    """

    def __init__(self, path: Path, fps: float, codec: Literal["VP90", "VP80"] = "VP90") -> None:
        self.path = Path(path)
        if self.path.suffix != ".webm":
            raise UserError(f"{path}: clips are written as WebM, so the name must end in .webm")
        self.fps, self.codec, self.count = fps, codec, 0
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(atomic(self.path))
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Append an RGB ``(H, W, 3)`` uint8 frame; all frames have the first one's size.

        Raises:
            UserError: the encoder is missing.
        """
        if self._writer is None:
            size = (frame.shape[1], frame.shape[0])
            with _quiet_stderr():
                self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*self.codec), self.fps, size)
            if not self._writer.isOpened():
                raise UserError("this build of OpenCV cannot write WebM video; install opencv-python from PyPI")
            self._size = size
        if (frame.shape[1], frame.shape[0]) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        """Finish the file.

        Raises:
            UserError: no frame was written.
            OSError: the disk is full.
        """
        if self._writer is None:
            self.discard()
            raise UserError(f"{self.path}: there is no frame to write")
        self._writer.release()
        # The encoder does not tell of a full disk: where there is little room, what was written is read back.
        if shutil.disk_usage(self._temporary.parent).free < _TIGHT:
            try:
                complete = count_frames(self._temporary) == self.count
            except VideoError:
                complete = False
            if not complete:
                self.discard()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._stack.close()

    def discard(self) -> None:
        """Throw away an unfinished file; does nothing to a finished one."""
        if self._writer is not None:
            self._writer.release()
        with suppress(_Discarded), self._stack:
            raise _Discarded


class _Discarded(Exception):
    pass


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write RGB ``(H, W, 3)`` uint8 ``frames`` as VP9 in WebM; returns how many were written.

    Raises:
        UserError: the name does not end in ``.webm``, there is no frame, or the encoder is missing.
    """
    writer = VideoWriter(path, fps)
    try:
        for frame in frames:
            writer.write(frame)
        writer.close()
    finally:
        writer.discard()
    return writer.count


def read_image(path: Path) -> np.ndarray:
    """Read an image of any kind OpenCV knows as ``(H, W, 3)`` uint8 BGR.

    Greyscale is repeated over the channels, alpha is dropped, and 16 bits or floats are scaled to 8.

    Raises:
        VideoError: the file is missing or not an image.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if image is None:
        raise VideoError("not an image that can be decoded" if data.size else "the file is empty")
    if image.dtype == np.uint16:
        image = (image / 257.0).round().astype(np.uint8)
    elif image.dtype != np.uint8:
        image = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if image.shape[2] == 4:
        return cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
    return np.ascontiguousarray(image[:, :, :3])
