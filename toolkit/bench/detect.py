"""``toolkit detect`` against decoding alone and the network alone."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path


def detect_speeds(video: Path, checkpoint: Path, face_model: Path | None, rounds: int) -> dict[str, list[float]]:
    """Frames per second of decoding alone, of the network alone, and of ``toolkit detect`` without an annotated video.

    Args:
        video: a clip with a face.
        checkpoint: of a detector.
        face_model: the face detector's model file.
        rounds: the three are measured in turns this often.
    """
    import tempfile

    import torch

    from toolkit.data.faces import face_detector
    from toolkit.data.video import VideoReader
    from toolkit.detector.detect import detect_video
    from toolkit.detector.module import Detector

    detector = Detector.from_checkpoint(checkpoint)
    _, faces = face_detector("auto", face_model)
    size = int(detector.options.image_size)
    with VideoReader(video) as reader:
        frames = sum(1 for _ in reader)
    batch = torch.randn(32, 3, size, size).contiguous(memory_format=torch.channels_last)

    def decode() -> None:
        with VideoReader(video) as reader:
            for _ in reader:
                pass

    def network() -> None:
        with torch.inference_mode():
            for start in range(0, frames, 32):
                detector(batch[: min(32, frames - start)])

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            detect_video(video, Path(folder), detector, faces, annotate=False)

    speeds: dict[str, list[float]] = {"decoding alone": [], "network alone": [], "toolkit detect": []}
    for work in (decode, network, whole):
        work()
    for _ in range(rounds):
        for name, work in zip(speeds, (decode, network, whole), strict=True):
            start = time.perf_counter()
            work()
            speeds[name].append(frames / (time.perf_counter() - start))
    return speeds


def run(args: argparse.Namespace) -> None:
    from toolkit.console import print_rows

    speeds = detect_speeds(args.video, args.checkpoint, args.face_model, args.rounds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    slower = min(medians["decoding alone"], medians["network alone"])
    print_rows(
        f"{args.video.name}, without an annotated video",
        ("what", "frames/s", "lowest to highest", "ratio to the slower of the two alone"),
        [(n, f"{medians[n]:.0f}", f"{min(v):.0f} to {max(v):.0f}", f"{medians[n] / slower:.2f}") for n, v in speeds.items()],
    )
