"""The GAN: networks, losses, walks, training, checkpoints."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from toolkit import Manifest, UserError
from toolkit.activations.health import ActivationHealth, effective_rank, unit_health
from toolkit.activations.module import ActivationModule
from toolkit.activations.registry import registry
from toolkit.gan.data import GANData
from toolkit.gan.losses import LOSSES, gradient_penalty, r1_penalty
from toolkit.gan.module import GAN
from toolkit.gan.networks import Generator, Project, Score
from toolkit.gan.walks import latent_walk, render_clips
from toolkit.training import CollapseWatch, Diverged, History

QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
}
TINY = {"image_size": 32, "latent": 16, "generator_width": 4, "discriminator_width": 4}


def fit(module: GAN, manifest: Manifest, folder: Path, steps: int, *callbacks: pl.Callback, **trainer: object) -> pl.Trainer:
    data = GANData(str(manifest.root), 32, batch_size=16, seed=int(module.options.seed), validation_frames=32)
    result = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, "limit_val_batches": 0, **trainer},
    )
    result.fit(module, data)
    return result


def test_first_and_last_layer_equal_their_convolutions() -> None:
    layer = Project(10, 6)
    z = torch.randn(3, 10)
    torch.testing.assert_close(layer(z), F.conv_transpose2d(z[:, :, None, None], layer.weight), rtol=1e-5, atol=1e-5)
    score, x = Score(6), torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(score(x), F.conv2d(x, score.weight).flatten(1), rtol=1e-5, atol=1e-5)


def test_layers_are_those_of_the_dcgan_example() -> None:
    module = GAN(64)
    generator = [tuple(m.weight.shape) for m in module.generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert generator == [(100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    discriminator = [tuple(m.weight.shape) for m in module.discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert discriminator == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    # 3,576,704 and 2,765,568: the parameter counts of the example's networks.
    assert sum(p.numel() for p in module.generator.parameters()) == 3_576_704
    assert sum(p.numel() for p in module.discriminator.parameters()) == 2_765_568


def test_losses_against_their_formulas() -> None:
    real, fake = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-0.3, 1.2])
    bce = nn.BCEWithLogitsLoss()
    torch.testing.assert_close(LOSSES["bce"].discriminator(real, fake), bce(real, torch.ones(3)) + bce(fake, torch.zeros(2)))
    torch.testing.assert_close(LOSSES["bce"].generator(fake), bce(fake, torch.ones(2)))
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    torch.testing.assert_close(LOSSES["bce-probability"].discriminator(p, q), LOSSES["bce"].discriminator(real, fake))
    torch.testing.assert_close(LOSSES["bce-probability"].generator(q), LOSSES["bce"].generator(fake))
    assert float(LOSSES["hinge"].discriminator(real, fake)) == pytest.approx((0.5 + 2.0 + 0.0) / 3 + (0.7 + 2.2) / 2)
    assert float(LOSSES["lsgan"].discriminator(real, fake)) == pytest.approx(0.5 * (0.25 + 4 + 1) / 3 + 0.5 * (0.09 + 1.44) / 2)
    assert float(LOSSES["wgan-gp"].discriminator(real, fake)) == pytest.approx(0.45 - 0.5)


def test_penalties_of_a_linear_discriminator_are_known() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.w).sum(dim=(1, 2, 3))

    network = Linear()
    real, fake = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    norm = float(network.w.detach().norm())
    assert float(r1_penalty(network, real)) == pytest.approx(norm**2, rel=1e-5)
    penalty = gradient_penalty(network, real, fake, torch.rand(5))
    assert float(penalty) == pytest.approx((norm - 1) ** 2, rel=1e-5)
    penalty.backward()
    assert network.w.grad is not None


@pytest.mark.parametrize("interpolation", ["spline", "slerp"])
def test_walks_loop_are_smooth_and_stay_on_the_shell(interpolation: str) -> None:
    walk = latent_walk(3, 120, 100, keyframes=4, interpolation=interpolation)
    assert walk.shape == (120, 100)
    assert (walk == latent_walk(3, 120, 100, keyframes=4, interpolation=interpolation)).all()
    steps = np.linalg.norm(np.diff(np.vstack([walk, walk[:1]]), axis=0), axis=1)
    assert steps.max() < 3 * np.median(steps)  # the step back to the start is a step like any other
    lengths = np.linalg.norm(walk, axis=1)
    assert (np.abs(lengths - 10) < 2).all()
    keys = latent_walk(3, 4, 100, keyframes=4, interpolation=interpolation)
    np.testing.assert_allclose(walk[::30], keys, atol=1e-5)
    if interpolation == "spline":
        velocity = np.diff(np.vstack([walk, walk[:2]]), axis=0)
        assert np.linalg.norm(np.diff(velocity, axis=0), axis=1).max() < 0.5 * steps.max()


def test_the_same_walk_for_every_generator() -> None:
    a, b = (render_clips(GAN(**TINY, seed=s).sampler, clips=2, frames=5) for s in (0, 0))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert a[0].shape == (5, 32, 32, 3)
    assert a[0].dtype == np.uint8


@pytest.mark.parametrize("loss", ["bce", "hinge", "lsgan", "wgan-gp"])
@pytest.mark.parametrize("upsampling", ["transposed", "nearest", "bilinear", "zero"])
def test_trains_with_every_loss_and_upsampling(puppets: Manifest, tmp_path: Path, loss: str, upsampling: str) -> None:
    r1 = 1.0 if loss == "hinge" else 0.0
    module = GAN(
        **TINY,
        loss=loss,
        upsampling=upsampling,
        r1_gamma=r1,
        r1_every=2,
        activations={"generator": {"up*": "swish(learn=beta)"}, "discriminator": {"down*": "prelu"}},
    )
    before = copy.deepcopy(module.state_dict())
    trainer = fit(module, puppets, tmp_path, 3)
    assert trainer.global_step == 3  # generator updates, not optimiser steps
    changed = [k for k, v in module.state_dict().items() if v.dtype.is_floating_point and not torch.equal(v, before[k])]
    for name in (
        "generator.up1.conv.weight",
        "generator.up2.act.beta",
        "discriminator.down1.conv.weight",
        "discriminator.down2.act.negative_slope",
        "ema.up1.conv.weight",
    ):
        assert name in changed
    assert all(torch.isfinite(v).all() for v in module.state_dict().values())


def test_the_generators_step_leaves_the_discriminator_alone(puppets: Manifest, tmp_path: Path) -> None:
    module = GAN(**TINY, learning_rate=1e-3, discriminator_learning_rate=1e-30)
    before = {k: v.clone() for k, v in module.discriminator.named_parameters()}
    fit(module, puppets, tmp_path, 3)
    for name, value in module.discriminator.named_parameters():
        torch.testing.assert_close(value, before[name])
        assert value.requires_grad


def test_several_discriminator_steps_per_generator_step(puppets: Manifest, tmp_path: Path) -> None:
    module = GAN(**TINY, loss="wgan-gp", discriminator_steps=3)
    assert module.options.discriminator_norm == "layer"
    trainer = fit(module, puppets, tmp_path, 2)
    assert trainer.global_step == 2
    assert int(module.batches_seen) == 6


def test_average_of_the_generator(puppets: Manifest, tmp_path: Path) -> None:
    module = GAN(**TINY, ema_decay=0.5)
    first = module.generator.up1.conv.weight.detach().clone()
    fit(module, puppets, tmp_path, 1)
    decay = min(0.5, 2 / 11)
    expected = decay * first + (1 - decay) * module.generator.up1.conv.weight.detach()
    torch.testing.assert_close(module.ema.up1.conv.weight, expected)
    assert not any(p.requires_grad for p in module.ema.parameters())


def test_same_seed_same_weights_and_resumed_equals_uninterrupted(puppets: Manifest, tmp_path: Path) -> None:
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step in (6, 11):  # in the middle of an epoch of 9 batches, and of the next one
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def train(**keywords: object) -> GAN:
        module = GAN(**TINY, seed=7)
        data = GANData(str(puppets.root), 32, batch_size=16, seed=7)
        trainer = pl.Trainer(**QUIET, max_steps=13, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[SaveAt()])
        trainer.fit(module, data, **keywords)
        return module

    whole = train()
    others = {"again": train()} | {f"resumed at {s}": train(ckpt_path=tmp_path / f"{s}.ckpt") for s in (6, 11)}
    for what, other in others.items():
        for name, value in whole.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), (what, name)
    assert not torch.equal(GAN(**TINY, seed=8).generator.up1.conv.weight, GAN(**TINY, seed=7).generator.up1.conv.weight)


TWO_PROCESSES = """
import sys
import pytorch_lightning as pl, torch
from toolkit.gan.module import GAN
from toolkit.gan.data import GANData
if __name__ == "__main__":
    torch.set_num_threads(1)
    processes, out, root, norm = int(sys.argv[1]), *sys.argv[2:]
    module = GAN(image_size=32, latent=16, generator_width=4, discriminator_width=4, generator_norm=norm,
                 discriminator_norm=norm, seed=3, validation_images=32)
    data = GANData(root, 32, batch_size=16, seed=3, validation_frames=37)
    trainer = pl.Trainer(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=6,
                         max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                         use_distributed_sampler=False, enable_checkpointing=False, check_val_every_n_epoch=None,
                         val_check_interval=3, num_sanity_val_steps=0)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        torch.save({**module.state_dict(), "val": torch.as_tensor(float(trainer.callback_metrics["val/frechet"]))}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_two_processes_equal_one_with_the_same_total_batch(puppets: Manifest, tmp_path: Path, norm: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    states = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.pt"
        command = [sys.executable, str(script), str(processes), str(path), str(puppets.root), norm]
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        states.append(torch.load(path, weights_only=True))
    moved = 0.0
    start = GAN(**TINY, generator_norm=norm, discriminator_norm=norm, seed=3).state_dict()
    # 37 validation frames over two processes: each is counted once, or the distance would differ.
    assert float(states[0].pop("val")) == pytest.approx(float(states[1].pop("val")), rel=1e-3)
    for name, value in states[0].items():
        if value.dtype.is_floating_point:
            assert float((value - states[1][name]).abs().max()) < 1e-5, name
            moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-4


def test_checkpoint_carries_what_is_needed(puppets: Manifest, tmp_path: Path) -> None:
    module = GAN(**TINY, activations={"generator": {"up*": "snake(a=0.5)"}})
    trainer = fit(module, puppets, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = GAN.from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.fixed_images(4) == module.eval().fixed_images(4)).all()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["toolkit"]
    assert saved["sites"]["generator"]["up1.act"] == "toolkit_builtin/snake(a=0.5)"
    assert "torch" in saved["versions"]


def test_bad_checkpoints_are_one_line(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("open('/tmp/evil', 'w')",))

    torch.save({"toolkit": {"kind": "gan"}, "x": Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save(
        {
            "toolkit": {"kind": "gan", "options": dict(TINY)},
            "state_dict": GAN(**{**TINY, "generator_width": 8}).state_dict(),
        },
        tmp_path / "wide.ckpt",
    )
    torch.save({"toolkit": {"kind": "gan", "options": {"image": 3}}, "state_dict": {}}, tmp_path / "old.ckpt")
    for name, message in (
        ("none", "is not there"),
        ("text", "cannot be loaded"),
        ("evil", "cannot be loaded"),
        ("other", "not a checkpoint of this toolkit"),
        ("wide", "another architecture"),
        ("old", "another version"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            GAN.from_checkpoint(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)


def test_divergence_names_step_and_site_and_keeps_the_last_good_checkpoint(puppets: Manifest, tmp_path: Path) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: GAN, batch: object, batch_idx: int) -> None:
            if trainer.global_step == 4:
                with torch.no_grad():
                    pl_module.generator.up2.conv.weight[0, 0, 0, 0] = float("nan")

    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    with pytest.raises(
        Diverged,
        match=r"diverged at step \d+: loss/\w+ is not finite. First such value: site up2.act of the generator. The last good",
    ) as caught:
        fit(GAN(**TINY), puppets, tmp_path, 10, Poison(), keep, enable_checkpointing=True)
    path = Path(str(caught.value).split("checkpoint is ")[1].split(". A lower")[0])
    assert all(torch.isfinite(v).all() for v in GAN.from_checkpoint(path).state_dict().values())


def test_collapse_is_noticed_once_and_good_checkpoint_kept(puppets: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Freeze(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GAN, *_: object) -> None:
            if trainer.global_step >= 4:
                with torch.no_grad():
                    for p in pl_module.ema.parameters():
                        p.zero_()

    guard = CollapseWatch(every=2)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1000)
    fit(GAN(**TINY, init="gain"), puppets, tmp_path, 8, Freeze(), guard, keep, enable_checkpointing=True)
    assert guard.collapsed_at in (4, 6)
    assert capsys.readouterr().err.count("has collapsed by step") == 1
    assert (tmp_path / "good.ckpt").is_file()


def test_health_by_hand() -> None:
    relu = ActivationModule(registry().find("relu")[1])
    x = torch.tensor([[1.0, -1.0, 0.001, -2.0], [2.0, -3.0, -0.001, 5.0]])
    got = unit_health(relu, x, relu(x))
    assert got["dead"] == pytest.approx(1 / 4)  # the second unit is off for every sample
    assert got["saturated"] == pytest.approx(4 / 8)
    # Mean outputs 1.5, 0, 0.0005, 2.5: their mean is about 1, so units 2 and 3 are dormant at both taus.
    assert got["dormant_0.025"] == got["dormant_0.1"] == pytest.approx(2 / 4)
    tanh = ActivationModule(registry().find("tanh")[1])
    assert unit_health(tanh, 100 * torch.ones(2, 3), torch.ones(2, 3))["saturated"] == 1


def test_effective_rank_in_closed_form() -> None:
    eye = torch.eye(6)
    assert effective_rank(eye) == pytest.approx(6)
    assert effective_rank(torch.ones(50, 6)) == pytest.approx(1)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)
    assert math.isnan(effective_rank(torch.zeros(4, 4)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8))
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(np.exp(stats.entropy(share)), rel=1e-6)


def test_update_ratio_equals_that_of_a_step_worked_out(puppets: Manifest, tmp_path: Path) -> None:
    health = ActivationHealth(every=1)
    module = GAN(**TINY, seed=2)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, puppets, tmp_path, 1, health)
    found = {site: v for step, site, m, v in health.history if m == "update_ratio" and step == 1}
    assert "generator.up1.conv" in found
    assert not any(site.startswith("ema") for site in found)
    for site, value in found.items():
        name = f"{site}.weight"
        moved = module.get_parameter(name).detach()
        assert value == pytest.approx(float((moved - before[name]).norm() / before[name].norm()), rel=1e-5)


def test_health_and_history_are_recorded_while_training(puppets: Manifest, tmp_path: Path) -> None:
    health, history = ActivationHealth(every=2), History()
    module = GAN(**TINY, log_every=1)
    fit(
        module,
        puppets,
        tmp_path,
        5,
        health,
        history,
        limit_val_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    sites = {site for _, site, _, _ in health.history}
    assert "generator.up1.act" in sites
    assert "discriminator.output" in sites
    assert not any(site.startswith("ema") for site in sites)
    assert {m for _, s, m, _ in health.history if s == "generator.up1.act"} == {
        "effective_rank",
        "dead",
        "saturated",
        "dormant_0.025",
        "dormant_0.1",
        "gradient_norm",
    }
    assert all(math.isfinite(v) for *_, v in health.history)
    assert [s for s, n, _ in history.rows if n == "val/frechet"] == [2, 4]
    assert {n for _, n, _ in history.rows} >= {"loss/generator", "loss/discriminator", "val/kernel"}


def test_bf16_training_uses_current_weights(puppets: Manifest, tmp_path: Path) -> None:
    """Autocast caches low-precision weights: with a stale cache bf16 would drift from fp32 within a few steps."""
    exact, low = GAN(**TINY, seed=1), GAN(**TINY, seed=1)
    fit(exact, puppets, tmp_path, 6)
    fit(low, puppets, tmp_path, 6, precision="bf16-mixed")
    a, b = (m.last_losses["loss/discriminator"] for m in (exact, low))
    assert float((a - b).abs()) < 0.05 * float(a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": {"critic": {}}}, "unknown network 'critic'"),
        ({"activations": {"generator": {"up9": "relu"}}}, "matches no site"),
        ({"image_size": 48}, "image_size is 16, 32"),
        ({"loss": "wgan-gp", "discriminator_norm": "batch"}, "mixes the samples"),
        ({"discriminator_steps": 0}, "at least 1"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GAN(**{**TINY, **options})


def test_gain_initialisation_keeps_activity_across_layers() -> None:
    module = GAN(64, generator_width=16, generator_norm="none", init="gain", activations={"generator": {"up*": "elu"}})
    activity = []
    for name in ("up1", "up2", "up3", "up4"):
        module.generator.get_submodule(name).act.register_forward_hook(lambda m, a, y: activity.append(float(y.detach().square().mean())))
    with torch.no_grad():
        module.generator(torch.randn(64, 100, generator=torch.Generator().manual_seed(0)))
    assert all(0.3 < a < 3 for a in activity)


def test_generator_rejects_running_without_rules() -> None:
    with pytest.raises(RuntimeError, match="no activations yet"):
        Generator(32)(torch.randn(1, 100))
