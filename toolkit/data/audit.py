"""Shortcut audit: what could tell real from fake without a look at the face."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd

from toolkit.data.frames import evenly_spaced
from toolkit.data.manifest import Manifest, identities_of, identity_splits, video_splits
from toolkit.data.video import VideoError, read_image
from toolkit.errors import UserError
from toolkit.metrics.detection import Estimate, ranking_measures, video_bootstrap

Severity = Literal["shortcut", "warning", "note", "ok"]
FRAMES_LOOKED_AT = 4
HASH_SIDE = 16
NEAR = 8  # bits of 256
ALIKE = 0.98  # correlation of thumbnails

# Facts that a detector can use without looking at the face, because they are properties of files, not of faces.
METADATA = {
    "format": "file format of the frames",
    "mode": "colour mode of the frames' files",
    "quality": "JPEG quality of the frames' files",
    "width": "width of the stored frames",
    "height": "height of the stored frames",
    "frames": "frames of the video in the manifest",
    "start": "index of its first frame",
    "step": "distance between its frames' indices",
    "interval": "time between its frames",
    "crop scale": "side of the crop in the video over that of the stored frame",
    "container": "container of the source video",
    "codec": "codec of the source video",
    "source width": "width of the source video",
    "source height": "height of the source video",
    "source fps": "frame rate of the source video",
    "source frames": "length of the source video",
    "source bitrate": "bytes per frame and pixel of the source video",
}
# Facts measured in the pixels. Compression and resizing leave them, but a generator does too: reported, not judged.
TRACES = {
    "blocks": "8 x 8 block edges (JPEG or video compression)",
    "fine detail": "share of power above 3/4 of the highest frequency, in decibels (resizing, blur, or the generator)",
    "edge copies": "share of the border that repeats its neighbour (crops over the frame's edge)",
    "clipped": "share of values at 0 or 255",
    "grey": "share of pixels without colour",
}


@dataclass(frozen=True)
class Finding:
    """One line of the audit: ``shortcut`` (decides real or fake, or leaks test into training), ``warning``, ``note``, ``ok``."""

    severity: Severity
    what: str
    detail: str


@dataclass
class Audit:
    """The audit's result.

    Attributes:
        findings: worst first.
        classifier: AUC of a classifier that sees metadata only, on videos of identities it was not trained on; None where
            it cannot be had.
        features: for every fact that varies: ``feature, kind, real, fake, auc`` (of that fact alone, direction ignored).
        videos: number of videos by label.
    """

    findings: list[Finding] = field(default_factory=list)
    classifier: Estimate | None = None
    features: list[dict[str, Any]] = field(default_factory=list)
    videos: dict[str, int] = field(default_factory=dict)

    @property
    def severity(self) -> Severity:
        """The worst finding's."""
        return self.findings[0].severity if self.findings else "ok"

    @property
    def verdict(self) -> str:
        """Two sentences for a report."""
        c = self.classifier
        if c is None:
            first = "A metadata-only classifier could not be trained."
        else:
            above = c.value - 0.5
            apart = "above chance" if c.low > 0.5 else "below chance" if c.high < 0.5 else "which is not told from chance"
            first = (
                f"A classifier that sees metadata only reaches an AUC of {c.value:.3f} (95% interval {c.low:.3f} to {c.high:.3f}, "
                f"{c.n} videos): {above:+.3f} from chance, {apart}."
                if c.low > 0.5 or c.high < 0.5
                else f"A classifier that sees metadata only reaches an AUC of {c.value:.3f} (95% interval {c.low:.3f} to {c.high:.3f}, "
                f"{c.n} videos), {apart}."
            )
        bad = [f.what for f in self.findings if f.severity == "shortcut"]
        return first + (f" Shortcuts: {'; '.join(bad)}." if bad else " No shortcut was found.")

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``audit.json``."""
        return {"verdict": self.verdict, "severity": self.severity, **asdict(self)}


def audit(
    table: pd.DataFrame,
    image_of: Callable[[pd.Series], np.ndarray],
    file_of: Callable[[pd.Series], dict[str, Any]] | None = None,
    sources: pd.DataFrame | None = None,
    *,
    seed: int = 0,
    told: Callable[[], None] | None = None,
) -> Audit:
    """Look for shortcuts in a dataset.

    Args:
        table: rows of one or several manifests.
        image_of: row -> its frame, ``(H, W, 3)`` uint8 RGB.
        file_of: row -> facts of its file: any of ``format, mode, quality, width, height``.
        sources: one row per ``video`` with facts of the source file: any of ``container, codec, source width, source height,
            source fps, source frames, source bitrate``.
        seed: of the classifier.
        told: called after each video.

    Returns:
        The findings, worst first.
    """
    result = Audit()
    facts, hashes, thumbnails, owners = _collect(table, image_of, file_of, told)
    if sources is not None and not sources.empty:
        facts = facts.merge(sources, on="video", how="left")
    result.videos = {label: int((facts["label"] == label).sum()) for label in ("real", "fake")}
    result.findings += _overlaps(table)
    result.findings += _near_duplicates(hashes, thumbnails, owners)
    if min(result.videos.values()) == 0:
        result.findings.append(
            Finding("note", "one class only", "there is nothing to tell apart; give manifests of real and of fake frames")
        )
    else:
        result.features = _compare(facts)
        result.findings += _judge_features(result.features)
        result.classifier = _classifier(facts, seed)
        result.findings += _judge_classifier(result.classifier, result.features)
    unknown = [name for name in ("codec", "source width") if name not in facts or facts[name].isna().all()]
    if unknown and result.videos["real"] + result.videos["fake"] and sources is not None:
        result.findings.append(
            Finding(
                "note", "source videos unknown", "no videos.csv beside the manifest: codec, size and length of the sources are not judged"
            )
        )
    order = {"shortcut": 0, "warning": 1, "note": 2, "ok": 3}
    result.findings.sort(key=lambda f: order[f.severity])
    return result


def _collect(
    table: pd.DataFrame,
    image_of: Callable[[pd.Series], np.ndarray],
    file_of: Callable[[pd.Series], dict[str, Any]] | None,
    told: Callable[[], None] | None,
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray, pd.DataFrame]:
    rows, hashes, thumbnails, owners = [], [], [], []
    for video, frames in table.groupby("video", sort=True):
        frames = frames.sort_values("index")
        index, first = frames["index"].to_numpy(float), frames.iloc[0]
        fact: dict[str, Any] = {"video": video, "label": first["label"], "split": first["split"]}
        # Who stands on a fake's footage; people who share a video must not stand on both sides of a fold.
        fact["person"] = (identities_of(str(first["identity"])) or [str(first["identity"])])[0]
        fact |= {"frames": len(frames), "start": index[0]}
        if len(index) > 1:
            fact |= {"step": float(np.median(np.diff(index))), "interval": float(np.median(np.diff(frames["time_s"].to_numpy(float))))}
        looked = frames.iloc[evenly_spaced(len(frames), FRAMES_LOOKED_AT)]
        traces, files = [], []
        for _, row in looked.iterrows():
            image = image_of(row)
            traces.append(traces_of(image))
            files.append(file_of(row) if file_of else {})
            thumbnail, bits = fingerprint(image)
            thumbnails.append(thumbnail)
            hashes.append(bits)
            owners.append((video, first["split"], first["label"]))
            side = _crop_side(row["box"])
            if side:
                files[-1]["crop scale"] = side / image.shape[0]
        for name in {key for one in files for key in one}:
            values = [one.get(name) for one in files]
            numbers = [v for v in values if isinstance(v, int | float)]
            fact[name] = float(np.median(numbers)) if numbers else "+".join(sorted({str(v) for v in values}))
        fact |= {name: float(np.mean([t[name] for t in traces])) for name in TRACES}
        rows.append(fact)
        if told is not None:
            told()
    return pd.DataFrame(rows), np.array(hashes), np.array(thumbnails), pd.DataFrame(owners, columns=["video", "split", "label"])


def _crop_side(box: str) -> float:
    parts = str(box).split()
    try:
        return float(parts[2]) if len(parts) == 4 else 0.0
    except ValueError:
        return 0.0


def traces_of(image: np.ndarray) -> dict[str, float]:
    """The facts of :data:`TRACES` for an ``(H, W, 3)`` uint8 RGB image."""
    grey = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    blocks = [_block_edges(np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis)) for axis in (0, 1)]
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    height, width = grey.shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    fine = power[radius > 0.375].sum() / max(float(power.sum()), 1e-9)
    edges = [image[0] == image[1], image[-1] == image[-2], image[:, 0] == image[:, 1], image[:, -1] == image[:, -2]]
    return {
        "blocks": float(np.mean(blocks)),
        "fine detail": float(10 * np.log10(fine + 1e-9)),
        "edge copies": float(np.mean([e.all(axis=-1).mean() for e in edges])),
        "clipped": float(((image == 0) | (image == 255)).mean()),
        "grey": float((np.ptp(image, axis=2) == 0).mean()),
    }


def _block_edges(steps: np.ndarray) -> float:
    """How much larger the steps between pixels are at one phase of 8 than at the others: 0 without a grid."""
    usable = len(steps) // 8 * 8
    if usable < 16:
        return 0.0
    phases = steps[:usable].reshape(-1, 8).mean(axis=0)
    top = phases.argmax()
    return float(phases[top] / max(float(np.median(np.delete(phases, top))), 1e-9) - 1)


def fingerprint(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A standardised 16 x 16 grey thumbnail ``(256,)`` float32, and the 256 bits of its difference hash as ``(32,)`` uint8."""
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    thumbnail = small[:, :-1].ravel()
    thumbnail = thumbnail - thumbnail.mean()
    return thumbnail / max(float(np.linalg.norm(thumbnail)), 1e-6), bits


