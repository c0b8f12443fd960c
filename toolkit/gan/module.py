"""The LightningModule that trains a DCGAN."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed
from torch import Tensor, nn

import toolkit
from toolkit.activations.assign import apply_rules
from toolkit.activations.module import ActivationModule
from toolkit.checkpoints import load_module
from toolkit.data.frames import evenly_spaced, to_float
from toolkit.errors import UserError
from toolkit.gan.losses import LOSSES, LossName, gradient_penalty, r1_penalty
from toolkit.gan.networks import Discriminator, Generator, Norm, Upsampling, initialise
from toolkit.parallel import from_all_processes, synchronise_batch_norm
from toolkit.training import require_finite, versions

NETWORKS = ("generator", "discriminator")
NetworkRules = dict[str, dict[str, str | dict[str, Any]]]


class GAN(pl.LightningModule):
    """DCGAN training: any activation at any site, four losses, an R1 penalty with any of them, an averaged generator.

    One training step updates the discriminator and, every ``discriminator_steps`` steps, the generator. The trainer's
    ``global_step`` (and ``max_steps``) counts generator updates. Latents and flips depend on the seed and the step
    alone, so a resumed run draws the same ones.

    Args:
        image_size: 16, 32, 64, 128 or 256 pixels.
        latent: length of the latent vector.
        generator_width: channels before the generator's last layer.
        discriminator_width: channels after the discriminator's first layer.
        upsampling: transposed, nearest, bilinear or zero (insertion).
        generator_norm: normalisation in the generator.
        discriminator_norm: normalisation in the discriminator; auto is batch, or layer where a penalty on its gradient
            (wgan-gp, r1) forbids mixing samples, or none with spectral norm.
        spectral_norm: none, discriminator, or both.
        loss: bce, hinge, lsgan or wgan-gp.
        penalty_weight: weight of the wgan-gp penalty.
        r1_gamma: gamma of the R1 penalty; 0 is off.
        r1_every: discriminator steps between R1 penalties, which are weighted up accordingly (lazy regularisation).
        discriminator_steps: discriminator updates for each update of the generator.
        learning_rate: of Adam.
        discriminator_learning_rate: the same for the discriminator if another.
        beta1: of Adam.
        beta2: of Adam.
        ema_decay: decay of the generator's moving average; 0 is off.
        init: dcgan (normal 0.02) or gain (scaled by each activation's gain).
        flip: mirror half of the real images.
        activations: network (generator, discriminator) -> pattern -> activation.
        prefer: providers to take bare names from before the built-in ones.
        seed: of weights, latents and flips.
        log_every: steps between logged losses.
        validation_images: fakes made for a validation.
    """

    batches_seen: Tensor

    def __init__(
        self,
        image_size: int = 64,
        latent: int = 100,
        generator_width: int = 64,
        discriminator_width: int = 64,
        upsampling: Upsampling = "transposed",
        generator_norm: Norm = "batch",
        discriminator_norm: Literal["auto", "batch", "instance", "layer", "none"] = "auto",
        spectral_norm: Literal["none", "discriminator", "both"] = "none",
        loss: LossName = "bce",
        penalty_weight: float = 10.0,
        r1_gamma: float = 0.0,
        r1_every: int = 16,
        discriminator_steps: int = 1,
        learning_rate: float = 2e-4,
        discriminator_learning_rate: float | None = None,
        beta1: float = 0.5,
        beta2: float = 0.999,
        ema_decay: float = 0.999,
        init: Literal["dcgan", "gain"] = "dcgan",
        flip: bool = True,
        activations: NetworkRules | None = None,
        prefer: list[str] | None = None,
        seed: int = 0,
        log_every: int = 50,
        validation_images: int = 1024,
    ) -> None:
        super().__init__()
        rules = dict(activations or {})
        if unknown := set(rules) - set(NETWORKS):
            raise UserError(f"activations: unknown network {sorted(unknown)[0]!r}; a GAN has {' and '.join(NETWORKS)}")
        if discriminator_norm == "auto":
            penalised = loss == "wgan-gp" or r1_gamma > 0
            discriminator_norm = "none" if spectral_norm != "none" else "layer" if penalised else "batch"
        if discriminator_norm == "batch" and (loss == "wgan-gp" or r1_gamma > 0):
            raise UserError("discriminator_norm: batch mixes the samples that a gradient penalty looks at one by one; use layer")
        for name, value, least in (
            ("discriminator_steps", discriminator_steps, 1),
            ("r1_every", r1_every, 1),
            ("log_every", log_every, 1),
        ):
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        self.automatic_optimization = False
        self.save_hyperparameters()
        self.hparams["discriminator_norm"] = discriminator_norm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = Generator(image_size, latent, generator_width, upsampling, generator_norm, spectral_norm == "both")
            self.discriminator = Discriminator(image_size, discriminator_width, discriminator_norm, spectral_norm != "none")
            self.sites = {
                name: apply_rules(network, rules.get(name, {}), example=network.example(), prefer=prefer or ())
                for name, network in (("generator", self.generator), ("discriminator", self.discriminator))
            }
            for network in (self.generator, self.discriminator):
                initialise(network, init)
        self._loss = LOSSES[loss if loss != "bce" or not self._ends_in_sigmoid() else "bce-probability"]
        self.ema: Generator | None = None
        if ema_decay:
            self.ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self._batches_seen = 0
        self.to(memory_format=torch.channels_last)
        self.last_losses: dict[str, Tensor] = {}
        self._real_diversity: float | None = None
        self._features: list[np.ndarray] = []

    def _ends_in_sigmoid(self) -> bool:
        output = self.discriminator.output
        return isinstance(output, ActivationModule) and output.activation.name == "sigmoid"

    @property
    def sampler(self) -> Generator:
        """The generator to make images with: the averaged one where there is one."""
        return self.ema if self.ema is not None else self.generator

    def forward(self, z: Tensor) -> Tensor:
        """``(N, latent)`` -> ``(N, 3, size, size)`` in [-1, 1], by the averaged generator."""
        return self.sampler(z)

    @property
    def batches_done(self) -> int:
        """Batches that the training has seen, interrupted runs included."""
        return int(self.batches_seen)

    @property
    def options(self) -> Any:
        """The arguments this was made with, as attributes and as a mapping; saved with every checkpoint."""
        return self.hparams

    def configure_optimizers(self) -> Any:
        h = self.options
        fused = self.device.type in ("cpu", "cuda")
        betas = (h.beta1, h.beta2)
        rate = h.discriminator_learning_rate or h.learning_rate
        return [
            torch.optim.Adam(self.generator.parameters(), lr=h.learning_rate, betas=betas, fused=fused),
            torch.optim.Adam(self.discriminator.parameters(), lr=rate, betas=betas, fused=fused),
        ]

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.world_size > 1:
            device = self.trainer.strategy.root_device
            self.generator = synchronise_batch_norm(self.generator, device)  # type: ignore[assignment]
            self.discriminator = synchronise_batch_norm(self.discriminator, device)  # type: ignore[assignment]

    def on_fit_start(self) -> None:
        # global_step shall count generator updates, so the discriminator's steps are not reported to the trainer.
        self._batches_seen = int(self.batches_seen)

    def _random(self, stream: int) -> torch.Generator:
        """A generator of its own for each step and purpose: what is drawn does not depend on the past."""
        mixed = np.random.SeedSequence([int(self.options.seed), self._batches_seen, stream]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(mixed) & 0x7FFF_FFFF_FFFF_FFFF)

    def _own_share(self, whole: Tensor) -> Tensor:
        """This process's part of what was drawn for the total batch."""
        part = whole[self.global_rank :: self.trainer.world_size] if self.trainer.world_size > 1 else whole
        return part.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        h = self.options
        optimizer_g, optimizer_d = self.optimizers()  # type: ignore[attr-defined]
        optimizer_d._on_before_step = optimizer_d._on_after_step = lambda: None
        real = to_float(batch["image"])
        total = len(real) * self.trainer.world_size
        if h.flip:
            mirrored = self._own_share(torch.rand(total, generator=self._random(0)) < 0.5)
            real = torch.where(mirrored.view(-1, 1, 1, 1), real.flip(3), real)
        z = self._own_share(torch.randn(total, h.latent, generator=self._random(1)))
        update_generator = (self._batches_seen + 1) % h.discriminator_steps == 0

        with torch.set_grad_enabled(update_generator):
            fake = self.generator(z)
        loss_d = self._discriminator_loss(real, fake.detach())
        require_finite(self, "loss/discriminator", loss_d, batch_idx)
        self._step(optimizer_d, loss_d, self.discriminator)
        self.last_losses = {"loss/discriminator": loss_d.detach()}
        if update_generator:
            # No gradients for the discriminator's weights: a third of its backward pass saved.
            self.discriminator.requires_grad_(False)
            scores = self.discriminator(fake)
            with torch.autocast(self.device.type, enabled=False):
                loss_g = self._loss.generator(scores.float())
            require_finite(self, "loss/generator", loss_g, batch_idx)
            self._step(optimizer_g, loss_g, self.generator)
            self.discriminator.requires_grad_(True)
            self.last_losses["loss/generator"] = loss_g.detach()
            self._update_average()
        self._batches_seen += 1
        self.batches_seen.fill_(self._batches_seen)
        if self._batches_seen % h.log_every == 0:
            self.log_dict(self.last_losses, prog_bar=True, batch_size=len(real))

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        h = self.options
        scores_real, scores_fake = self.discriminator(real), self.discriminator(fake)
        with torch.autocast(self.device.type, enabled=False):
            loss = self._loss.discriminator(scores_real.float(), scores_fake.float())
            if h.loss == "wgan-gp":
                mix = self._own_share(torch.rand(len(real) * self.trainer.world_size, generator=self._random(2)))
                loss = loss + h.penalty_weight * gradient_penalty(self.discriminator, real, fake.float(), mix)
            if h.r1_gamma > 0 and self._batches_seen % h.r1_every == 0:
                loss = loss + h.r1_every * h.r1_gamma / 2 * r1_penalty(self.discriminator, real)
        return loss

    def _step(self, optimizer: Any, loss: Tensor, network: nn.Module) -> None:
        """Backward, mean of the gradients over all processes, update."""
        optimizer.zero_grad()
        # DDP's own reduction fires when every parameter of the module has a gradient, which with two optimisers is too
        # late for the first: so it is switched off, and this network's gradients are reduced here.
        if self.trainer.world_size > 1:
            with self.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                self.manual_backward(loss)
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            torch.distributed.all_reduce(flat)
            flat /= self.trainer.world_size
            offset = 0
            for gradient in gradients:
                gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        else:
            self.manual_backward(loss)
        optimizer.step()
        # Autocast keeps low-precision copies of the weights, which are now out of date.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.ema is None:
            return
        step = self.global_step  # this update included
        decay = min(self.options.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.generator.parameters()], 1 - decay)
        for mean, value in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            mean.copy_(value)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._features = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        from toolkit.metrics.features import extract, random_space

        self._features.append(extract(random_space().network, batch["image"].cpu().numpy()))

    def on_validation_epoch_end(self) -> None:
        from toolkit.metrics.distances import frechet_distance, kernel_distance
        from toolkit.metrics.features import extract, random_space

        parts = from_all_processes(self._features)
        if not parts:
            return
        real = np.concatenate(parts)
        fake = extract(random_space().network, self.fixed_images(self.options.validation_images))
        self.log("val/frechet", frechet_distance(real, fake), prog_bar=True)
        self.log("val/kernel", kernel_distance(real, fake))

    def on_test_epoch_start(self) -> None:
        self._features = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._features.append(batch["image"].cpu().numpy())

    def on_test_epoch_end(self) -> None:
        from toolkit.metrics import ClipSet, all_measures

        parts = from_all_processes(self._features)
        if not parts:
            raise UserError("there are no real test frames (split test) to compare with")
        real = ClipSet.of_images(np.concatenate(parts))
        fake = ClipSet.of_images(self.fixed_images(self.options.validation_images))
        for measure in all_measures():
            if measure.on == "images":
                self.log(f"test/{measure.name}", measure.function(real, fake))

    def fixed_images(self, count: int, seed: int = 0) -> np.ndarray:
        """``count`` images as ``(count, size, size, 3)`` uint8, from the same latents for every model of one ``latent``."""
        from toolkit.gan.walks import render

        latents = np.random.default_rng([seed, 0xF1D]).standard_normal((count, self.options.latent), dtype=np.float32)
        with torch.autocast(self.device.type, enabled=False):
            return render(self.sampler, latents)

    def diversity(self) -> float:
        """Mean absolute difference between pairs of fakes, over that between real frames; 0 is a collapsed generator."""
        fake = _spread(self.fixed_images(64))
        if self._real_diversity is None:
            dataset = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
            places = evenly_spaced(len(dataset), 64)
            self._real_diversity = _spread(
                dataset[0]["image"].numpy()[None] if len(dataset) < 2 else dataset.__getitems__(places)["image"].numpy()
            )
        return fake / max(self._real_diversity, 1e-6)

    def probe_networks(self) -> dict[str, tuple[nn.Module, Tensor]]:
        """Networks in order of computation, each with an input, for finding out where a value stopped being finite."""
        z = torch.randn(4, self.options.latent, generator=torch.Generator().manual_seed(0)).to(self.device)
        images = torch.zeros(4, 3, self.options.image_size, self.options.image_size, device=self.device)
        return {"generator": (self.generator, z), "discriminator": (self.discriminator, images)}

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["toolkit"] = {
            "kind": "gan",
            "version": toolkit.__version__,
            "versions": versions(),
            "sites": self.sites,
            "options": {k: v for k, v in self.options.items() if k != "_instantiator"},
        }

    @classmethod
    def from_checkpoint(cls, path: Path | str, prefer: list[str] | None = None) -> GAN:
        """Load a GAN for use; parameters' names do not depend on the provider, so ``prefer`` may differ from training.

        Raises:
            UserError: not a GAN checkpoint, or one of another architecture or of unknown activations.
        """
        return load_module("gan", cls, Path(path), prefer)[0]


def _spread(images: np.ndarray) -> float:
    small = images.astype(np.float32).reshape(len(images), -1)
    return float(np.abs(small - np.roll(small, 1, axis=0)).mean())
