"""From videos on disk to face crops and a manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from toolkit.data.faces import Face, crop, face_detector, follow, square_box, yunet_model
from toolkit.data.layouts import VideoItem
from toolkit.data.manifest import COLUMNS, DEFAULT_RATIOS, Manifest, assign_splits
from toolkit.data.video import IMAGE_SUFFIXES, VideoError, VideoReader, count_frames, read_image
from toolkit.errors import UserError, closest
from toolkit.files import atomic, read_json, write_json
from toolkit.plugins import plugins

SOURCE_FACTS = ("container", "codec", "source width", "source height", "source fps", "source frames", "source bitrate")
PARTLY_DONE = 3  # exit status: finished, but some videos could not be used


@dataclass(frozen=True)
class Settings:
    """What determines the crops of a video; a video prepared under other settings is prepared again.

    Attributes:
        faces: face detector: yunet, haar, none, or a plugin's.
        frames: frames to take from each video, spread evenly.
        window: take them as runs of this many consecutive frames, cropped alike within a run. Motion (flicker, warping
            error) can only be measured on runs.
        size: side of the stored crops in pixels.
        margin: how much larger than the face the crop is, as a share of the face.
    """

    faces: str = "haar"
    frames: int = 32
    window: int = 1
    size: int = 128
    margin: float = 0.3

    def key(self) -> str:
        """A short hash of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def sample_indices(total: int, frames: int, window: int = 1) -> list[int]:
    """Indices of ``frames`` frames of ``total``, as evenly spaced runs of ``window`` consecutive ones.

    The runs sit in the middle of equal parts of the video; a video that is too short gives all of its frames.
    """
    if total <= frames:
        return list(range(total))
    window = min(window, frames)
    runs = max(1, frames // window)
    part = total / runs
    starts = [min(total - window, int(part * run + (part - window) / 2)) for run in range(runs)]
    return sorted({start + offset for start in starts for offset in range(window)})


def _video_frames(item: VideoItem, settings: Settings, record: dict[str, Any]) -> Iterator[tuple[int, float, np.ndarray]]:
    """Chosen frames of a video file or image folder as ``(index, time in seconds, BGR frame)``.

    What could not be read, though other frames could, is noted in ``record["partly"]``.
    """
    if item.path.is_dir():
        files = sorted(p for p in item.path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        bad: list[str] = []
        for index in sample_indices(len(files), settings.frames, settings.window):
            try:
                image = read_image(files[index])
            except VideoError as error:
                bad.append(f"{files[index].name}: {error}")
                continue
            yield index, index / 25.0, image
        if bad:
            record["partly"] = f"{len(bad)} of its images cannot be read, e.g. {bad[0]}"
        return
    with VideoReader(item.path) as reader:
        info = reader.info
        total = info.frames
        got = -1
        wanted = sample_indices(total, settings.frames, settings.window)
        for index, frame in reader.select(wanted):
            got = index
            yield index, index / info.fps, frame
    if got >= 0 and got < 0.9 * wanted[-1]:  # headers may be off by some frames
        record["partly"] = f"it ends after frame {got} of {total}: damaged or cut off"
    if got < 0:
        # The header lies or is silent: count by decoding, then sample again.
        total = count_frames(item.path)
        if total == 0:
            raise VideoError("no frame can be decoded")
        with VideoReader(item.path) as reader:
            for index, frame in reader.select(sample_indices(total, settings.frames, settings.window)):
                yield index, index / info.fps, frame


def _slug(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")[-80:]
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def prepare_video(item: VideoItem, out: Path, settings: Settings, model: Path | None) -> dict[str, Any]:
    """Crop the face of one video's sampled frames into ``out`` and record what was done; the record is written last.

    Returns:
        The record: ``{"key", "video", "error", "without_face", "rows": [...]}``.
    """
    cv2.setNumThreads(1)  # the videos are what runs in parallel
    record_path = out / "videos" / f"{_slug(item.video)}.json"
    stamp = item.path.stat()
    key = f"{settings.key()}-{stamp.st_size}-{stamp.st_mtime_ns}"
    if record_path.is_file():
        try:
            record = read_json(record_path)
        except UserError:
            record = {}
        if record.get("key") == key and all((out / row["frame"]).is_file() for row in record["rows"]):
            return record
    record = {"key": key, "video": item.video, "error": "", "partly": "", "without_face": 0, "rows": [], "source": {}}
    try:
        record["source"] = _source_facts(item.path)
        detect = face_detector(settings.faces, model)[1]
        previous: Face | None = None
        run: list[tuple[int, float, np.ndarray, Face]] = []
        for index, time_s, frame in _video_frames(item, settings, record):
            face = follow(detect(frame), previous)
            if face is None:
                record["without_face"] += 1
                continue
            previous = face
            if run and (index != run[-1][0] + 1 or len(run) >= settings.window):
                _store_run(run, item, out, settings, record)
                run = []
            run.append((index, time_s, frame, face))
        if run:
            _store_run(run, item, out, settings, record)
        if not record["rows"]:
            record["error"] = "no face was found in any frame" if record["without_face"] else record["partly"] or "no frame can be decoded"
    except VideoError as error:
        record["error"] = str(error)
    except cv2.error as error:
        record["error"] = f"OpenCV cannot process it: {str(error).splitlines()[0]}"
    write_json(record_path, record)
    return record


def _source_facts(path: Path) -> dict[str, Any]:
    """What is known of the video file itself, for the shortcut audit."""
    if path.is_dir():
        return {"container": "folder"}
    with VideoReader(path) as reader:
        info = reader.info
    pixels = max(1, info.frames) * max(1, info.width * info.height)
    return {
        "container": path.suffix.lower().lstrip("."),
        "codec": info.codec,
        "source width": info.width,
        "source height": info.height,
        "source fps": round(info.fps, 3),
        "source frames": info.frames,
        "source bitrate": round(path.stat().st_size / pixels, 6),
    }


def _store_run(
    run: list[tuple[int, float, np.ndarray, Face]],
    item: VideoItem,
    out: Path,
    settings: Settings,
    record: dict[str, Any],
) -> None:
    """Crop a run of consecutive frames with one box, the median of its faces: a box that trembles would read as motion."""
    middle = Face(*np.median([[f.x, f.y, f.width, f.height, f.score] for *_, f in run], axis=0).tolist())
    margin = 0.0 if settings.faces == "none" else settings.margin
    for index, time_s, frame, face in run:
        same_size = frame.shape == run[0][2].shape
        box = square_box(middle if same_size else face, margin)
        if settings.faces == "none":
            box = _inner_square(frame)
        name = f"frames/{_slug(item.video)}/{index:06d}.png"
        with atomic(out / name) as temporary:
            ok, data = cv2.imencode(".png", crop(frame, box, settings.size))
            if not ok:
                raise VideoError("its crop cannot be written as PNG")
            data.tofile(temporary)
        record["rows"].append(
            {
                "frame": name,
                "index": index,
                "time_s": round(time_s, 4),
                "box": " ".join(str(v) for v in (*box[:2], box[2], box[2])),
            }
        )


def _inner_square(frame: np.ndarray) -> tuple[int, int, int]:
    height, width = frame.shape[:2]
    side = min(height, width)
    return ((width - side) // 2, (height - side) // 2, side)


def prepare(
    source: Path,
    out: Path,
    layout: str,
    settings: Settings,
    *,
    model: Path | None = None,
    ratios: dict[str, float] | None = None,
    official: bool = True,
    seed: int = 0,
    workers: int = 1,
    limit: int | None = None,
) -> tuple[Manifest, dict[str, str], list[str]]:
    """Prepare a dataset; continues where an earlier call with the same settings stopped.

    Args:
        source: the dataset's folder.
        out: where frames, records and ``manifest.csv`` go.
        layout: name of a dataset layout.
        settings: how frames are sampled and cropped.
        model: the face detector's model file.
        ratios, official, seed: how identities are split, see :func:`toolkit.data.manifest.assign_splits`.
        workers: processes; one video at a time each.
        limit: take only this many videos.

    Returns:
        The manifest, the reason for each video that gave no frame or not all of them, and remarks of the layout.

    Raises:
        UserError: an unknown layout, no video found, or not one video could be used.
    """
    layouts = plugins().mapping("toolkit_dataset_layouts")
    if layout not in layouts:
        raise UserError(f"unknown layout {layout!r}; known: {', '.join(layouts)}.{closest(layout, layouts)}")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    if out.resolve().is_relative_to(source.resolve()) and layout == "folders":
        raise UserError(f"{out} lies inside {source}: its frames would be taken for videos at the next run; choose another folder")
    listing = layouts[layout](source)
    items = _unique(listing.items)[:limit]
    if not items:
        hint = f" ({'; '.join(listing.remarks)})" if listing.remarks else ""
        raise UserError(f"no video was found in {source} with the layout {layout}{hint}; the layouts are {', '.join(layouts)}")
    face_detector(settings.faces, model)  # a missing model is one error, not one per video
    items, dropped = assign_splits(items, ratios, seed=seed, official=official)
    failures = dict(dropped)
    rows: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    for item, record in _run(items, out, settings, model, workers):
        if record["error"] or record.get("partly"):
            failures[item.video] = record["error"] or record["partly"]
        if record["rows"]:
            sources.append({"video": item.video, **record["source"]})
        for row in record["rows"]:
            rows.append({**row, **{k: getattr(item, k) for k in ("video", "identity", "label", "method", "source", "split")}})
    if not rows:
        reasons = "; ".join(f"{video}: {why}" for video, why in list(failures.items())[:3])
        raise UserError(f"not one of {len(items) + len(dropped)} video(s) gave a frame ({reasons})")
    table = pd.DataFrame(rows)[list(COLUMNS)].sort_values(["video", "index"], ignore_index=True)
    manifest = Manifest(out, table)
    manifest.check()
    with atomic(out / "videos.csv") as temporary:
        pd.DataFrame(sources, columns=["video", *SOURCE_FACTS]).sort_values("video").to_csv(temporary, index=False)
    manifest.save()
    write_json(
        out / "prepare.json",
        {"layout": layout, "settings": asdict(settings), "failures": failures, "remarks": listing.remarks},
    )
    return manifest, failures, listing.remarks


def _unique(items: list[VideoItem]) -> list[VideoItem]:
    """Make video names unique: two files that differ only in their suffix keep it."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    for item in items:
        seen[item.video] = seen.get(item.video, 0) + 1
    return [replace(i, video=f"{i.video}{i.path.suffix}") if seen[i.video] > 1 else i for i in items]


def _run(
    items: list[VideoItem], out: Path, settings: Settings, model: Path | None, workers: int
) -> Iterator[tuple[VideoItem, dict[str, Any]]]:
    from rich.progress import Progress

    from toolkit.console import console

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("preparing videos", total=len(items))
        if workers <= 1:
            for item in items:
                yield item, prepare_video(item, out, settings, model)
                bar.advance(task)
            return
        # Not forked from this process: OpenCV's threads, if it has any by now, would be missing in the copy and waited for.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["toolkit.data.prepare"])
        with ProcessPoolExecutor(workers, context, _take_environment, (dict(os.environ),)) as pool:
            futures = [pool.submit(prepare_video, item, out, settings, model) for item in items]
            for item, future in zip(items, futures, strict=True):
                yield item, future.result()
                bar.advance(task)


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def parse_ratios(text: str) -> dict[str, float]:
    """Read ``train=0.6,val=0.2,test=0.2``.

    Raises:
        UserError: another form, an unknown split, or nothing above zero.
    """
    try:
        ratios = {key.strip(): float(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UserError(f"--ratios {text!r} is not of the form train=0.6,val=0.2,test=0.2") from error
    if set(ratios) - set(DEFAULT_RATIOS) or min(ratios.values()) < 0 or sum(ratios.values()) <= 0:
        raise UserError(f"--ratios {text!r}: the splits are train, val and test, each with a share of 0 or more")
    return {**dict.fromkeys(DEFAULT_RATIOS, 0.0), **ratios}


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Options of ``toolkit data prepare``."""
    sub.add_argument("source", type=Path, help="the dataset's folder")
    sub.add_argument("out", type=Path, help="where frames and manifest.csv go")
    sub.add_argument("--layout", required=True, help="faceforensics, celebdf, dfdc, folders, or a plugin's")
    sub.add_argument("--faces", default="auto", help="yunet, haar, none, or a plugin's; auto takes yunet if its model is there")
    sub.add_argument("--face-model", type=Path, help="the face detector's model file (yunet: face_detection_yunet*.onnx)")
    sub.add_argument("--frames", type=int, default=32, help="frames from each video, spread evenly (default %(default)s)")
    sub.add_argument(
        "--window",
        type=int,
        default=1,
        help="take them as runs of this many consecutive frames (default %(default)s); motion can only be measured on runs",
    )
    sub.add_argument("--size", type=int, default=128, help="side of the stored crops in pixels (default %(default)s)")
    sub.add_argument("--margin", type=float, default=0.3, help="how much larger than the face the crop is (default %(default)s)")
    sub.add_argument(
        "--split",
        choices=("official", "identity"),
        default="official",
        help="use the dataset's split files where present, or split by identity alone (default %(default)s)",
    )
    sub.add_argument("--ratios", default="train=0.6,val=0.2,test=0.2", help="share of identities (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="shuffle of the identities (default %(default)s)")
    sub.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    sub.add_argument("--limit", type=int, help="take only the first N videos")


def run(args: argparse.Namespace) -> int:
    """``toolkit data prepare``."""
    from toolkit.console import console, print_table

    for name, least in (("frames", 1), ("window", 1), ("size", 8), ("workers", 1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    if not 0 <= args.margin <= 4:
        raise UserError(f"--margin is a share of the face between 0 and 4, not {args.margin}")
    faces = args.faces if args.faces != "auto" else ("yunet" if yunet_model(args.face_model) else "haar")
    if args.faces == "auto" and faces == "haar":
        console.print("face detector: haar (yunet finds more faces, but its model file was not found; see --face-model)")
    settings = Settings(faces, args.frames, args.window, args.size, args.margin)
    manifest, failures, remarks = prepare(
        args.source,
        args.out,
        args.layout,
        settings,
        model=args.face_model,
        ratios=parse_ratios(args.ratios),
        official=args.split == "official",
        seed=args.seed,
        workers=args.workers,
        limit=args.limit,
    )
    for remark in remarks:
        console.print(f"note: {remark}")
    print_table("frames", manifest.summary())
    used = set(manifest.table["video"])
    for video, reason in failures.items():
        print(f"{'used in part' if video in used else 'left out'}: {video}: {reason}", file=sys.stderr)
    console.print(f"manifest: {manifest.root / 'manifest.csv'}")
    return PARTLY_DONE if failures else 0
