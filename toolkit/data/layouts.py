"""Dataset layouts: from a folder on disk to a list of videos with label, identity, method and source."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from toolkit.errors import UserError
from toolkit.hookspecs import hookimpl

IDENTITY_SEPARATOR = ";"


@dataclass(frozen=True)
class VideoItem:
    """One video (or folder of images) of a dataset.

    Attributes:
        path: the file, or a folder whose images are the frames in name order.
        video: name that is unique in the dataset: dataset/method/compression/name.
        identity: who is in it; several identities (target and source of a swap) are separated by ``;``.
        label: ``real`` or ``fake``.
        method: how it was made; ``real`` for a real one.
        source: the ``video`` (or name) of the original of a fake; its own name for a real one.
        split: ``train``, ``val`` or ``test`` where the dataset's own files say so, else empty.
    """

    path: Path
    video: str
    identity: str
    label: str = "real"
    method: str = "real"
    source: str = ""
    split: str = ""


@dataclass
class Listing:
    """The videos that a layout found, and remarks for the user (missing parts of a partial copy, files ignored)."""

    items: list[VideoItem]
    remarks: list[str] = field(default_factory=list)


Layout = Callable[[Path], Listing]

FACEFORENSICS_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
_COMPRESSIONS = ("raw", "c0", "c23", "c40")


def _is_video(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def faceforensics(source: Path) -> Listing:
    """FaceForensics++ (Rössler et al. 2019): ``original_sequences`` and ``manipulated_sequences`` with all methods and
    compressions, DeepFakeDetection too. ``splits/{train,val,test}.json`` (or the files beside the folders) are used."""
    listing = Listing([])
    splits = _faceforensics_splits(source, listing)
    for kind, label in (("original_sequences", "real"), ("manipulated_sequences", "fake")):
        root = source / kind
        if not root.is_dir():
            listing.remarks.append(f"{kind} is not there")
            continue
        for method_dir in sorted(p for p in root.iterdir() if p.is_dir()):
            found = 0
            for compression in _COMPRESSIONS:
                for path in sorted((method_dir / compression / "videos").glob("*")):
                    if _is_video(path):
                        found += 1
                        listing.items.append(_faceforensics_item(path, method_dir.name, compression, label, splits))
            if not found:
                listing.remarks.append(f"{kind}/{method_dir.name} holds no video")
    if label_missing := [m for m in FACEFORENSICS_METHODS if not (source / "manipulated_sequences" / m).is_dir()]:
        listing.remarks.append(f"methods not in this copy: {', '.join(label_missing)}")
    return listing


def _faceforensics_splits(source: Path, listing: Listing) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for path in (source / "splits" / f"{split}.json", source / f"{split}.json"):
            if not path.is_file():
                continue
            try:
                pairs = json.loads(path.read_text())
                splits.update({str(name): split for pair in pairs for name in pair})
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} is not a FaceForensics++ split file (a list of pairs of ids): {error}") from error
            break
    if splits and set(splits.values()) != {"train", "val", "test"}:
        listing.remarks.append(f"only these official splits are present: {', '.join(sorted(set(splits.values())))}")
    return splits


def _faceforensics_item(path: Path, method: str, compression: str, label: str, splits: dict[str, str]) -> VideoItem:
    name = path.stem
    video = f"faceforensics/{method}/{compression}/{name}"
    if method in ("actors", "DeepFakeDetection"):
        # actors: 01__walking; DeepFakeDetection: 01_03__walking__HASH (target_source__scene): another set of people.
        people, _, scene = name.partition("__")
        scene = scene.split("__")[0]
        identity = IDENTITY_SEPARATOR.join(f"actor{p}" for p in people.split("_"))
        original = f"actor{people.split('_')[0]}/{scene}"
        return VideoItem(path, video, identity, label, "real" if label == "real" else method, original)
    people_ids = name.split("_")
    known = {splits[p] for p in people_ids if p in splits}
    split = known.pop() if len(known) == 1 else ""
    return VideoItem(
        path,
        video,
        IDENTITY_SEPARATOR.join(people_ids),
        label,
        "real" if label == "real" else method,
        people_ids[0],
        split,
    )


def celebdf(source: Path) -> Listing:
    """Celeb-DF v1 and v2 (Li et al. 2020): ``Celeb-real``, ``Celeb-synthesis``, ``YouTube-real``;
    ``List_of_testing_videos.txt`` gives the official test videos."""
    listing = Listing([])
    official = source / "List_of_testing_videos.txt"
    test: set[str] = set()
    if official.is_file():
        test = {line.split()[-1] for line in official.read_text().splitlines() if line.strip()}
    for folder, label in (("Celeb-real", "real"), ("YouTube-real", "real"), ("Celeb-synthesis", "fake")):
        root = source / folder
        if not root.is_dir():
            listing.remarks.append(f"{folder} is not there")
            continue
        for path in sorted(filter(_is_video, root.iterdir())):
            ids = re.findall(r"id\d+", path.stem)
            identity = IDENTITY_SEPARATOR.join(ids) if ids else f"youtube{path.stem}"
            # id0_id1_0005: the face of id1 put on video id0_0005.
            original = f"{ids[0]}_{path.stem.rsplit('_', 1)[-1]}" if len(ids) == 2 else path.stem
            split = "test" if f"{folder}/{path.name}" in test else ""
            method = "real" if label == "real" else "Celeb-synthesis"
            listing.items.append(VideoItem(path, f"celebdf/{folder}/{path.stem}", identity, label, method, original, split))
    return listing


def dfdc(source: Path) -> Listing:
    """DeepFake Detection Challenge (Dolhansky et al. 2020): one or several parts, each with its ``metadata.json``.

    People are not named: an original and all fakes made from it count as one identity.
    """
    listing = Listing([])
    parts = [source] if (source / "metadata.json").is_file() else sorted(p.parent for p in source.glob("*/metadata.json"))
    if not parts:
        raise UserError(f"{source} holds no metadata.json, neither itself nor in a folder of its own: is it the DFDC layout?")
    for part in parts:
        try:
            metadata = json.loads((part / "metadata.json").read_text())
            entries = {str(k): dict(v) for k, v in metadata.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{part / 'metadata.json'} is not DFDC metadata: {error}") from error
        missing = 0
        originals = set()
        for name, entry in sorted(entries.items()):
            path = part / name
            label = str(entry.get("label", "")).lower()
            if label not in ("real", "fake"):
                listing.remarks.append(f"{part.name}/{name}: no label in metadata.json, left out")
                continue
            original = Path(str(entry.get("original") or name)).stem
            if label == "fake" and f"{original}.mp4" not in entries and not (part / f"{original}.mp4").is_file():
                originals.add(original)
            if not path.is_file():
                missing += 1
                continue
            split = {"train": "", "validate": "val", "test": "test"}.get(str(entry.get("split", "")), "")
            method = "real" if label == "real" else "dfdc"
            video = f"dfdc/{part.name}/{path.stem}"
            listing.items.append(VideoItem(path, video, original, label, method, original, split))
        if missing:
            listing.remarks.append(f"{part.name}: {missing} of {len(entries)} videos of metadata.json are not in this copy")
        if originals:
            listing.remarks.append(f"{part.name}: {len(originals)} original(s) of its fakes are not in this copy")
        extra = [p.name for p in sorted(filter(_is_video, part.iterdir())) if p.name not in entries]
        if extra:
            listing.remarks.append(f"{part.name}: {len(extra)} video(s) without metadata left out, e.g. {extra[0]}")
    return listing


def folders(source: Path) -> Listing:
    """Plain folders. ``real/`` and ``fake/METHOD/`` (or ``fake/``) where they exist, otherwise everything is real.

    Each video file is a video; each folder that directly holds images is one too. The identity is the file's name up
    to the first ``__`` (so ``anna__take1.mp4`` and ``anna__take2.mp4`` show one person).
    """
    listing = Listing([])
    labelled = {p.name.lower(): p for p in source.iterdir() if p.is_dir()}
    if "real" in labelled or "fake" in labelled:
        roots = [(labelled[k], k) for k in ("real", "fake") if k in labelled]
        stray = [p.name for p in source.iterdir() if _is_video(p)]
        if stray:
            listing.remarks.append(f"{len(stray)} video(s) beside real/ and fake/ left out, e.g. {stray[0]}")
    else:
        roots = [(source, "real")]
        listing.remarks.append("there is no folder real/ or fake/, so every video counts as real")
    ignored = 0
    for root, label in roots:
        seen: set[Path] = set()
        for path in sorted(root.rglob("*")):
            if any(part.startswith(".") for part in path.relative_to(root).parts):
                continue
            if path.is_dir():
                continue
            if path.suffix.lower() in IMAGE_SUFFIXES:
                if path.parent in seen:
                    continue
                seen.add(path.parent)
                path = path.parent
            elif not _is_video(path):
                ignored += 1
                continue
            relative = path.relative_to(root)
            inner = relative.parts[:-1]
            method = "real" if label == "real" else (inner[0] if inner else "fake")
            name = relative.with_suffix("") if path.is_file() else relative
            text = name.as_posix() if name.as_posix() != "." else path.name
            identity = Path(text).name.split("__")[0]
            listing.items.append(VideoItem(path, f"{source.name}/{label}/{text}", identity, label, method, identity))
    if ignored:
        listing.remarks.append(f"{ignored} file(s) that are neither video nor image were ignored")
    return listing


@hookimpl
def toolkit_dataset_layouts() -> dict[str, Layout]:
    """The built-in layouts."""
    return {"faceforensics": faceforensics, "celebdf": celebdf, "dfdc": dfdc, "folders": folders}
