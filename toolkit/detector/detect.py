"""``toolkit detect``: score a user's own video files. Streams: memory does not grow with a video's length."""

from __future__ import annotations

import csv
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from toolkit.cli import Parser
from toolkit.data.faces import MARGIN, Face, FaceDetector, crop, face_detector, follow, square_box
from toolkit.data.frames import to_float
from toolkit.data.video import VideoError, VideoReader, VideoWriter
from toolkit.detector.module import Detector
from toolkit.errors import UserError
from toolkit.files import atomic, write_json

PARTLY_DONE = 3
ANNOTATED_SIZE = 480  # longest side in pixels: encoding, not detection, is what takes the time
_END = object()


@dataclass
class Scored:
    """One frame on its way through: ``face`` and ``box`` are None where no face was found."""

    index: int
    time_s: float
    frame: np.ndarray | None
    face: Face | None
    crop: np.ndarray | None
    score: float = float("nan")


@dataclass
class Verdict:
    """The result for one video; ``score`` is the mean P(fake) over frames with a face."""

    video: str
    verdict: str
    score: float
    threshold: float
    frames: int
    frames_with_face: int


def _between(a: Face, b: Face, share: float) -> Face:
    def mix(x: float, y: float) -> float:
        return x + share * (y - x)

    return Face(mix(a.x, b.x), mix(a.y, b.y), mix(a.width, b.width), mix(a.height, b.height), min(a.score, b.score))


def follow_faces(
    frames: Iterator[np.ndarray], fps: float, detect: FaceDetector, *, every: int, size: int, margin: float, keep: bool
) -> Iterator[Scored]:
    """Frames with their face crops. Faces are detected in every ``every``-th frame and interpolated between.

    Args:
        frames: ``(H, W, 3)`` uint8 BGR.
        fps: frames per second.
        detect: the face detector.
        every: detect in one of this many frames.
        size: side of the crops.
        margin: of the crops around the face.
        keep: keep the whole frame, for an annotated video.
    """
    waiting: list[tuple[int, np.ndarray]] = []
    last: Face | None = None

    def flush(new: Face | None, at: int) -> Iterator[Scored]:
        start = waiting[0][0] - 1 if waiting else at
        for index, frame in waiting:
            face = None
            if last is not None and new is not None:
                face = _between(last, new, (index - start) / (at - start))
            elif last is not None or new is not None:
                face = last or new
            yield cut(index, frame, face)

    def cut(index: int, frame: np.ndarray, face: Face | None) -> Scored:
        piece = None if face is None else crop(frame, square_box(face, margin), size)
        return Scored(index, index / fps, frame if keep else None, face, piece)

    index = -1
    for index, frame in enumerate(frames):
        if index % every:
            waiting.append((index, frame))
            continue
        face = follow(detect(frame), last)
        yield from flush(face, index)
        waiting = []
        yield cut(index, frame, face)
        last = face
    yield from flush(None, index + 1)


def _in_thread(items: Callable[[], Iterator[Any]], depth: int) -> Iterator[Any]:
    """Run an iterator in a thread of its own, at most ``depth`` items ahead; its exceptions are raised here."""
    channel: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for item in items():
                while not stop.is_set():
                    try:
                        channel.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
            channel.put(_END)
        except Exception as error:
            channel.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := channel.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)


@torch.inference_mode()
def score_frames(detector: Detector, frames: Iterator[Scored], batch_size: int) -> Iterator[Scored]:
    """Give each frame with a face its P(fake); frames come out in order."""
    batch: list[Scored] = []
    for item in frames:
        batch.append(item)
        if len(batch) >= batch_size:
            yield from _score(detector, batch)
            batch = []
    yield from _score(detector, batch)


def _score(detector: Detector, batch: list[Scored]) -> list[Scored]:
    faces = [item for item in batch if item.crop is not None]
    if faces:
        images = torch.from_numpy(np.stack([cv2.cvtColor(item.crop, cv2.COLOR_BGR2RGB) for item in faces]))  # type: ignore[arg-type]
        scores = detector(to_float(images.to(detector.device))).cpu().tolist()
        for item, score in zip(faces, scores, strict=True):
            item.score = score
    return batch


