"""Killed with SIGKILL at random moments and run again, every long command ends as if it had never been disturbed.

Each moment is tried on a fresh folder. Two moments for each command by default; ``TOOLKIT_KILLS=20`` tries twenty.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from toolkit import Manifest, results_table
from toolkit.data.fakes import write_fakes
from toolkit.data.frames import load_frames
from toolkit.data.video import write_video

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("TOOLKIT_KILLS", "2"))

# Processes are forked from one that has imported everything: a command then takes as long as its own work.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["toolkit.study.cells", "toolkit.study.report", "toolkit.gan.cli", "toolkit.detector.cli"])


def _command(arguments: list[str], log: str) -> None:
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    from toolkit.cli import run

    sys.exit(run(arguments))


def start(arguments: list[str], log: Path) -> Any:
    process = server.Process(target=_command, args=(arguments, str(log)))
    process.start()
    return process


def finish(arguments: list[str], log: Path) -> float:
    """Run to the end; returns the seconds it took."""
    began = time.monotonic()
    process = start(arguments, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-2000:]
    return time.monotonic() - began


def kill_at(seconds: float, arguments: list[str], log: Path) -> bool:
    """Start the command and kill it and its children after so long; whether it was still running."""
    process = start(arguments, log)
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # so early that it has no group of its own yet
            process.kill()
    process.join()
    return alive


def everything_can_be_read(folder: Path) -> None:
    """No file under its own name is half-written; names of files in the making begin with a dot."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".parquet":
            pd.read_parquet(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


def undisturbed(command: Callable[[Path], list[str]], folder: Path) -> tuple[Path, float]:
    """Run ``command(folder)`` to the end; returns the folder and the seconds it took."""
    finish(["--version"], folder.parent / "log.txt")  # the first process also starts the server
    return folder, finish(command(folder), folder.parent / "log.txt")


def try_moments(
    tmp_path: Path,
    command: Callable[[Path], list[str]],
    again: Callable[[Path], list[str]],
    compare: Callable[[Path, Path], None],
    reference: tuple[Path, float] | None = None,
) -> None:
    """Kill ``command(folder)`` at random moments, run ``again(folder)`` to the end, and compare with an undisturbed run."""
    log = tmp_path / "log.txt"
    whole, seconds = reference or undisturbed(command, tmp_path / "undisturbed")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    hit = 0
    for place in range(KILLS):
        folder = tmp_path / f"killed{place}"
        moments = [float(rng.uniform(0.02, 1.0)) * seconds]
        if place % 2:
            moments.append(float(rng.uniform(0.02, 0.8)) * seconds)  # and once more on the way
        for number, moment in enumerate(moments):
            hit += kill_at(moment, command(folder) if number == 0 else again(folder), log)
            if folder.is_dir():
                everything_can_be_read(folder)
        finish(again(folder), log)
        print(f"killed after {', '.join(f'{m:.2f}' for m in moments)} of {seconds:.2f} s")
        compare(folder, whole)
        shutil.rmtree(folder)
    assert hit, "the command was over before any kill"


def same_checkpoints(ours: Path, theirs: Path) -> None:
    a, b = (torch.load(p, weights_only=True) for p in (ours, theirs))
    assert a["global_step"] == b["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state"):
        assert same(a.get(part), b.get(part)), part
    histories = [next(v["rows"] for k, v in c["callbacks"].items() if k.startswith("History")) for c in (a, b)]
    assert [tuple(r) for r in histories[0]] == [tuple(r) for r in histories[1]]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


QUICK = [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_steps",
    "24",
    "--trainer.val_check_interval",
    "4",
    "--data.batch_size",
    "16",
]


@pytest.mark.slow
def test_gan_fit(puppets: Manifest, tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        small = ["--model.generator_width", "8", "--model.discriminator_width", "8", "--model.validation_images", "32"]
        config = ["--config", str(ROOT / "configs/gan/puppets32.yaml"), "--data.manifest", str(puppets.root)]
        return ["gan", "fit", *config, *small, *QUICK, "--samples.every", "8", "--health.every", "5", "--out", str(folder)]

    def compare(ours: Path, theirs: Path) -> None:
        same_checkpoints(ours / "checkpoints/last.ckpt", theirs / "checkpoints/last.ckpt")
        for name in ("history.csv", "health.csv", "sites.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name

    try_moments(tmp_path, command, lambda folder: [*command(folder), "--ckpt_path", "last"], compare)


@pytest.mark.slow
def test_detector_fit(puppets: Manifest, tmp_path: Path) -> None:
    clips, _ = load_frames(puppets, 32).clips(12)
    fakes = write_fakes([255 - c for c in clips], tmp_path / "fakes", method="negative", name="negative")

    def command(folder: Path) -> list[str]:
        config = ["--config", str(ROOT / "configs/detector/residual_small.yaml"), "--data.manifests", f"[{puppets.root}, {fakes.root}]"]
        # Augmentations draw random numbers, so the order of all draws is tested as well.
        extra = ["--data.augmentations.noise", "0.5", "--data.augmentations.jpeg", "0.5"]
        return ["detector", "fit", *config, *extra, *QUICK, "--model.image_size", "32", "--out", str(folder)]

    def compare(ours: Path, theirs: Path) -> None:
        same_checkpoints(ours / "checkpoints/last.ckpt", theirs / "checkpoints/last.ckpt")
        same_checkpoints(ours / "checkpoints/best.ckpt", theirs / "checkpoints/best.ckpt")
        assert (ours / "history.csv").read_bytes() == (theirs / "history.csv").read_bytes()

    try_moments(tmp_path, command, lambda folder: [*command(folder), "--ckpt_path", "last"], compare)


@pytest.mark.slow
def test_data_prepare(puppets: Manifest, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    clips, _ = load_frames(puppets, 32).clips(12)
    for place in range(6):
        frames = np.concatenate([*clips, *clips])[place * 40 : place * 40 + 120]
        write_video(source / f"person{place}.webm", frames.repeat(4, axis=1).repeat(4, axis=2), 25)

    def command(folder: Path) -> list[str]:
        return ["data", "prepare", str(source), str(folder), "--layout", "folders", "--faces", "none", "--frames", "100", "--workers", "2"]

    def compare(ours: Path, theirs: Path) -> None:
        names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and not p.name.startswith(".")} for f in (ours, theirs)]
        assert names[0] == names[1]
        for name in names[0]:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name

    try_moments(tmp_path, command, command, compare)


@pytest.fixture(scope="module")
def small_study(puppets: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = {
        "name": "small",
        "question": "?",
        "data": str(puppets.root),
        "seeds": [0],
        "generators": {"relu": {"*": "relu", "output": "tanh"}, "tanh": {"*": "tanh"}},
        "features": ["random"],
        "gan": {
            "max_steps": 12,
            "batch_size": 16,
            "validations": 4,
            "model": {"generator_width": 4, "discriminator_width": 4, "latent": 16},
        },
        "detector": {"max_steps": 8, "batch_size": 16, "validations": 4, "model": {"backbone": "test_resnet", "front_end": "residual"}},
        "clips": {"count": 10, "frames": 4, "keyframes": 2, "period": 8, "images": 24},
    }
    path = tmp_path_factory.mktemp("spec") / "small.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def table_of(folder: Path) -> pd.DataFrame:
    order = ["cell", "generator", "tested_on", "metric", "checkpoint", "perturbation", "level"]
    return results_table(folder).sort_values(order, ignore_index=True)


@pytest.fixture(scope="module")
def study_command(small_study: Path) -> Callable[[Path], list[str]]:
    return lambda folder: ["study", "run", str(small_study), "--out", str(folder), "--workers", "2"]


@pytest.fixture(scope="module")
def made_study(study_command: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    return undisturbed(study_command, tmp_path_factory.mktemp("made") / "study")


@pytest.mark.slow
def test_study_run(study_command: Callable[[Path], list[str]], made_study: tuple[Path, float], tmp_path: Path) -> None:
    def compare(ours: Path, theirs: Path) -> None:
        pd.testing.assert_frame_equal(table_of(ours), table_of(theirs), check_exact=True)
        for path in theirs.glob("cells/*/checkpoints/*.ckpt"):
            same_checkpoints(ours / path.relative_to(theirs), path)
        for path in theirs.glob("cells/*/*.npy"):
            assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes()

    try_moments(tmp_path, study_command, study_command, compare, made_study)


@pytest.mark.slow
def test_study_report(small_study: Path, made_study: tuple[Path, float], tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        if not folder.is_dir():
            shutil.copytree(made_study[0], folder)
            for name in ("report.html", "results.parquet", "differences.csv"):
                (folder / name).unlink()
        return ["study", "report", str(small_study), "--out", str(folder)]

    def page(folder: Path) -> str:
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", (folder / "report.html").read_text())

    def compare(ours: Path, theirs: Path) -> None:
        assert page(ours) == page(theirs)
        assert (ours / "differences.csv").read_bytes() == (theirs / "differences.csv").read_bytes()
        pd.testing.assert_frame_equal(*(pd.read_parquet(f / "results.parquet") for f in (ours, theirs)), check_exact=True)

    try_moments(tmp_path, command, command, compare)