def _overlaps(table: pd.DataFrame) -> list[Finding]:
    found: list[Finding] = []
    sources = {str(k): {str(s) for s in v} for k, v in table.groupby("source")["split"].unique().items() if k}
    for what, owners in (("identities", identity_splits(table)), ("videos", video_splits(table)), ("sources", sources)):
        shared = sorted(name for name, splits in owners.items() if len(splits) > 1)
        if what == "sources":
            # A generator's own clips have it as their source; only footage is a secret to be kept from a split.
            footage = set(table.loc[table["label"] == "real", "source"])
            shared = [name for name in shared if name in footage]
        if shared:
            detail = f"{len(shared)} stand in more than one split: {', '.join(shared[:5])}{' ...' if len(shared) > 5 else ''}"
            found.append(Finding("shortcut", f"{what} shared between splits", detail))
        else:
            found.append(Finding("ok", f"no {what} shared between splits", f"{len(owners)} looked at"))
    return found


def _near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray, owners: pd.DataFrame) -> list[Finding]:
    pairs: dict[tuple[str, str], int] = {}
    split, video = owners["split"].to_numpy(), owners["video"].to_numpy()
    for start in range(0, len(hashes), 256):
        rows = slice(start, start + 256)
        distance = np.bitwise_count(hashes[rows, None, :] ^ hashes[None, :, :]).sum(axis=2, dtype=np.int32)
        near = (distance <= NEAR) & (split[rows, None] < split[None, :])
        for i, j in zip(*np.nonzero(near), strict=True):
            if float(thumbnails[start + i] @ thumbnails[j]) >= ALIKE:
                pair = (str(video[start + i]), str(video[j]))
                pairs[pair] = min(pairs.get(pair, 256), int(distance[i, j]))
    if not pairs:
        return [Finding("ok", "no near-duplicate frames across splits", f"{len(hashes)} frames looked at")]
    label = dict(zip(owners["video"], owners["label"], strict=True))
    shown = [f"{a} and {b}" for (a, b), _ in sorted(pairs.items(), key=lambda item: item[1])[:3]]
    only_fakes = all(label[a] == "fake" == label[b] for a, b in pairs)
    detail = f"{len(pairs)} pairs of videos, e.g. {'; '.join(shown)}"
    if only_fakes:
        return [Finding("warning", "near-duplicate fakes across splits", f"{detail}: the generator repeats itself")]
    return [Finding("shortcut", "near-duplicate frames across splits", detail)]


