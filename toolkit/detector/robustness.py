"""How a detector holds up when its test frames are compressed, blurred, resized or noisy, and what it looks at."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from toolkit.data.frames import FrameSet
from toolkit.detector.augment import jpeg, shrink_and_enlarge

CURVES = ("frame auc", "video auc", "video balanced accuracy", "video real accuracy", "video fake accuracy")


def recompress(frames: np.ndarray, crf: int) -> np.ndarray:
    """Encode consecutive frames as H.264 (libx264, 4:2:0, preset medium) and decode them.

    Args:
        frames: ``(T, H, W, 3)`` uint8 RGB.
        crf: constant rate factor: 0 is nearly lossless, 23 and 40 are the c23 and c40 of FaceForensics++, 51 the worst.

    Returns:
        ``(T, H, W, 3)`` uint8 RGB.
    """
    import av

    height, width = frames.shape[1:3]
    # 4:2:0 needs even sides: the last row or column is repeated and cut off again.
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf), "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in even:
            # OpenCV's conversion is exact; FFmpeg's differs by a rounding with the alignment of the memory it is given.
            planes: Any = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2YUV_I420)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        planes_of = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
        decoded = [cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_I420) for planes in planes_of]
    return np.stack(decoded)[:, :height, :width]


def _each(change: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, float], np.ndarray]:
    def apply(images: np.ndarray, videos: np.ndarray, level: float) -> np.ndarray:
        return np.stack([change(np.ascontiguousarray(image), level) for image in images])

    return apply


def _noise(images: np.ndarray, videos: np.ndarray, level: float) -> np.ndarray:
    rng = np.random.default_rng([int(level * 1000), 0x4015E])
    parts = [
        np.clip(part + rng.normal(0, level, part.shape), 0, 255).round().astype(np.uint8)
        for part in np.array_split(images, max(1, len(images) // 256))
    ]
    return np.concatenate(parts)


def _video(images: np.ndarray, videos: np.ndarray, level: float) -> np.ndarray:
    result = np.empty_like(images)
    for rows in pd.Series(np.arange(len(images))).groupby(videos).indices.values():
        result[rows] = recompress(images[rows], int(level))
    return result


@dataclass(frozen=True)
class Perturbation:
    """One way to spoil frames, at several strengths.

    Attributes:
        name, unit: for tables and axes.
        levels: from harmless to strong.
        apply: ``(images (N, H, W, 3) uint8, video of each (N,), level) -> images``; frames of a video in order.
    """

    name: str
    unit: str
    levels: tuple[float, ...]
    apply: Callable[[np.ndarray, np.ndarray, float], np.ndarray]


PERTURBATIONS = (
    Perturbation("jpeg", "quality", (100, 90, 80, 70, 60, 50, 40, 30), _each(lambda image, q: jpeg(image, int(q)))),
    Perturbation("blur", "sigma, pixels", (0.5, 1.0, 1.5, 2.0), _each(lambda image, sigma: cv2.GaussianBlur(image, (0, 0), sigma))),
    Perturbation("resize", "factor", (0.9, 0.75, 0.5, 0.35), _each(shrink_and_enlarge)),
    Perturbation("noise", "sigma, grey levels", (2, 5, 10, 20), _noise),
    Perturbation("h264", "constant rate factor", (18, 23, 32, 40), _video),
)


def spoiled(frames: FrameSet) -> Iterator[tuple[str, float, np.ndarray]]:
    """Every perturbation at every level as ``(name, level, images)``, after the untouched frames as ``("none", 0, ...)``.

    Frames are spoiled at the size the detector takes them in, real and fake alike; within a video they must be in order.
    """
    images, videos = frames.array(), frames.table["video"].to_numpy()
    yield "none", 0.0, images
    for perturbation in PERTURBATIONS:
        for level in perturbation.levels:
            yield perturbation.name, level, perturbation.apply(images, videos, level)


def curves(
    predict: Callable[[np.ndarray], np.ndarray], frames: FrameSet, threshold: float, *, resamples: int = 500, told: Any = None
) -> list[dict[str, Any]]:
    """The detector's measures on spoiled test frames.

    Args:
        predict: ``(N, H, W, 3)`` uint8 -> ``(N,)`` P(fake).
        frames: real and fake test frames at the detector's size.
        threshold: the detector's own, not chosen anew.
        resamples: of the bootstrap over videos.
        told: called after each level.

    Returns:
        Rows ``perturbation, level, metric, value, low, high, n`` for the measures in :data:`CURVES`.
    """
    from toolkit.detector.module import summarise

    frames = FrameSet(frames.images, frames.table.sort_values(["video", "index"], ignore_index=True))
    about = frames.table[[c for c in ("video", "group", "label", "index") if c in frames.table]]
    rows: list[dict[str, Any]] = []
    for name, level, images in spoiled(frames):
        figures = summarise(about.assign(score=predict(images)), threshold, resamples=resamples)
        rows += [{"perturbation": name, "level": level, "metric": metric, **asdict(figures[metric])} for metric in CURVES]
        if told is not None:
            told()
    return rows


def levels() -> int:
    """How many variants of the frames :func:`spoiled` yields."""
    return 1 + sum(len(p.levels) for p in PERTURBATIONS)


def main(argv: list[str]) -> int:
    """``toolkit detector robustness``."""
    from toolkit.cli import Parser
    from toolkit.errors import UserError

    parser = Parser(
        "toolkit detector robustness",
        description="Test a detector on frames that were compressed (JPEG 100 to 30, H.264), blurred, resized or noisy: a curve of "
        "AUC with 95%% intervals over videos for each; and show where it looks (Grad-CAM) and what residual spectra it was given.",
        epilog="Writes robustness.csv, robustness.html, gradcam.png and spectra.png. Frames are spoiled at the detector's input size.",
    )
    parser.add_argument("checkpoint", type=Path, help="of a detector")
    parser.add_argument("manifests", nargs="+", help="manifests (or their folders) with real and fake frames")
    parser.add_argument("--out", type=Path, help="folder for the results (default: robustness beside the checkpoint)")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="(default %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=64, help="at most this many frames of each video, from its start (default %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")

    from rich.progress import Progress

    from toolkit.console import console, print_rows
    from toolkit.data.frames import load_frames
    from toolkit.detector import explain
    from toolkit.detector.data import join_frames
    from toolkit.detector.module import Detector
    from toolkit.files import atomic, write_text
    from toolkit.gan.data import open_manifest

    detector = Detector.from_checkpoint(args.checkpoint)
    if detector.head_kind() == "identity":
        raise UserError("this detector predicts a target, not real or fake; robustness is measured for the latter")
    frames = join_frames([load_frames(open_manifest(m), detector.options.image_size) for m in args.manifests])
    frames = frames.select(frames.table["split"] == args.split)
    found = set(frames.table["label"])
    if found != {"real", "fake"}:
        missing = " and ".join(sorted({"real", "fake"} - found))
        raise UserError(f"split {args.split} of these manifests has no {missing} frames; AUC needs both")
    table = frames.table.sort_values(["video", "index"])
    frames = FrameSet(frames.images, table[table.groupby("video").cumcount() < args.limit].reset_index(drop=True))
    out = args.out or args.checkpoint.parent / "robustness"
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("testing", total=levels())
        rows = pd.DataFrame(
            curves(lambda images: explain.predict(detector, images), frames, float(detector.threshold), told=lambda: bar.advance(task))
        )
    with atomic(out / "robustness.csv") as temporary:
        rows.to_csv(temporary, index=False)
    explain.write_pictures(detector, frames, out)

    from toolkit.study.figures import robustness

    page = robustness(rows.assign(label="detector"), ["detector"]).to_html(include_plotlyjs=True, full_html=True)
    write_text(out / "robustness.html", page)
    shown = rows[rows["metric"] == "frame auc"]
    print_rows(
        "frame AUC",
        ("frames", "level", "AUC", "95% interval", "videos"),
        [(r.perturbation, f"{r.level:g}", f"{r.value:.3f}", f"{r.low:.3f} to {r.high:.3f}", r.n) for r in shown.itertuples()],
    )
    print(f"{out / 'robustness.csv'}, robustness.html, gradcam.png, spectra.png")
    return 0
