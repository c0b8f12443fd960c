"""`toolkit gan` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from toolkit import Manifest, UserError
from toolkit.cli import run
from toolkit.data.video import count_frames
from toolkit.gan.module import GAN

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "gan" / "puppets32.yaml")
SMALL = [
    "--model.generator_width",
    "4",
    "--model.discriminator_width",
    "4",
    "--data.batch_size",
    "16",
    "--samples.every",
    "4",
    "--samples.frames",
    "6",
    "--model.validation_images",
    "32",
    "--trainer.val_check_interval",
    "4",
    "--trainer.enable_progress_bar",
    "false",
]


@pytest.fixture(scope="module")
def trained(puppets: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gan")
    run(
        [
            "gan",
            "fit",
            "--config",
            CONFIG,
            "--data.manifest",
            str(puppets.root),
            "--out",
            str(out),
            "--trainer.max_steps",
            "8",
            *SMALL,
        ]
    )
    return out


def test_fit_leaves_a_complete_run_folder(trained: Path) -> None:
    assert {p.name for p in (trained / "checkpoints").iterdir()} >= {"last.ckpt"}
    assert any(p.name.startswith("best") for p in (trained / "checkpoints").iterdir())
    assert {p.name for p in (trained / "samples").iterdir()} == {f"step-{s:07d}.{e}" for s in (4, 8) for e in ("png", "webm")}
    history = pd.read_csv(trained / "history.csv")
    assert list(history[history["name"] == "val/frechet"]["step"]) == [4, 8]
    assert set(pd.read_csv(trained / "health.csv").columns) == {"step", "site", "measure", "value"}
    assert (trained / "config.yaml").is_file()
    assert list(trained.rglob("events.out.tfevents.*"))


def test_tensorboard_has_grids_and_walks(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(trained.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert {"samples", "walk"} <= set(events.Tags()["images"])
    assert events.Images("samples")[0].encoded_image_string[:4] == b"\x89PNG"
    assert events.Images("walk")[0].encoded_image_string[:3] == b"GIF"
    assert any(tag.startswith("health/generator.up1.act/") for tag in events.Tags()["scalars"])


def test_saved_config_continues_the_run(trained: Path) -> None:
    run(["gan", "fit", "--config", str(trained / "config.yaml"), "--trainer.max_steps", "10", "--ckpt_path", "last"])
    assert torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 8
    assert pd.read_csv(trained / "history.csv")["step"].max() >= 8


def test_test_measures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        [
            "gan",
            "test",
            "--config",
            str(trained / "config.yaml"),
            "--ckpt_path",
            str(trained / "checkpoints" / "last.ckpt"),
        ]
    )
    printed = capsys.readouterr().out
    assert "test/Fréchet distance" in printed
    assert "test/sliced Wasserstein" in printed


def test_sample_renders_clips_grid_and_manifest(trained: Path, tmp_path: Path) -> None:
    arguments = [
        "gan",
        "sample",
        str(trained / "checkpoints" / "last.ckpt"),
        str(tmp_path / "s"),
        "--clips",
        "5",
        "--frames",
        "7",
        "--manifest",
    ]
    run(arguments)
    names = {p.name for p in (tmp_path / "s").iterdir()}
    assert names == {*(f"clip-{i:03d}.webm" for i in range(5)), "all.webm", "grid.png", "frames", "manifest.csv"}
    assert count_frames(tmp_path / "s" / "clip-000.webm") == 7
    manifest = Manifest.load(tmp_path / "s")
    assert len(manifest.table) == 35
    assert set(manifest.table["label"]) == {"fake"}
    assert set(manifest.table["split"]) == {"train", "val", "test"}
    first = (tmp_path / "s" / "frames" / "0000" / "000000.png").read_bytes()
    run([*arguments[:3], str(tmp_path / "t"), *arguments[4:]])
    assert (tmp_path / "t" / "frames" / "0000" / "000000.png").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--config", CONFIG, "--model.nothing", "1"], "nothing"),
        (["fit", "--config", CONFIG, "--trainer.max_step", "5"], "max_step"),
        (["fit", "--config", CONFIG, "--model.image_size", "big"], "image_size"),
        (["fit", "--config", CONFIG, "--model.image_size", "33"], "image_size is 16, 32"),
        (["fit", "--config", CONFIG, "--model.activations.generator", "{up9: relu}"], "matches no site"),
        (["fit", "--config", CONFIG, "--model.activations.generator", "{'*': rleu}"], "Did you mean 'relu'"),
        (["fit", "--config", CONFIG, "--data.manifest", "/nowhere"], "is not there"),
        (["fit", "--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["train"], "unknown command 'train'"),
        (["sample", "/nowhere.ckpt", "out"], "is not there"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(["gan", *arguments])
    assert "\n" not in str(caught.value)


def test_configs_run_as_they_stand() -> None:
    import yaml

    for path in (ROOT / "configs" / "gan").glob("*.yaml"):
        GAN(**yaml.safe_load(path.read_text())["model"])
