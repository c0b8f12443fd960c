"""The manifest: a table with one row for every frame of a prepared dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit.data.layouts import IDENTITY_SEPARATOR, VideoItem
from toolkit.errors import UserError
from toolkit.files import atomic

COLUMNS = ("frame", "video", "identity", "label", "method", "source", "split", "index", "time_s", "box")
SPLITS = ("train", "val", "test")
DEFAULT_RATIOS = {"train": 0.6, "val": 0.2, "test": 0.2}


@dataclass
class Manifest:
    """A prepared dataset.

    Attributes:
        root: the folder that frame paths are relative to.
        table: one row per frame, with the columns of :data:`COLUMNS` and any others (targets of a regression, say).
    """

    root: Path
    table: pd.DataFrame

    @classmethod
    def load(cls, path: Path | str, *, check_files: bool = True, check_splits: bool = True) -> Manifest:
        """Read ``manifest.csv`` (or the folder that holds it) and check it.

        Raises:
            UserError: it is missing or malformed, a frame is gone or lies outside the dataset's folder, or an identity
                or a video stands on both sides of a split.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "manifest.csv"
        try:
            table = pd.read_csv(
                path,
                dtype=dict.fromkeys(("frame", "video", "identity", "label", "method", "source", "split", "box"), str),
            )
        except FileNotFoundError as error:
            raise UserError(f"{path} is not there; make it with `toolkit data prepare` or `toolkit data puppets`") from error
        except (ValueError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as a manifest: {str(error).splitlines()[0]}") from error
        missing = [c for c in COLUMNS if c not in table.columns]
        if missing:
            raise UserError(f"{path} is not a manifest: it lacks the column(s) {', '.join(missing)}")
        strings = ["frame", "video", "identity", "label", "method", "source", "split", "box"]
        table[strings] = table[strings].fillna("")
        for column in ("index", "time_s"):
            table[column] = pd.to_numeric(table[column], errors="coerce")
            if table[column].isna().any():
                raise UserError(f"{path}: column {column} holds something that is not a number")
        manifest = cls(path.parent, table)
        manifest.check(path, check_files=check_files, check_splits=check_splits)
        return manifest

    def check(self, name: Path | str = "manifest", *, check_files: bool = False, check_splits: bool = True) -> None:
        """Raise :class:`UserError` unless labels, splits and paths are sound and the splits are disjoint."""
        table = self.table
        if table.empty:
            raise UserError(f"{name} lists no frame")
        for column, allowed in (("label", {"real", "fake"}), ("split", {*SPLITS, ""})):
            wrong = sorted(set(table[column]) - allowed)
            if wrong:
                raise UserError(f"{name}: {column} {wrong[0]!r} is not one of {', '.join(sorted(allowed - {''}))}")
        if (table["identity"] == "").any() or (table["video"] == "").any():
            raise UserError(f"{name}: a frame without a video or an identity")
        for what, owners in (("identity", identity_splits(table)), ("video", video_splits(table))) if check_splits else ():
            for owner, splits in owners.items():
                if len(splits) > 1:
                    raise UserError(
                        f"{name}: the {what} {owner!r} stands in {' and '.join(sorted(splits))}; "
                        "a detector would be tested on what it was trained on. Prepare the dataset again with --split identity"
                    )
        root = self.root.resolve()
        for frame in table["frame"]:
            path = (root / frame).resolve()
            if not path.is_relative_to(root):
                raise UserError(f"{name}: the frame {frame!r} lies outside of the dataset's folder")
            if check_files and not path.is_file():
                raise UserError(f"{name}: the frame {frame} is gone; prepare the dataset again")

    def save(self, path: Path | None = None) -> Path:
        """Write the table to ``path`` (``manifest.csv`` in the root by default), atomically."""
        path = path or self.root / "manifest.csv"
        with atomic(path) as temporary:
            self.table.to_csv(temporary, index=False)
        return path

    def select(self, **criteria: str | Sequence[str]) -> Manifest:
        """The frames whose columns equal (or are among) the given values, e.g. ``select(split="train", label="real")``."""
        keep = np.ones(len(self.table), dtype=bool)
        for column, wanted in criteria.items():
            keep &= self.table[column].isin([wanted] if isinstance(wanted, str) else list(wanted)).to_numpy()
        return Manifest(self.root, self.table[keep].reset_index(drop=True))

    def paths(self) -> list[Path]:
        """Absolute paths of the frames, in the table's order."""
        return [self.root / frame for frame in self.table["frame"]]

    def fingerprint(self) -> str:
        """A hash of the table and of the size of every frame file: changes when the data does."""
        digest = hashlib.sha256(self.table.to_csv(index=False).encode())
        for path in self.paths():
            try:
                digest.update(str(path.stat().st_size).encode())
            except FileNotFoundError as error:
                raise UserError(f"the frame {path} is gone; prepare the dataset again") from error
        return digest.hexdigest()[:16]

    def summary(self) -> pd.DataFrame:
        """Frames, videos and identities by split, label and method."""
        return (
            self.table.groupby(["split", "label", "method"])
            .agg(identities=("identity", "nunique"), videos=("video", "nunique"), frames=("frame", "count"))
            .reset_index()
        )


def identities_of(identity: str) -> list[str]:
    """The single identities that an ``identity`` entry names."""
    return [part for part in identity.split(IDENTITY_SEPARATOR) if part]


def identity_splits(table: pd.DataFrame) -> dict[str, set[str]]:
    """Each single identity -> the splits it stands in (a frame without a split counts as ``''``)."""
    result: dict[str, set[str]] = {}
    for row in table[["identity", "split"]].drop_duplicates().itertuples(index=False):
        for identity in identities_of(str(row.identity)):
            result.setdefault(identity, set()).add(str(row.split))
    return result


def video_splits(table: pd.DataFrame) -> dict[str, set[str]]:
    """Each video -> the splits it stands in."""
    pairs = table[["video", "split"]].drop_duplicates()
    result: dict[str, set[str]] = {}
    for row in pairs.itertuples(index=False):
        result.setdefault(str(row.video), set()).add(str(row.split))
    return result


def assign_splits(
    items: Sequence[VideoItem], ratios: Mapping[str, float] | None = None, *, seed: int = 0, official: bool = True
) -> tuple[list[VideoItem], dict[str, str]]:
    """Give every video a split so that no identity stands on two sides.

    Identities that share a video (target and source of a swap) are kept together while the groups stay small. Where
    they chain up into groups of more than half of all people (as in Celeb-DF), each identity gets a side of its own
    and videos that join two sides are left out.

    Args:
        items: the videos of a listing.
        ratios: share of identities for each split.
        seed: the shuffle of identities.
        official: keep the splits that the dataset's own files give; videos of other splits that show an identity of an
            official test or val video are left out.

    Returns:
        The videos with their splits, and the reason for each video that was left out.
    """
    ratios = dict(ratios or DEFAULT_RATIOS)
    fixed: dict[str, str] = {}
    for item in items if official else []:
        for identity in identities_of(item.identity) if item.split else ():
            # Where official splits overlap in identities, test has the first claim, then val.
            order = {"test": 2, "val": 1, "train": 0}
            if order[item.split] >= order.get(fixed.get(identity, "train"), 0):
                fixed[identity] = item.split
    people = sorted({identity for item in items for identity in identities_of(item.identity)})
    groups = _groups(items, people)
    if max((len(g) for g in groups), default=0) > max(2, len(people) // 2):
        groups = [[person] for person in people]
    side = dict(fixed)
    free = [g for g in groups if not any(person in fixed for person in g)]
    for group in groups:
        taken = {fixed[person] for person in group if person in fixed}
        if taken:
            side.update({person: fixed.get(person, sorted(taken)[0]) for person in group})
    np.random.default_rng(seed).shuffle(free)
    side.update(_fill(free, ratios, side))
    kept, dropped = [], {}
    for item in items:
        sides = {side[person] for person in identities_of(item.identity)}
        if len(sides) > 1:
            dropped[item.video] = f"its identities {item.identity} stand on different sides ({', '.join(sorted(sides))})"
        elif official and item.split and item.split not in sides:
            dropped[item.video] = f"official split {item.split}, but its identity {item.identity} belongs to {sides.pop()}"
        else:
            kept.append(replace(item, split=sides.pop()))
    return kept, dropped


def _groups(items: Iterable[VideoItem], people: list[str]) -> list[list[str]]:
    """Connected components of people who share a video."""
    parent = {person: person for person in people}

    def find(person: str) -> str:
        while parent[person] != person:
            parent[person] = parent[parent[person]]
            person = parent[person]
        return person

    for item in items:
        first, *rest = identities_of(item.identity)
        for other in rest:
            parent[find(other)] = find(first)
    groups: dict[str, list[str]] = {}
    for person in people:
        groups.setdefault(find(person), []).append(person)
    return list(groups.values())


def _fill(groups: list[list[str]], ratios: Mapping[str, float], taken: Mapping[str, str]) -> dict[str, str]:
    """Hand out groups one by one to the split that is furthest below its share."""
    counts = {split: sum(s == split for s in taken.values()) for split in ratios}
    total = sum(ratios.values())
    everyone = sum(counts.values()) + sum(len(g) for g in groups)
    side: dict[str, str] = {}
    for group in sorted(groups, key=len, reverse=True):
        # An empty split comes first: with three people, train, val and test get one each.
        need = {s: (counts[s] == 0 and r > 0, r / total * everyone - counts[s]) for s, r in ratios.items() if r > 0}
        split = max(need, key=lambda s: need[s])
        counts[split] += len(group)
        side.update(dict.fromkeys(group, split))
    return side
