"""Synthetic clips as a dataset: frames and a manifest, in the same format as real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from toolkit.data.manifest import COLUMNS, Manifest
from toolkit.errors import UserError
from toolkit.files import atomic

FPS = 25.0


def split_of(place: int, count: int) -> str:
    """Split of clip ``place`` of ``count``: the first 60 % train, the next 20 % val, the rest test."""
    return "train" if place < 0.6 * count else "val" if place < 0.8 * count else "test"


def fake_table(clips: Sequence[np.ndarray], method: str, name: str) -> pd.DataFrame:
    """Manifest rows for ``clips``; every clip is a video and an identity of its own, so splits cannot share one."""
    rows = [
        {
            "frame": f"frames/{place:04d}/{index:06d}.png",
            "video": f"generated/{name}/{place:04d}",
            "identity": f"{name}/{place:04d}",
            "label": "fake",
            "method": method,
            "source": name,
            "split": split_of(place, len(clips)),
            "index": index,
            "time_s": round(index / FPS, 4),
            "box": f"0 0 {clip.shape[2]} {clip.shape[1]}",
        }
        for place, clip in enumerate(clips)
        for index in range(len(clip))
    ]
    return pd.DataFrame(rows)[list(COLUMNS)]


def write_fakes(clips: Sequence[np.ndarray], out: Path, *, method: str, name: str) -> Manifest:
    """Write ``clips``, each ``(T, H, W, 3)`` uint8 RGB, as PNG frames with ``manifest.csv``.

    Raises:
        UserError: there is no clip.
    """
    if not clips:
        raise UserError("there is no clip to write")
    table = fake_table(clips, method, name)
    frames = (frame for clip in clips for frame in clip)
    for path, frame in zip(table["frame"], frames, strict=True):
        with atomic(out / path) as temporary:
            cv2.imwrite(str(temporary), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    manifest = Manifest(out, table)
    manifest.check()
    manifest.save()
    return manifest
