"""Whole training steps of a DCGAN and of a ResNet-50 on a GPU: eager, compiled, with Triton, with Triton in a CUDA graph.

On a CPU the same steps run too (but for the graph), which serves the tests: Triton activations are their formulas there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.bench.timing import Variant, peak_memory, repeat

WAYS = ("eager", "compiled", "triton", "triton in a CUDA graph")


@dataclass(frozen=True)
class Step:
    """A training step and what it needs."""

    name: str
    step: Callable[[], None]
    images: int
    peak: int

    def variant(self) -> Variant:
        def step() -> None:
            self.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return Variant(self.name, repeat(step))


def _precision(name: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else contextlib.nullcontext()


def _graphed(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` captured in a CUDA graph, after some steps outside of it that make all kernels and buffers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def dcgan_steps(
    image_size: int, width: int, batch: int, precision: str, activation: str, device: torch.device, ways: tuple[str, ...] = WAYS
) -> Iterator[Step]:
    """A DCGAN step (Goodfellow's non-saturating loss, fused Adam, channels last), each way of computing it in turn."""
    from toolkit.gan.module import GAN

    rules: dict[str, dict[str, str | dict[str, Any]]] = {
        "generator": {"*": activation, "output": "tanh"},
        "discriminator": {"*": "leaky_relu(negative_slope=0.2)", "output": "identity"},
    }
    for way in ways:
        prefer = ["triton"] if way.startswith("triton") else []
        gan = GAN(image_size, 100, width, width, activations=rules, prefer=prefer, ema_decay=0.0)
        g, d = gan.generator.to(device).train(), gan.discriminator.to(device).train()
        run_g, run_d = (torch.compile(g), torch.compile(d)) if way == "compiled" else (g, d)
        optimizers = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999), fused=True, capturable=device.type == "cuda") for n in (g, d)]
        real = (torch.rand(batch, 3, image_size, image_size, device=device) * 2 - 1).contiguous(memory_format=torch.channels_last)
        z = torch.empty(batch, 100, device=device)

        def step(
            run_g: Any = run_g, run_d: Any = run_d, d: nn.Module = d, optimizers: Any = optimizers, real: Tensor = real, z: Tensor = z
        ) -> None:
            z.normal_()
            optimizers[1].zero_grad()
            with _precision(precision, device):
                fake = run_g(z)
                loss = F.softplus(-run_d(real).float()).mean() + F.softplus(run_d(fake.detach()).float()).mean()
            loss.backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            d.requires_grad_(False)
            with _precision(precision, device):
                loss = F.softplus(-run_d(fake).float()).mean()
            loss.backward()
            d.requires_grad_(True)
            optimizers[0].step()

        yield _step(way, step, batch)


def resnet_steps(
    batch: int, precision: str, activation: str, device: torch.device, ways: tuple[str, ...] = WAYS, image_size: int = 224
) -> Iterator[Step]:
    """A step of timm's ResNet-50 as a detector (binary cross-entropy, fused SGD, channels last)."""
    import timm

    from toolkit.activations.assign import apply_rules, find_sites

    for way in ways:
        torch.manual_seed(0)
        network = timm.create_model("resnet50", num_classes=1)
        example = torch.zeros(2, 3, 64, 64)
        rules = dict.fromkeys(find_sites(network).sites, activation)
        apply_rules(network, rules, example=example, prefer=["triton"] if way.startswith("triton") else [])
        network = network.to(device).to(memory_format=torch.channels_last).train()
        run = torch.compile(network) if way == "compiled" else network
        optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, fused=True)
        x = torch.randn(batch, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 2, (batch, 1), device=device).float()

        def step(run: Any = run, optimizer: Any = optimizer, x: Tensor = x, target: Tensor = target) -> None:
            optimizer.zero_grad()
            with _precision(precision, device):
                loss = F.binary_cross_entropy_with_logits(run(x).float(), target)
            loss.backward()
            optimizer.step()

        yield _step(way, step, batch)


def _step(way: str, step: Callable[[], None], images: int) -> Step:
    for _ in range(3):
        step()
    peak = peak_memory(step)
    return Step(way, _graphed(step) if way.endswith("graph") else step, images, peak)
