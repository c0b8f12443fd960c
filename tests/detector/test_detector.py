"""The detector: front ends, heads, training, test, and detection in a video file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from toolkit import Manifest, UserError, apply_rules
from toolkit.checkpoints import Checkpoints
from toolkit.cli import run
from toolkit.data.fakes import write_fakes
from toolkit.data.frames import load_frames
from toolkit.data.puppets import make_identity, make_motion, render
from toolkit.data.video import VideoReader, write_video
from toolkit.detector.augment import Augmentations, augmenter
from toolkit.detector.data import DetectorData, join_frames
from toolkit.detector.detect import detect_video, follow_faces
from toolkit.detector.module import Detector
from toolkit.detector.networks import DetectorNetwork, LogSpectrum, Residual, classification_loss, make_backbone

QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
}
ROOT = Path(__file__).resolve().parents[2]


def grid_fakes(puppets: Manifest, folder: Path, depth: int) -> Manifest:
    """Puppets with every second pixel darker by ``depth`` grey levels: a trace as upsampling leaves it."""
    clips, _ = load_frames(puppets, 32).clips(12)
    marked = []
    for clip in clips:
        grid = clip.astype(np.int16)
        grid[:, ::2, ::2] -= depth
        marked.append(grid.clip(0, 255).astype(np.uint8))
    return write_fakes(marked, folder, method="grid", name="grid")


@pytest.fixture(scope="module")
def fakes(puppets: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Fakes that only a fine grid gives away."""
    return grid_fakes(puppets, tmp_path_factory.mktemp("fakes"), 14)


@pytest.fixture(scope="module")
def trained(puppets: Manifest, fakes: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detector")
    run(
        [
            "detector",
            "fit",
            "--config",
            str(ROOT / "configs/detector/residual_small.yaml"),
            "--data.manifests",
            f"[{puppets.root}, {fakes.root}]",
            "--out",
            str(out),
            "--trainer.max_steps",
            "40",
            "--trainer.val_check_interval",
            "20",
            "--trainer.enable_progress_bar",
            "false",
            "--data.batch_size",
            "32",
        ]
    )
    return out


def test_residual_is_what_nearest_upsampling_cannot_restore() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    up = nn.functional.interpolate(nn.functional.interpolate(x, scale_factor=0.5, mode="nearest"), scale_factor=2, mode="nearest")
    torch.testing.assert_close(Residual()(x), (x - up) * 2 / 3)
    flat = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), scale_factor=2, mode="nearest")
    assert float(Residual()(flat).abs().max()) == 0
    assert Residual()(torch.randn(1, 3, 5, 7)).shape == (1, 3, 5, 7)


def test_log_spectrum_equals_the_measure() -> None:
    from toolkit.metrics.images import radial_spectrum

    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    front = LogSpectrum(32).eval()
    x = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    ours = front.norm.running_mean + front(x) * (front.norm.running_var + front.norm.eps).sqrt()
    reference = radial_spectrum(image) * 32**2 * 4  # power over the pixels, and grey levels in [-1, 1] instead of [0, 1]
    torch.testing.assert_close(ours[0, 1:], torch.from_numpy(np.log(reference[1:])).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "test_convnext", "test_vit"])
def test_dense_stem_keeps_more_pixels(name: str) -> None:
    x = torch.randn(1, 3, 32, 32)
    sizes = []
    for stem in ("dense", "model"):
        if name == "test_vit" and stem == "model":
            continue
        backbone, width = make_backbone(name, 32, stem)
        assert backbone(x).shape == (1, width)
        features = backbone.forward_features(x)
        sizes.append(
            features.shape[-1] * features.shape[-2] if features.dim() == 4 and name != "test_convnext" else features.numel() // width
        )
    assert len(sizes) == 1 or sizes[0] >= 4 * sizes[1]


