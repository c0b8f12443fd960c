"""Robustness curves, Grad-CAM and residual spectra."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from toolkit import Manifest, UserError
from toolkit.cli import run
from toolkit.data.fakes import fake_table, write_fakes
from toolkit.data.frames import FrameSet, load_frames, to_float
from toolkit.detector.explain import cam_picture, grad_cam, predict, residual_spectrum, write_pictures
from toolkit.detector.module import Detector
from toolkit.detector.robustness import CURVES, PERTURBATIONS, curves, levels, recompress, spoiled


def frame_set(puppets: Manifest) -> FrameSet:
    """Real puppets and fakes with a fine grid on them."""
    real = load_frames(puppets, 32)
    clips, _ = real.clips(12)
    marked = [np.where(np.indices(c.shape)[1:3].sum(0) % 2 == 0, c, np.clip(c.astype(int) - 20, 0, 255)).astype(np.uint8) for c in clips]
    table = fake_table(marked, "grid", "grid").assign(row=np.arange(len(marked) * 12) + len(real.images))
    both = pd.concat([real.table, table], ignore_index=True)
    return FrameSet(np.concatenate([real.images, np.concatenate(marked)]), both)


@pytest.fixture(scope="module")
def frames(puppets: Manifest) -> FrameSet:
    return frame_set(puppets)


def by_grid(images: np.ndarray) -> np.ndarray:
    """A detector written by hand: how much the checkerboard frequency stands out."""
    sign = np.where(np.indices(images.shape[1:3]).sum(0) % 2 == 0, 1.0, -1.0)
    strength = (images.mean(axis=-1) * sign).mean(axis=(1, 2))
    return 1 / (1 + np.exp(-(strength - 5) / 2))


def test_curves_start_from_the_untouched_frames_and_fall(frames: FrameSet) -> None:
    told: list[int] = []
    rows = pd.DataFrame(curves(by_grid, frames, 0.5, resamples=100, told=lambda: told.append(1)))
    assert len(told) == levels() == 1 + sum(len(p.levels) for p in PERTURBATIONS)
    assert set(rows["metric"]) == set(CURVES)
    auc = rows[rows["metric"] == "frame auc"].set_index(["perturbation", "level"])
    assert auc.loc[("none", 0.0), "value"] == pytest.approx(1.0)
    assert (auc["low"] <= auc["value"] + 1e-9).all()
    assert (auc["value"] <= auc["high"] + 1e-9).all()
    assert (auc["n"] == 40).all()  # 20 real clips and 20 fake ones, not frames
    # A checkerboard is the first thing that blurring and halving take away, and grey noise hardly touches it.
    assert auc.loc[("blur", 2.0), "value"] < 0.8
    assert auc.loc[("resize", 0.5), "value"] < 0.9
    assert auc.loc[("noise", 2.0), "value"] > 0.99
    assert auc.loc[("jpeg", 100.0), "value"] > 0.99
    again = pd.DataFrame(curves(by_grid, frames, 0.5, resamples=100))
    pd.testing.assert_frame_equal(rows, again)


def test_perturbations_do_what_they_say(frames: FrameSet) -> None:
    part = frames.select(np.arange(len(frames)) < 24)
    original = part.array()
    found = {(name, level): images for name, level, images in spoiled(part)}
    assert np.array_equal(found["none", 0.0], original)
    for (name, _), images in found.items():
        assert images.shape == original.shape
        assert images.dtype == np.uint8
        assert name == "none" or not np.array_equal(images, original)
    noise = found["noise", 10].astype(int) - original
    inside = (original > 40) & (original < 215)
    assert noise[inside].std() == pytest.approx(10, rel=0.03)
    assert abs(noise[inside].mean()) < 0.3
    encoded = cv2.imencode(".jpg", original[0][..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 50])[1]
    assert np.array_equal(found["jpeg", 50][0], cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
    for name, strong in (("jpeg", 30), ("blur", 2.0), ("resize", 0.35), ("h264", 40)):
        errors = [np.abs(images.astype(int) - original).mean() for (n, _), images in found.items() if n == name]
        assert errors[-1] == max(errors)
        assert np.abs(found[name, strong].astype(int) - original).mean() > errors[0]


def test_recompression_keeps_frames_in_order_and_odd_sizes() -> None:
    shades = np.stack([np.full((33, 21, 3), 20 * t, np.uint8) for t in range(10)])
    decoded = recompress(shades, 18)
    assert decoded.shape == shades.shape
    assert np.abs(decoded.astype(int) - shades).max() <= 6
    rng = np.random.default_rng(0)
    texture = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
    clip = np.stack([np.roll(texture, t, axis=1) for t in range(12)])
    error = [np.abs(recompress(clip, crf).astype(int) - clip).mean() for crf in (18, 32, 45)]
    assert error[0] < error[1] < error[2]


class Averaged(nn.Module):
    """Feature maps and their global mean: for such a backbone Grad-CAM has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(x)).mean(dim=(2, 3))


