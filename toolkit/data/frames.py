"""Frames as arrays: a memory-mapped cache of decoded frames, clips cut from it, and reproducible batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from toolkit.data.faces import resize
from toolkit.data.manifest import Manifest
from toolkit.data.video import VideoError, read_image
from toolkit.errors import UserError
from toolkit.files import atomic


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Places of at most ``limit`` of ``count`` items, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int)


@dataclass
class FrameSet:
    """Decoded frames and their manifest rows.

    Attributes:
        images: ``(N, size, size, 3)`` uint8 RGB, usually memory-mapped.
        table: the manifest's rows; ``table.row`` is each one's place in ``images``.
    """

    images: np.ndarray
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def select(self, keep: np.ndarray | pd.Series) -> FrameSet:
        """The rows where ``keep`` is true; the images are shared, not copied."""
        return FrameSet(self.images, self.table[np.asarray(keep)].reset_index(drop=True))

    def rows(self) -> np.ndarray:
        """Places of the rows in ``images``."""
        return self.table["row"].to_numpy()

    def array(self) -> np.ndarray:
        """The frames of all rows as one ``(N, size, size, 3)`` array in memory."""
        return self.images[self.rows()]

    def clips(self, length: int) -> tuple[list[np.ndarray], list[str]]:
        """Runs of ``length`` consecutive frames of one video, each ``(length, size, size, 3)``, and their videos."""
        clips, videos = [], []
        for video, rows in self.table.groupby("video", sort=True):
            rows = rows.sort_values("index")
            index, place = rows["index"].to_numpy(), rows["row"].to_numpy()
            start = 0
            while start + length <= len(index):
                if index[start + length - 1] - index[start] == length - 1:
                    clips.append(self.images[place[start : start + length]])
                    videos.append(str(video))
                    start += length
                else:
                    start += 1
        return clips, videos


def load_frames(manifest: Manifest, size: int) -> FrameSet:
    """Decode every frame of ``manifest`` at ``size`` pixels once, and map it into memory from then on.

    The cache lies in ``cache/`` beside the manifest, under a name that changes with the data and the size.

    Raises:
        UserError: a frame cannot be decoded.
    """
    table = manifest.table.copy()
    table["row"] = np.arange(len(table))
    path = manifest.root / "cache" / f"frames-{size}-{manifest.fingerprint()}.npy"
    if not path.is_file():
        _build_cache(manifest, size, path)
    return FrameSet(np.load(path, mmap_mode="r"), table)


def _build_cache(manifest: Manifest, size: int, path: Path) -> None:
    from rich.progress import track

    from toolkit.console import console

    with atomic(path) as temporary:
        shape = (len(manifest.table), size, size, 3)
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        paths = manifest.paths()
        steps = range(len(paths))
        for place in track(steps, "decoding frames", console=console, transient=True) if len(paths) > 2000 else steps:
            try:
                image = read_image(paths[place])
            except VideoError as error:
                raise UserError(f"the frame {paths[place]}: {error}") from error
            array[place] = cv2.cvtColor(resize(image, size), cv2.COLOR_BGR2RGB)
        array.flush()


def to_float(images: Tensor) -> Tensor:
    """``(N, H, W, 3)`` uint8 to ``(N, 3, H, W)`` float32 in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def as_float(images: np.ndarray) -> Tensor:
    """:func:`to_float` of an array ``(N, H, W, 3)`` uint8, however it lies in memory."""
    return to_float(torch.from_numpy(np.ascontiguousarray(images)))


def to_uint8(images: Tensor) -> Tensor:
    """``(N, 3, H, W)`` floats, clamped to [-1, 1], to ``(N, H, W, 3)`` uint8."""
    return images.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Batches(Sampler[list[int]]):
    """Batches of indices whose order depends on the seed and the number of batches seen, not on workers or interruptions.

    Each iteration is one epoch: a new order of all items, the last incomplete batch left out. Under ``torch.distributed``
    every process takes its own part of each batch, so the total batch stays ``batch_size``.

    Args:
        count: number of items.
        batch_size: total batch over all processes.
        seed: of the order.
        weights: one positive number per item: drawn with replacement in proportion to it. None: a permutation.

    Raises:
        UserError: there are fewer items than one batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, weights: np.ndarray | None = None) -> None:
        if count < batch_size:
            raise UserError(f"there are only {count} training frames, fewer than one batch of {batch_size}: lower batch_size")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.weights = None if weights is None else weights / weights.sum()
        # Epoch, this process, their number: loader workers see them through shared memory.
        self.flags = torch.tensor([0, 0, 1]).share_memory_()
        self._next = (0, 0)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def start_at(self, batch: int) -> None:
        """Let the next iteration begin with batch number ``batch``, counted from the start of the training."""
        self._next = divmod(batch, len(self))

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: nothing here happens before the first batch is asked for, so an iterator made in vain skips nothing.
        (epoch, first), self._next = self._next, (self._next[0] + 1, 0)
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            order = rng.permutation(self.count)
        else:
            order = rng.choice(self.count, size=self.count, p=self.weights)
        rank, world = _process()
        self.flags.copy_(torch.tensor([epoch, rank, world]))
        for batch in range(first, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield indices[rank::world].tolist()


class ArrayDataset(Dataset[dict[str, Tensor]]):
    """Batches straight from a frame array: one gather per batch.

    Args:
        images: ``(N, H, W, 3)`` uint8.
        rows: which of them, in order.
        columns: further per-item arrays, returned under their names.
        transform: applied to one image with a random generator of its own, seeded by seed, epoch, item and place in the
            total batch, so that neither the number of workers or processes nor an interruption changes what comes out.
        seed: of the transform.
    """

    def __init__(
        self,
        images: np.ndarray,
        rows: np.ndarray,
        columns: dict[str, np.ndarray] | None = None,
        transform: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.rows, self.columns = images, rows, columns or {}
        self.transform, self.seed = transform, seed
        self.flags = torch.tensor([0, 0, 1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([item]).items()}

    def __getitems__(self, items: Sequence[int]) -> dict[str, Tensor]:
        images = self.images[self.rows[list(items)]]
        if self.transform is not None:
            epoch, rank, world = self.flags.tolist()
            generators = (np.random.default_rng([self.seed, epoch, int(i), place * world + rank]) for place, i in enumerate(items))
            images = np.stack([self.transform(image, rng) for image, rng in zip(images, generators, strict=True)])
        batch = {key: torch.from_numpy(np.ascontiguousarray(value[list(items)])) for key, value in self.columns.items()}
        return {"image": torch.from_numpy(np.ascontiguousarray(images)), **batch}


def _as_is(batch: Any) -> Any:
    return batch  # the dataset makes whole batches


def loader(dataset: ArrayDataset, batches: Batches | None, *, batch_size: int = 64, workers: int = 0) -> DataLoader[Any]:
    """A DataLoader over ``batches``, or over everything once and in order when that is None: then each of several
    processes gets every n-th item, so that together they see each item once."""
    if batches is not None:
        dataset.flags = batches.flags
        return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_as_is, persistent_workers=workers > 0)
    rank, world = _process()
    return DataLoader(dataset, batch_size=batch_size, sampler=range(rank, len(dataset), world), num_workers=workers, collate_fn=_as_is)


def _process() -> tuple[int, int]:
    """This process's number and their count."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