def test_backbone_mistakes() -> None:
    with pytest.raises(UserError, match=r"no model 'resnet19'.*Did you mean"):
        make_backbone("resnet19", 32)
    with pytest.raises(UserError, match="not there"):
        make_backbone("test_resnet", 32, weights="/nowhere.pth")


def test_weights_come_from_a_path_only(tmp_path: Path) -> None:
    backbone, _ = make_backbone("test_resnet", 32)
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    again, _ = make_backbone("test_resnet", 32, weights=str(tmp_path / "w.pth"))
    assert torch.equal(again.state_dict()["conv1.0.weight"], backbone.state_dict()["conv1.0.weight"])
    other, _ = make_backbone("test_efficientnet", 32)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="cannot be loaded into this backbone"):
        make_backbone("test_resnet", 32, weights=str(tmp_path / "other.pth"))


def test_losses_fit_the_head() -> None:
    logits = torch.tensor([[0.3], [-1.2]])
    torch.testing.assert_close(
        classification_loss("sigmoid", logits, torch.tensor([1, 0])),
        nn.BCEWithLogitsLoss()(logits[:, 0], torch.tensor([1.0, 0.0])),
    )
    wide = torch.randn(4, 3)
    torch.testing.assert_close(
        classification_loss("softmax", wide, torch.tensor([0, 1, 2, 1])),
        nn.CrossEntropyLoss()(wide, torch.tensor([0, 1, 2, 1])),
    )
    assert float(classification_loss("identity", logits, torch.tensor([0.3, 0.8]))) == pytest.approx(2.0)
    with pytest.raises(UserError, match="use sigmoid"):
        Detector(32, "test_resnet", activations={"head": {"output": "relu"}})


def test_rules_reach_backbone_and_head() -> None:
    detector = Detector(32, "test_resnet", activations={"backbone": {"*": "swish(learn=beta)"}, "head": {"output": "sigmoid"}})
    assert detector.sites["backbone"]["act1"] == "toolkit_builtin/swish(learn=beta)"
    assert detector.sites["head"] == {"output": "toolkit_builtin/sigmoid"}
    network = DetectorNetwork("test_resnet", 32, "rgb", "auto", 1)
    apply_rules(network.head, {})
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 1)


def test_augmentations_depend_on_their_generator_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for options in (Augmentations(), Augmentations(0.5, 1, 1, 1, 1)):
        apply = augmenter(options)
        a, b = (apply(image, np.random.default_rng(5)) for _ in range(2))
        assert (a == b).all()
        assert a.shape == image.shape
        assert a.dtype == np.uint8
    assert (augmenter(Augmentations(0, 0, 0, 0, 0))(image, np.random.default_rng(0)) == image).all()


def test_training_draws_classes_equally_and_any_number_of_workers_the_same(puppets: Manifest, fakes: Manifest) -> None:
    frames = join_frames([load_frames(puppets, 32), load_frames(fakes, 32)])
    few = frames.select(~((frames.table["label"] == "fake") & (frames.table["index"] > 1)))
    batches = []
    for workers in (0, 2):
        data = DetectorData.from_frames(
            few, image_size=32, batch_size=64, augmentations=Augmentations(jpeg=0.5, noise=0.5), seed=3, workers=workers
        )
        batches.append([(b["image"], b["fake"]) for b in data.train_dataloader()])
    share = torch.cat([fake for _, fake in batches[0]]).float().mean()
    assert abs(float(share) - 0.5) < 0.12
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(*batches, strict=True))


def test_splits_may_not_leak_between_manifests(puppets: Manifest) -> None:
    a = load_frames(puppets, 32)
    b = load_frames(puppets, 32)
    b.table = b.table.assign(split="test", label="fake", video="other/" + b.table["video"])
    with pytest.raises(UserError, match="stands in"):
        join_frames([a, b])