def test_grad_cam_equals_its_closed_form() -> None:
    """After global average pooling and a linear layer the weights are those of the layer over H x W (Selvaraju et al., eq. 5)."""
    torch.manual_seed(0)
    detector = Detector(32, "test_resnet", "rgb")
    detector.net.backbone, detector.net.head["fc"] = Averaged(), nn.Linear(5, 1)
    # The last map that a module gives out is the convolution's; tanh and mean are functions, so they count as what follows.
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    conv = detector.net.backbone.conv(to_float(torch.from_numpy(images)))
    slope = (1 - torch.tanh(conv) ** 2) * detector.net.head["fc"].weight.view(1, 5, 1, 1) / 32**2
    expected = torch.relu((slope.mean(dim=(2, 3), keepdim=True) * conv).sum(dim=1)).detach().numpy()
    expected /= expected.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(grad_cam(detector.eval(), images), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_grad_cam_has_a_map_for_every_kind_of_backbone(backbone: str) -> None:
    detector = Detector(32, backbone, "rgb").eval()
    before = [p.clone() for p in detector.parameters()]
    maps = grad_cam(detector, np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    assert maps.shape == (4, 32, 32)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(detector.parameters(), before, strict=True))


def test_grad_cam_of_a_network_without_maps_is_refused() -> None:
    with pytest.raises(UserError, match="no feature map"):
        grad_cam(Detector(32, "spectrum-linear", "spectrum").eval(), np.zeros((1, 32, 32, 3), np.uint8))


def test_residual_spectrum_of_known_patterns() -> None:
    """A flat image has no residual; one repeated by nearest-neighbour upsampling has none either; a checkerboard has."""
    rng = np.random.default_rng(0)
    flat = np.full((2, 32, 32, 3), 90, np.uint8)
    repeated = np.repeat(np.repeat(rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), 2, axis=1), 2, axis=2)
    for images in (flat, repeated):
        assert residual_spectrum(images).max() <= -119
    checkers = np.repeat(((np.indices((32, 32)).sum(0) % 2) * 100 + 50).astype(np.uint8)[None, :, :, None], 3, axis=3)
    spectrum = residual_spectrum(checkers)
    bright = {(int(y), int(x)) for y, x in zip(*np.nonzero(spectrum > -60), strict=True)}
    # x - up(down(x)) is 0, d / d, 0 in each 2 x 2 cell: energy at 0 and at the highest frequencies along both axes.
    assert bright <= {(16, 16), (0, 0), (0, 16), (16, 0)}
    assert (0, 16) in bright or (0, 0) in bright
    # Parseval: power is per pixel, so its sum over frequencies is the sum of the squared residual; half of the pixels have one.
    residual = 100 / 127.5 * 2 / 3
    assert (10 ** (spectrum / 10)).sum() == pytest.approx(32 * 32 * residual**2 / 2, rel=1e-3)


def test_pictures_are_written(frames: FrameSet, tmp_path: Path) -> None:
    detector = Detector(32, "test_resnet", "residual").eval()
    write_pictures(detector, frames, tmp_path)
    spectra = cv2.imread(str(tmp_path / "spectra.png"))
    assert spectra.shape == (128, 2 * 128 + 8, 3)  # real and grid, four times as large, with a gap
    picture = cam_picture(detector, frames, count=5)
    assert picture.shape == (4 * 34 - 2, 5 * 34 - 2, 3)
    assert predict(detector, frames.array()).shape == (len(frames),)


@pytest.mark.slow
def test_the_command(puppets: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, _ = load_frames(puppets, 32).clips(12)
    fakes = write_fakes([255 - c for c in clips], tmp_path / "fakes", method="negative", name="negative")
    import pytorch_lightning as pl

    detector = Detector(32, "test_resnet", "residual")
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(detector)
    trainer.save_checkpoint(tmp_path / "d.ckpt")
    out = tmp_path / "out"
    assert run(["detector", "robustness", str(tmp_path / "d.ckpt"), str(puppets.root), str(fakes.root), "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"robustness.csv", "robustness.html", "gradcam.png", "spectra.png"}
    rows = pd.read_csv(out / "robustness.csv")
    assert len(rows) == levels() * len(CURVES)
    assert "plotly" in (out / "robustness.html").read_text()
    assert "frame AUC" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no fake frames"):
        run(["detector", "robustness", str(tmp_path / "d.ckpt"), str(puppets.root)])
