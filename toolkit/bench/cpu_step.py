"""Whole DCGAN training steps on a CPU: the plain PyTorch example, one improvement after another, the toolkit's own loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from toolkit.bench.timing import WARM_UP, Variant, repeat

if TYPE_CHECKING:
    from toolkit.gan.module import GAN


def dcgan_variants(image_size: int, width: int, batch_size: int) -> list[Variant]:
    """A DCGAN step as in the PyTorch example (fp32, NCHW), then with one change after another, then the toolkit's own.

    All have the same layers, batch and losses (binary cross-entropy on a sigmoid, or on logits: the same function).
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    from toolkit.gan.module import GAN

    latent = 100

    def example_networks() -> tuple[nn.Module, nn.Module]:
        levels = image_size.bit_length() - 3
        channels = [width * 2 ** (levels - 1 - i) for i in range(levels)]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, channels[0], 4, 1, 0, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(True),
        ]
        for a, b in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        generator = nn.Sequential(*layers, nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1, bias=False), nn.Tanh())
        layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for i in range(1, levels):
            layers += [
                nn.Conv2d(width * 2 ** (i - 1), width * 2**i, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width * 2**i),
                nn.LeakyReLU(0.2, True),
            ]
        return generator, nn.Sequential(*layers, nn.Conv2d(width * 2 ** (levels - 1), 1, 4, 1, 0, bias=False))

    images = torch.rand(4 * batch_size, 3, image_size, image_size) * 2 - 1

    def example(*, freeze: bool = False, fused: bool = False, channels_last: bool = False, bf16: bool = False) -> Callable[[], None]:
        torch.manual_seed(0)
        generator, discriminator = example_networks()
        memory = torch.channels_last if channels_last else torch.contiguous_format
        generator.to(memory_format=memory)
        discriminator.to(memory_format=memory)
        optimizers = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=fused) for n in (generator, discriminator)]
        ones, zeros = torch.ones(batch_size), torch.zeros(batch_size)
        place = [0]

        def score(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = discriminator(x).flatten()
            if bf16:
                return F.binary_cross_entropy_with_logits(logits.float(), target)
            return F.binary_cross_entropy(torch.sigmoid(logits), target)

        def step() -> None:
            place[0] = (place[0] + batch_size) % len(images)
            real = images[place[0] : place[0] + batch_size].contiguous(memory_format=memory)
            discriminator.zero_grad()
            score(real, ones).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                fake = generator(torch.randn(batch_size, latent, 1, 1))
            score(fake.detach(), zeros).backward()
            optimizers[1].step()
            generator.zero_grad()
            if freeze:
                discriminator.requires_grad_(False)
            score(fake, ones).backward()
            discriminator.requires_grad_(True)
            optimizers[0].step()

        return step

    def own(precision: Literal["32-true", "bf16-mixed"]) -> Callable[[float], tuple[int, float]]:
        return _toolkit_loop(GAN(image_size, latent, width, width, ema_decay=0.0, flip=False), batch_size, precision)

    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    variants = [
        Variant("PyTorch example, fp32 NCHW", repeat(example())),
        Variant("+ no gradients for D in G's step", repeat(example(freeze=True))),
        Variant("+ fused Adam", repeat(example(freeze=True, fused=True))),
        Variant("+ channels_last", repeat(example(freeze=True, fused=True, channels_last=True))),
    ]
    if bf16:
        variants.append(Variant("+ bf16 autocast", repeat(example(freeze=True, fused=True, channels_last=True, bf16=True))))
    variants.append(Variant("toolkit, fp32", own("32-true")))
    if bf16:
        variants.append(Variant("toolkit, bf16", own("bf16-mixed")))
    return variants


def _toolkit_loop(module: GAN, batch_size: int, precision: Literal["32-true", "bf16-mixed"]) -> Callable[[float], tuple[int, float]]:
    """The toolkit's training as its users run it: the Lightning loop with data loading, probes and guards."""
    import numpy as np
    import pytorch_lightning as pl

    from toolkit.activations.health import ActivationHealth
    from toolkit.data.frames import ArrayDataset, Batches, loader
    from toolkit.training import CollapseWatch, History, quiet

    size = int(module.options.image_size)
    images = np.random.default_rng(0).integers(0, 256, (16 * batch_size, size, size, 3), dtype=np.uint8)
    quiet()

    class Clock(pl.Callback):
        def __init__(self, seconds: float) -> None:
            self.seconds, self.batches, self.steps, self.start, self.spent = seconds, 0, 0, 0.0, 0.0

        def on_train_batch_end(self, *_: object) -> None:
            self.batches += 1
            if self.batches == WARM_UP:
                self.start = time.perf_counter()
            elif self.batches > WARM_UP:
                self.steps, self.spent = self.steps + 1, time.perf_counter() - self.start
                if self.spent >= self.seconds and self.steps >= 2:
                    raise _Enough

    def run(seconds: float) -> tuple[int, float]:
        clock = Clock(seconds)
        data = loader(ArrayDataset(images, np.arange(len(images))), Batches(len(images), batch_size, 0))
        trainer = pl.Trainer(
            max_epochs=-1,
            max_steps=-1,
            precision=precision,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[ActivationHealth(), CollapseWatch(), History(), clock],
        )
        with contextlib.suppress(_Enough):
            trainer.fit(module, data)
        return clock.steps, clock.spent

    return run


class _Enough(BaseException):
    """Ends a training loop that has run long enough; not an ``Exception``, which Lightning would report."""