def _draw(item: Scored, threshold: float, margin: float, longest: int) -> np.ndarray:
    assert item.frame is not None
    scale = min(1.0, longest / max(item.frame.shape[:2]))
    frame = cv2.resize(item.frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else item.frame.copy()
    if item.face is not None:
        left, top, side = (round(v * scale) for v in square_box(item.face, margin))
        fake = item.score >= threshold
        colour = (60, 60, 230) if fake else (80, 200, 80)
        cv2.rectangle(frame, (left, top), (left + side, top + side), colour, 2)
        text = f"{'fake' if fake else 'real'} {item.score:.2f}"
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 2)
        x, y = max(0, min(left, frame.shape[1] - width - 8)), max(height + 8, top)
        cv2.rectangle(frame, (x, y - height - 8), (x + width + 8, y), colour, -1)
        cv2.putText(frame, text, (x + 4, y - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 2, cv2.LINE_AA)
    else:
        cv2.putText(frame, "no face", (10, 26), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (200, 200, 200), 2, cv2.LINE_AA)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def detect_video(
    path: Path,
    out: Path,
    detector: Detector,
    faces: FaceDetector,
    *,
    every: int = 5,
    batch_size: int = 32,
    annotate: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Score one video file; writes ``NAME.csv`` (per frame), ``NAME.webm`` (annotated) and ``NAME.json`` (the verdict).

    Args:
        path: the video.
        out: folder for the results.
        detector: with its threshold and preprocessing.
        faces: face detector.
        every: detect faces in one of this many frames, and interpolate between.
        batch_size: frames scored at a time.
        annotate: write the annotated video.
        progress: called with (frames done, frames in all or 0).

    Raises:
        VideoError: the file cannot be decoded.
    """
    margin = float(detector.preprocessing.get("margin", MARGIN))
    threshold = float(detector.threshold)
    size = int(detector.options.image_size)
    total = with_face = 0
    mass = 0.0
    with VideoReader(path) as reader, atomic(out / f"{path.stem}.csv") as table:
        writer = VideoWriter(out / f"{path.stem}.webm", reader.info.fps, codec="VP80") if annotate else None

        def crops() -> Iterator[Scored]:
            return follow_faces(iter(reader), reader.info.fps, faces, every=every, size=size, margin=margin, keep=annotate)

        try:
            with open(table, "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(("frame", "time_s", "p_fake", "face_x", "face_y", "face_width", "face_height", "face_score"))
                for item in score_frames(detector, _in_thread(crops, 2 * batch_size), batch_size):
                    total += 1
                    if item.face is None:
                        rows.writerow((item.index, f"{item.time_s:.4f}", "", "", "", "", "", ""))
                    else:
                        with_face += 1
                        mass += item.score
                        box = (f"{v:.1f}" for v in (item.face.x, item.face.y, item.face.width, item.face.height))
                        rows.writerow((item.index, f"{item.time_s:.4f}", f"{item.score:.6f}", *box, f"{item.face.score:.3f}"))
                    if writer is not None:
                        writer.write(_draw(item, threshold, margin, ANNOTATED_SIZE))
                    if progress:
                        progress(total, reader.info.frames)
            if total == 0:
                raise VideoError("no frame can be decoded")
            if writer is not None:
                writer.close()
        finally:
            if writer is not None:
                writer.discard()
    score = mass / with_face if with_face else float("nan")
    verdict = "undecided" if not with_face else "fake" if score >= threshold else "real"
    result = Verdict(str(path), verdict, score, threshold, total, with_face)
    write_json(out / f"{path.stem}.json", {**vars(result), "score": None if not with_face else score})
    return result


def main(argv: list[str]) -> int:
    """Entry point of ``toolkit detect``."""
    parser = Parser(
        "toolkit detect",
        description="Score video files with a trained detector: a CSV with P(fake) for every frame, an annotated video, and a "
        "verdict by the threshold that was chosen on validation data.",
        epilog="A video without a face is undecided. Exit status: 0 all videos were scored, 3 some could not be read, 2 a mistake.",
    )
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of `toolkit detector fit`")
    parser.add_argument("--out", type=Path, default=Path("runs/detect"), help="folder for the results (default %(default)s)")
    parser.add_argument("--faces", help="face detector (default: the one the training data was prepared with, or auto)")
    parser.add_argument("--face-model", type=Path, help="the face detector's model file")
    parser.add_argument(
        "--every", type=int, default=5, help="detect faces in one of this many frames and interpolate between (default %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--no-video", action="store_true", help="write no annotated video")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    for name in ("every", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    detector = Detector.from_checkpoint(args.checkpoint)
    if detector.head_kind() == "identity":
        raise UserError(f"{args.checkpoint} has a linear head: it predicts a target, not whether a face is fake")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        detector.to(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    name = args.faces or detector.preprocessing.get("faces") or "auto"
    try:
        name, faces = face_detector(name, args.face_model)
    except UserError:
        if args.faces:
            raise
        name, faces = face_detector("auto", args.face_model)
        print(
            f"note: the training faces were found by {detector.preprocessing.get('faces')}, here it is {name}",
            file=sys.stderr,
        )
    return _run(args, detector, faces)


def _run(args: Any, detector: Detector, faces: FaceDetector) -> int:
    from rich.progress import Progress

    from toolkit.console import console, print_rows

    verdicts, failures = [], []
    stems = [v.stem for v in args.videos]
    with Progress(console=console, transient=True) as bar:
        for path in args.videos:
            task = bar.add_task(path.name, total=None)
            out = args.out / path.parent.name if stems.count(path.stem) > 1 else args.out
            try:
                verdict = detect_video(
                    path,
                    out,
                    detector,
                    faces,
                    every=args.every,
                    batch_size=args.batch_size,
                    annotate=not args.no_video,
                    progress=lambda done, total, task=task: bar.update(task, completed=done, total=total or None),  # type: ignore[misc]
                )
                verdicts.append(replace(verdict, video=path.name))
            except VideoError as error:
                failures.append((path, str(error)))
            bar.remove_task(task)
    if verdicts:
        print_rows(
            "verdicts",
            ("video", "verdict", "mean P(fake)", "threshold", "frames", "with a face"),
            [(v.video, v.verdict, f"{v.score:.3f}", f"{v.threshold:.3f}", v.frames, v.frames_with_face) for v in verdicts],
        )
        console.print(f"per-frame scores: {args.out}")
    for path, reason in failures:
        print(f"not scored: {path}: {reason}", file=sys.stderr)
    return PARTLY_DONE if failures else 0