def test_learns_a_trace_and_tests_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        [
            "detector",
            "test",
            "--config",
            str(trained / "config.yaml"),
            "--ckpt_path",
            str(trained / "checkpoints" / "best.ckpt"),
        ]
    )
    table = pd.read_csv(trained / "predictions.csv")
    assert set(table["label"]) == {"real", "fake"}
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(table["label"] == "fake", table["score"]) > 0.9
    assert "video auc" in capsys.readouterr().out
    detector = Detector.from_checkpoint(trained / "checkpoints" / "best.ckpt")
    assert 0 < float(detector.threshold) < 1


TWO_PROCESSES = """
import sys
import pytorch_lightning as pl, torch
from toolkit.detector.data import DetectorData
from toolkit.detector.module import Detector

class Plain(Detector):
    # Adam makes a full step of a gradient that is nothing but rounding, and hides one that is twice as large.
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.002, momentum=0.9)

if __name__ == "__main__":
    torch.set_num_threads(1)
    processes, out, real, fake, backbone = int(sys.argv[1]), *sys.argv[2:]
    module = Plain(32, backbone, "residual", seed=1)
    data = DetectorData([real, fake], 32, batch_size=16, seed=1)
    trainer = pl.Trainer(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=4,
                         max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                         use_distributed_sampler=False, enable_checkpointing=False, check_val_every_n_epoch=None,
                         val_check_interval=4, num_sanity_val_steps=0)
    trainer.fit(module, data)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    trainer.test(module, data, verbose=False)
    if trainer.is_global_zero:
        torch.save(weights, out)
        module.predictions.to_csv(out + ".csv", index=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_two_processes_equal_one_and_evaluate_each_frame_once(puppets: Manifest, fakes: Manifest, tmp_path: Path, backbone: str) -> None:
    """The EfficientNet's norms are timm's BatchNormAct2d, norm and activation in one."""
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    weights, tables = [], []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.pt"
        command = [sys.executable, str(script), str(processes), str(path), str(puppets.root), str(fakes.root), backbone]
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        weights.append(torch.load(path, weights_only=True))
        tables.append(pd.read_csv(f"{path}.csv"))
    for name, value in weights[0].items():
        # After four steps the optimum of the temperature is flat, and the threshold any number in a gap.
        if value.dtype.is_floating_point and name not in ("threshold", "temperature"):
            assert float((value - weights[1][name]).abs().max()) < 1e-5 * max(1.0, float(value.abs().max())), name
    start = Detector(32, backbone, "residual", seed=1).state_dict()
    assert max(float((v - start[n]).abs().max()) for n, v in weights[0].items() if n.endswith(".weight")) > 1e-3
    frames = sum(int((m.table["split"] == "test").sum()) for m in (puppets, fakes))
    assert [len(t) for t in tables] == [frames, frames]
    pd.testing.assert_frame_equal(tables[0][["video", "index", "label"]], tables[1][["video", "index", "label"]])
    np.testing.assert_allclose(tables[0]["log_odds"], tables[1]["log_odds"], atol=1e-3)


def test_probabilities_are_calibrated_on_validation_data_and_the_checkpoint_says_how(trained: Path) -> None:
    path = trained / "checkpoints" / "best.ckpt"
    saved = torch.load(path, weights_only=True)["toolkit"]
    detector = Detector.from_checkpoint(path)
    assert saved["calibration"] == {"method": "temperature", "temperature": pytest.approx(float(detector.temperature))}
    assert saved["threshold"] == pytest.approx(float(detector.threshold))
    assert float(detector.temperature) != 1.0
    assert {"backbone", "head"} <= set(saved["sites"])
    assert "torch" in saved["versions"]
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        logits = detector.net.logits(images)
        expected = torch.sigmoid(logits[:, 0] / detector.temperature)
        torch.testing.assert_close(detector(images), expected)


def test_softmax_scores_are_one_minus_real_before_calibration() -> None:
    detector = Detector(32, "test_resnet", "rgb", classes=["real", "a", "b"], activations={"head": {"output": "softmax"}}).eval()
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        plain = 1 - torch.softmax(detector.net.logits(images), dim=1)[:, 0]
        torch.testing.assert_close(detector(images), plain)
        detector.temperature.fill_(3.0)
        torch.testing.assert_close(torch.logit(detector(images)), torch.logit(plain) / 3, rtol=1e-3, atol=1e-4)


def test_last_checkpoint_is_the_last_one_even_when_nothing_improves(puppets: Manifest, fakes: Manifest, tmp_path: Path) -> None:
    class Worse(Detector):
        def on_validation_epoch_end(self) -> None:
            self.log("val/loss", float(self.global_step))

    keep = Checkpoints(tmp_path, "best", monitor="val/loss", enable_version_counter=False)
    data = DetectorData([str(puppets.root), str(fakes.root)], 32, batch_size=16)
    options = {
        **QUIET,
        "enable_checkpointing": True,
        "callbacks": [keep],
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
    }
    trainer = pl.Trainer(max_steps=7, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(Worse(32, "test_resnet", "residual"), data)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


def test_resumed_equals_uninterrupted(puppets: Manifest, fakes: Manifest, tmp_path: Path) -> None:
    frames = join_frames([load_frames(puppets, 32), load_frames(fakes, 32)])

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step in (4, 7):  # in the middle of an epoch of 6 batches, and of the next one
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def train(**keywords: object) -> Detector:
        data = DetectorData.from_frames(frames, image_size=32, batch_size=48, augmentations=Augmentations(noise=0.5), seed=1)
        module = Detector(32, "test_resnet", seed=1)
        trainer = pl.Trainer(**QUIET, max_steps=9, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[SaveAt()])
        trainer.fit(module, data, **keywords)
        return module

    whole = train()
    for step in (4, 7):
        resumed = train(ckpt_path=tmp_path / f"{step}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (step, name)


@pytest.mark.parametrize(
    ("head", "options"),
    [("softmax", {}), ("linear", {"target": "mouth"})],
)
def test_other_heads_train(puppets: Manifest, fakes: Manifest, tmp_path: Path, head: str, options: dict[str, str]) -> None:
    parts = [load_frames(puppets, 32)] if options else [load_frames(puppets, 32), load_frames(fakes, 32)]
    data = DetectorData.from_frames(join_frames(parts), image_size=32, batch_size=32, seed=0, **options)
    module = Detector(32, "test_resnet", activations={"head": {"output": head}})
    trainer = pl.Trainer(**QUIET, max_steps=6, default_root_dir=tmp_path, val_check_interval=3, check_val_every_n_epoch=None)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Detector.from_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(loaded(x), module.eval()(x))
    if head == "softmax":
        assert loaded.options.classes == ["real", "grid"]
        assert ((loaded(x) >= 0) & (loaded(x) <= 1)).all()
    else:
        assert "test/mae" in trainer.callback_metrics


def test_spectrum_baseline_trains(puppets: Manifest, tmp_path: Path) -> None:
    # The highest ring of the spectrum rises by 4 standard deviations; by 1.6 for the fainter grid of the other tests.
    fakes = grid_fakes(puppets, tmp_path / "fakes", 40)
    run(
        [
            "detector",
            "fit",
            "--config",
            str(ROOT / "configs/detector/spectrum_linear.yaml"),
            "--data.manifests",
            f"[{puppets.root}, {fakes.root}]",
            "--model.image_size",
            "32",
            "--out",
            str(tmp_path),
            "--trainer.max_steps",
            "200",
            "--trainer.val_check_interval",
            "200",
            "--trainer.enable_progress_bar",
            "false",
            "--data.batch_size",
            "32",
        ]
    )
    # With two people to validate on, a linear classifier of 17 numbers is judged by what it learned: the trace's ring.
    detector = Detector.from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    weight = detector.net.head["fc"].weight.detach()[0].abs()
    assert int(weight.argmax()) == 16
    assert list(pd.read_csv(tmp_path / "history.csv")["name"].unique()) == ["loss/train", "val/loss", "val/auc"]


def test_faces_between_detections_are_interpolated() -> None:
    from toolkit import Face

    frames = [np.zeros((50, 80, 3), np.uint8) for _ in range(8)]
    calls = []

    def detect(frame: np.ndarray) -> list[Face]:
        calls.append(1)
        return [Face(10.0 * len(calls), 5, 20, 20, 0.9)] if len(calls) < 3 else []

    got = list(follow_faces(iter(frames), 25.0, detect, every=3, size=16, margin=0.3, keep=False))
    assert [g.index for g in got] == list(range(8))
    assert [round(g.face.x, 3) if g.face else None for g in got] == [10, 13.333, 16.667, 20, 20, 20, None, None]
    assert len(calls) == 3
    assert got[0].crop is not None
    assert got[0].crop.shape == (16, 16, 3)


def test_detect_writes_scores_video_and_verdict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = make_identity(4)
    write_video(tmp_path / "clip.webm", (render(who, s, 128) for s in make_motion(23, 2)), 25)
    (tmp_path / "bad.mp4").write_text("no video")
    status = run(
        [
            "detect",
            str(tmp_path / "clip.webm"),
            str(tmp_path / "bad.mp4"),
            "--checkpoint",
            str(trained / "checkpoints" / "best.ckpt"),
            "--out",
            str(tmp_path / "out"),
            "--faces",
            "none",
        ]
    )
    assert status == 3
    printed = capsys.readouterr()
    assert "bad.mp4: not a video" in printed.err
    rows = list(csv.DictReader((tmp_path / "out" / "clip.csv").open()))
    assert len(rows) == 23
    verdict = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert verdict["score"] == pytest.approx(np.mean([float(r["p_fake"]) for r in rows]), abs=1e-4)
    assert verdict["verdict"] == ("fake" if verdict["score"] >= verdict["threshold"] else "real")
    with VideoReader(tmp_path / "out" / "clip.webm") as reader:
        assert sum(1 for _ in reader) == 23
    assert not (tmp_path / "out" / "bad.csv").exists()


def test_a_video_without_a_face_is_undecided(trained: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "grey.webm", (np.full((64, 64, 3), 90, np.uint8) for _ in range(6)), 25)
    detector = Detector.from_checkpoint(trained / "checkpoints" / "best.ckpt")
    verdict = detect_video(tmp_path / "grey.webm", tmp_path / "out", detector, lambda frame: [], annotate=True)
    assert verdict.verdict == "undecided"
    assert json.loads((tmp_path / "out" / "grey.json").read_text())["score"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detector", "fit", "--config", str(ROOT / "configs/detector/residual_small.yaml")], "needs data"),
        (
            [
                "detector",
                "fit",
                "--config",
                str(ROOT / "configs/detector/residual_small.yaml"),
                "--data.manifests",
                "[puppets_are_not_here]",
            ],
            "is not there",
        ),
        (["detect", "x.mp4", "--checkpoint", "/nowhere.ckpt"], "is not there"),
        (["detect"], "required"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.real_data
def test_detect_on_real_clips(real_data: Path, yunet: Path, trained: Path, tmp_path: Path) -> None:
    clips = [
        real_data / "faceforensics/original_sequences/youtube/c23/videos/004.mp4",
        real_data / "dfdc/dfdc_train_part_10/widuwuoiur.mp4",
    ]
    status = run(
        [
            "detect",
            *map(str, clips),
            "--checkpoint",
            str(trained / "checkpoints" / "best.ckpt"),
            "--out",
            str(tmp_path),
            "--faces",
            "yunet",
            "--face-model",
            str(yunet),
            "--no-video",
        ]
    )
    assert status == 0
    for clip in clips:
        verdict = json.loads((tmp_path / f"{clip.stem}.json").read_text())
        assert verdict["frames_with_face"] > 0.9 * verdict["frames"] > 50
