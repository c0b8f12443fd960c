"""The frames that a study's cells work on: who learns from whom, and who is tested on what."""

from __future__ import annotations

import numpy as np

from toolkit.data.fakes import fake_table
from toolkit.data.frames import FrameSet, load_frames
from toolkit.detector.data import join_frames
from toolkit.files import read_json
from toolkit.study.spec import CONTROL, Cell, Study


def real_frames(study: Study, cell: Cell) -> FrameSet:
    """All real frames at the study's size."""
    frames = load_frames(study.manifest, cell.options["data"]["image_size"])
    return frames.select(frames.table["label"] == "real")


def learned_frames(study: Study, cell: Cell) -> FrameSet:
    """The real frames that the GANs learn from."""
    frames = real_frames(study, cell)
    return frames.select((frames.table["split"] == "train") & frames.table["identity"].isin(cell.options["data"]["gan"]))


def in_clips(frames: FrameSet, length: int) -> FrameSet:
    """``frames`` with every video cut into videos of ``length`` frames, the rest left out; column ``group`` keeps the whole.

    Fakes come in clips of that length. Whole videos, several times as long, would be told from them by their length, and
    the means of their scores would scatter less.
    """
    table = frames.table.sort_values(["video", "index"]).copy()
    place = table.groupby("video").cumcount()
    table["group"] = table["video"]
    table["video"] = table["video"] + "#" + (place // length).astype(str)
    table["index"] = place % length
    whole = table.groupby("video")["index"].transform("size") == length
    return FrameSet(frames.images, table[whole].reset_index(drop=True))


def fake_frames(study: Study, key: str, label: str) -> FrameSet | None:
    """The clips of a GAN cell; None if it diverged."""
    if read_json(study.path(key) / "result.json")["status"] != "done":
        return None
    clips = np.load(study.path(key) / "clips.npy", mmap_mode="r")
    table = fake_table(list(clips), method=label, name=label)
    table["row"] = np.arange(len(table))
    return FrameSet(clips.reshape(-1, *clips.shape[2:]), table.assign(group=table["video"]))


def _control(frames: FrameSet, seed: int) -> FrameSet:
    """Real frames only; in each split a random half of the identities is called fake."""
    table = frames.table.copy()
    rng = np.random.default_rng([seed, 0xC0])
    for split in ("train", "val", "test"):
        people = sorted(set(table.loc[table["split"] == split, "identity"]))
        called = [people[i] for i in rng.permutation(len(people))[: len(people) // 2]]
        chosen = (table["split"] == split) & table["identity"].isin(called)
        table.loc[chosen, "label"] = "fake"
        table.loc[chosen, "method"] = CONTROL
    return FrameSet(frames.images, table)


def _of_test(frames: FrameSet) -> FrameSet:
    return frames.select(frames.table["split"] == "test")


def detector_real_frames(study: Study, cell: Cell) -> FrameSet:
    """Real frames for detectors, in clips: the detectors' own training people, and everyone who validates or tests."""
    frames = real_frames(study, cell)
    own = (frames.table["split"] != "train") | frames.table["identity"].isin(cell.options["data"]["detector"])
    return in_clips(frames.select(own), cell.options["clip_frames"])


def detector_frames(study: Study, cell: Cell) -> tuple[FrameSet, dict[str, FrameSet]] | str:
    """Frames for the training and validation of a detector cell, and the test frames by the generator they are fakes of.

    Returns:
        Both, or the reason why there is nothing to train on.
    """
    if cell.label == CONTROL:
        # All training people take part: two identities would not make two classes.
        joined = _control(in_clips(real_frames(study, cell), cell.options["clip_frames"]), cell.seed)
        for split in ("val", "test"):
            if len(set(joined.table.loc[joined.table["split"] == split, "label"])) < 2:
                return "the control needs two identities in val and in test"
        return joined, {CONTROL: _of_test(joined)}
    real = detector_real_frames(study, cell)
    made = {label: fake_frames(study, key, label) for label, key in zip(study.spec.networks(), cell.needs, strict=True)}
    own = made[cell.label]
    if own is None:
        return "its generator diverged"
    tests = {label: join_frames([_of_test(real), _of_test(fakes)]) for label, fakes in made.items() if fakes is not None}
    return join_frames([real, own]), tests