def _compare(facts: pd.DataFrame) -> list[dict[str, Any]]:
    fake = (facts["label"] == "fake").to_numpy().astype(int)
    rows = []
    for kind, names in (("metadata", METADATA), ("trace", TRACES)):
        for name in names:
            if name not in facts or facts[name].nunique(dropna=False) < 2:
                continue
            column = facts[name]
            numeric = pd.api.types.is_numeric_dtype(column)
            by_label = {label: column[facts["label"] == label] for label in ("real", "fake")}
            if numeric:
                shown = {label: f"{v.median():.4g}" for label, v in by_label.items()}
                # Absent is a value as well: a fact that only one class has gives it away.
                score = column.fillna(column.min() - 1 if column.notna().any() else 0).to_numpy(float)
            else:
                shown = {
                    label: ", ".join(f"{k} {n}" for k, n in v.astype(str).value_counts().head(3).items()) for label, v in by_label.items()
                }
                score = column.astype(str).map(pd.Series(fake).groupby(column.astype(str).to_numpy()).mean()).to_numpy(float)
            auc = float(ranking_measures(fake, score)["auc"][0])
            about = {"feature": name, "kind": kind, "what": names[name]}
            rows.append({**about, **shown, "auc": max(auc, 1 - auc)})
    return sorted(rows, key=lambda row: -row["auc"])


