"""``toolkit bench``: speed measured as ratios within one run."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from toolkit.cli import Parser
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.gan.module import GAN

WARM_UP = 3


@dataclass(frozen=True)
class Variant:
    """One way of computing a training step. ``run(seconds)`` repeats it that long: ``(steps, seconds they took)``."""

    name: str
    run: Callable[[float], tuple[int, float]]


def repeat(step: Callable[[], None]) -> Callable[[float], tuple[int, float]]:
    """A :class:`Variant`'s ``run`` from a function that computes one step."""

    def run(seconds: float) -> tuple[int, float]:
        for _ in range(WARM_UP):
            step()
        steps, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or steps < 2:
            step()
            steps += 1
        return steps, spent

    return run


@dataclass(frozen=True)
class Timing:
    """Images per second over rounds: median, and 20th and 80th percentile."""

    name: str
    median: float
    low: float
    high: float
    ratio: float


def alternate(variants: list[Variant], images: int, rounds: int, seconds: float) -> list[Timing]:
    """Time the variants in turns, round after round, so that a change of the machine's speed meets all alike.

    Args:
        variants: the first is the one that ratios refer to.
        images: images in one step.
        rounds: rounds over all variants.
        seconds: time for each variant in each round.

    Returns:
        One timing per variant; ``ratio`` is the median over rounds of its speed over the first variant's in that round.
    """
    speeds: dict[str, list[float]] = {v.name: [] for v in variants}
    for _ in range(rounds):
        for variant in variants:
            steps, spent = variant.run(seconds)
            speeds[variant.name].append(images * steps / spent)
    base = speeds[variants[0].name]
    result = []
    for name, values in speeds.items():
        ordered = sorted(values)
        result.append(
            Timing(
                name,
                statistics.median(values),
                ordered[int(0.2 * (len(ordered) - 1))],
                ordered[round(0.8 * (len(ordered) - 1))],
                statistics.median(v / b for v, b in zip(values, base, strict=True)),
            )
        )
    return result


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


def detect_speeds(video: Path, checkpoint: Path, face_model: Path | None, rounds: int) -> dict[str, list[float]]:
    """Frames per second of decoding alone, of the network alone, and of ``toolkit detect`` without an annotated video.

    Args:
        video: a clip with a face.
        checkpoint: of a detector.
        face_model: the face detector's model file.
        rounds: the three are measured in turns this often.
    """
    import tempfile

    import torch

    from toolkit.data.faces import face_detector
    from toolkit.data.video import VideoReader
    from toolkit.detector.detect import detect_video
    from toolkit.detector.module import Detector

    detector = Detector.from_checkpoint(checkpoint)
    _, faces = face_detector("auto", face_model)
    size = int(detector.options.image_size)
    with VideoReader(video) as reader:
        frames = sum(1 for _ in reader)
    batch = torch.randn(32, 3, size, size).contiguous(memory_format=torch.channels_last)

    def decode() -> None:
        with VideoReader(video) as reader:
            for _ in reader:
                pass

    def network() -> None:
        with torch.inference_mode():
            for start in range(0, frames, 32):
                detector(batch[: min(32, frames - start)])

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            detect_video(video, Path(folder), detector, faces, annotate=False)

    speeds: dict[str, list[float]] = {"decoding alone": [], "network alone": [], "toolkit detect": []}
    for work in (decode, network, whole):
        work()
    for _ in range(rounds):
        for name, work in zip(speeds, (decode, network, whole), strict=True):
            start = time.perf_counter()
            work()
            speeds[name].append(frames / (time.perf_counter() - start))
    return speeds


def _bench_detect(args: argparse.Namespace) -> None:
    from toolkit.console import print_rows

    speeds = detect_speeds(args.video, args.checkpoint, args.face_model, args.rounds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    slower = min(medians["decoding alone"], medians["network alone"])
    print_rows(
        f"{args.video.name}, without an annotated video",
        ("what", "frames/s", "lowest to highest", "ratio to the slower of the two alone"),
        [(n, f"{medians[n]:.0f}", f"{min(v):.0f} to {max(v):.0f}", f"{medians[n] / slower:.2f}") for n, v in speeds.items()],
    )


def main(argv: list[str]) -> int:
    """``toolkit bench step`` and ``toolkit bench detect``."""
    parser = Parser("toolkit bench", description="Speed, measured side by side in one run; noise is real, so look at the ratios.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser(
        "step",
        help="whole DCGAN training steps against the plain PyTorch example",
        description="Images per second of whole DCGAN training steps on this CPU: the plain PyTorch DCGAN example (fp32, NCHW), the "
        "same with one improvement after another, and the toolkit's own training loop with its probes and guards.",
    )
    sub.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="image sizes (default 32 64)")
    sub.add_argument("--widths", type=int, nargs="+", default=[32, 64], help="width for each size (default 32 64)")
    sub.add_argument("--batch-size", type=int, default=64, help="(default %(default)s)")
    sub.add_argument("--rounds", type=int, default=7, help="rounds over all variants (default %(default)s)")
    sub.add_argument("--seconds", type=float, default=3.0, help="per variant and round (default %(default)s)")
    sub.add_argument("--csv", type=Path, help="write the figures to this file")
    detect = commands.add_parser(
        "detect",
        help="`toolkit detect` against decoding alone and the network alone",
        description="Frames per second of `toolkit detect` on a clip, beside decoding alone and the network alone, in turns.",
    )
    detect.add_argument("video", type=Path)
    detect.add_argument("--checkpoint", type=Path, required=True)
    detect.add_argument("--face-model", type=Path)
    detect.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "detect":
        _bench_detect(args)
        return 0
    if len(args.sizes) != len(args.widths):
        raise UserError("--sizes and --widths need the same number of values")
    if min(args.rounds, args.batch_size) < 1 or args.seconds <= 0:
        raise UserError("--rounds and --batch-size must be at least 1, --seconds above 0")

    import torch

    from toolkit.console import print_rows
    from toolkit.files import write_text

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    lines = ["image_size,width,variant,images_per_s,p20,p80,ratio"]
    for size, width in zip(args.sizes, args.widths, strict=True):
        timings = alternate(dcgan_variants(size, width, args.batch_size), args.batch_size, args.rounds, args.seconds)
        print_rows(
            f"DCGAN step, {size} px, width {width}",
            ("variant", "images/s", "20th to 80th percentile", "ratio"),
            [(t.name, f"{t.median:.0f}", f"{t.low:.0f} to {t.high:.0f}", f"{t.ratio:.2f}") for t in timings],
        )
        lines += [f"{size},{width},{t.name},{t.median:.1f},{t.low:.1f},{t.high:.1f},{t.ratio:.3f}" for t in timings]
    if args.csv:
        write_text(args.csv, "\n".join(lines) + "\n")
    return 0