def _judge_features(features: list[dict[str, Any]]) -> list[Finding]:
    found = []
    for row in features:
        detail = f"real {row['real']}; fake {row['fake']}; alone it gives an AUC of {row['auc']:.3f}"
        if row["kind"] == "metadata" and row["auc"] >= 0.95:
            found.append(Finding("shortcut", f"{row['what']} differs", detail))
        elif row["kind"] == "metadata" and row["auc"] >= 0.75:
            found.append(Finding("warning", f"{row['what']} differs", detail))
        elif row["kind"] == "trace" and row["auc"] >= 0.9:
            # A generator leaves such traces too, and a detector may well go by them.
            found.append(Finding("warning" if row["feature"] != "fine detail" else "note", f"{row['what']} differ", detail))
    return found


def _classifier(facts: pd.DataFrame, seed: int) -> Estimate | None:
    """Cross-validated AUC of a random forest on the metadata; no person stands on both sides of a fold."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold

    fake = (facts["label"] == "fake").to_numpy().astype(int)
    people = facts["person"].astype(str).to_numpy()
    folds = min(5, *(len(set(people[fake == k])) for k in (0, 1)))
    if folds < 2:
        return None
    columns = []
    for name in METADATA:
        if name not in facts:
            continue
        if pd.api.types.is_numeric_dtype(facts[name]):
            columns.append(facts[name].fillna(-1.0).to_numpy(float)[:, None])
        else:
            columns.append(pd.get_dummies(facts[name].astype(str)).to_numpy(float))
    data = np.concatenate(columns, axis=1)
    score = np.full(len(facts), 0.5)
    for train, test in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(data, fake, people):
        if len(set(fake[train])) == 2:
            forest = RandomForestClassifier(200, min_samples_leaf=2, class_weight="balanced", random_state=seed)
            score[test] = forest.fit(data[train], fake[train]).predict_proba(data[test])[:, 1]
    return video_bootstrap(facts["video"].tolist(), fake, score, groups=_groups(facts))["video auc"]


def _groups(facts: pd.DataFrame) -> list[str]:
    """What is resampled: a person's videos of one label."""
    return (facts["person"].astype(str) + "/" + facts["label"]).tolist()


def _judge_classifier(classifier: Estimate | None, features: list[dict[str, Any]]) -> list[Finding]:
    if classifier is None:
        return [Finding("note", "no metadata-only classifier", "it needs two people in each class")]
    detail = f"AUC {classifier.value:.3f} ({classifier.low:.3f} to {classifier.high:.3f}), {classifier.value - 0.5:+.3f} from chance"
    telling = [row["feature"] for row in features if row["kind"] == "metadata" and row["auc"] >= 0.75]
    if classifier.low > 0.55:
        return [Finding("shortcut", "metadata tells real from fake", detail + (f"; look at {', '.join(telling[:4])}" if telling else ""))]
    if classifier.low > 0.5:
        return [Finding("warning", "metadata tells real from fake a little", detail)]
    return [Finding("ok", "metadata does not tell real from fake", detail)]


# --- files ---------------------------------------------------------------------------------------------------------

# Quality 50 of the JPEG standard's (Annex K) luminance table; other qualities scale it.
_LUMINANCE_SUM = 3688


def jpeg_quality(table: list[int]) -> int:
    """Quality 1 to 100 of a JPEG's luminance quantisation table, as the Independent JPEG Group's encoder scales it.

    For tables of other encoders it is the quality with about the same total.
    """
    scale = 100.0 * sum(table) / _LUMINANCE_SUM
    quality = (200 - scale) / 2 if scale <= 100 else 5000 / scale
    return int(np.clip(round(quality), 1, 100))


def file_facts(path: Path) -> dict[str, Any]:
    """Format (by content, not by name), colour mode, JPEG quality and size of an image file, from its header.

    Raises:
        VideoError: it is not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            facts: dict[str, Any] = {
                "format": str(image.format),
                "mode": image.mode,
                "width": image.width,
                "height": image.height,
            }
            tables = getattr(image, "quantization", None)
            if tables:
                facts["quality"] = jpeg_quality(list(tables[min(tables)]))
            return facts
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise VideoError(f"{path.name} is not an image: {str(error).splitlines()[0]}") from error


def audit_manifests(paths: list[str], *, seed: int = 0) -> Audit:
    """Audit prepared datasets together, splits included: what :meth:`Manifest.load` would refuse is a finding here.

    Raises:
        UserError: a manifest cannot be read, or its frames cannot.
    """
    from rich.progress import Progress

    from toolkit.console import console

    tables, sources = [], []
    for path in paths:
        manifest = Manifest.load(path, check_splits=False)
        tables.append(manifest.table.assign(path=[str(p) for p in manifest.paths()]))
        record = manifest.root / "videos.csv"
        if record.is_file():
            sources.append(_sources(record))
    table = pd.concat(tables, ignore_index=True)

    def image_of(row: pd.Series) -> np.ndarray:
        try:
            return read_image(Path(row["path"]))[..., ::-1]
        except VideoError as error:
            raise UserError(f"{row['path']}: {error}; prepare the dataset again") from error

    def file_of(row: pd.Series) -> dict[str, Any]:
        try:
            return file_facts(Path(row["path"]))
        except VideoError as error:
            raise UserError(f"{row['path']}: {error}; prepare the dataset again") from error

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("looking at videos", total=table["video"].nunique())
        joined = pd.concat(sources, ignore_index=True).drop_duplicates("video") if sources else pd.DataFrame()
        return audit(table, image_of, file_of, joined, seed=seed, told=lambda: bar.advance(task))


def _sources(record: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(record, dtype={"video": str, "container": str, "codec": str})
    except (ValueError, OSError) as error:
        raise UserError(f"{record} cannot be read: {str(error).splitlines()[0]}") from error
    known = [c for c in METADATA if c in table.columns]
    if "video" not in table:
        raise UserError(f"{record} has no column video; prepare the dataset again")
    return table[["video", *known]]


def run(args: Any) -> int:
    """``toolkit data audit``."""
    from toolkit.console import print_rows
    from toolkit.files import write_json

    found = audit_manifests(args.manifests, seed=args.seed)
    print_rows("findings", ("", "what", "detail"), [(f.severity, f.what, f.detail) for f in found.findings])
    if found.features:
        rows = [(r["feature"], r["kind"], str(r["real"]), str(r["fake"]), f"{r['auc']:.3f}") for r in found.features]
        print_rows("facts that vary, each alone", ("fact", "kind", "real", "fake", "AUC"), rows)
    if args.out:
        write_json(args.out, found.to_json())
        print(f"written: {args.out}", file=sys.stderr)
    print(found.verdict)
    return 1 if found.severity == "shortcut" else 0


def add_arguments(parser: Any) -> None:
    """Options of ``toolkit data audit``."""
    parser.add_argument("manifests", nargs="+", help="manifests (or their folders); real and fake ones together")
    parser.add_argument("--out", type=Path, help="also write the findings as JSON to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the classifier (default %(default)s)")
