"""How benchmarks measure time: side by side in one run, medians and percentiles, never a single number."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def gpu_times(function: Callable[[], Any], clear: list[Any] | None = None) -> tuple[float, float, float]:
    """Milliseconds of a function on the GPU: median, 20th and 80th percentile, the L2 cache emptied before each run.

    Args:
        clear: tensors whose gradients are set to None before each run.
    """
    from triton.testing import do_bench

    low, median, high = do_bench(function, warmup=25, rep=100, grad_to_none=clear, quantiles=[0.2, 0.5, 0.8])
    return median, low, high


def wall_times(function: Callable[[], Any], clear: list[Any] | None = None, seconds: float = 0.1) -> tuple[float, float, float]:
    """Milliseconds until a function is done, as its caller waits: median, 20th and 80th percentile.

    On a GPU these are of ten calls in a row, so that what the host does for one overlaps with the work of another.

    Args:
        clear: tensors whose gradients are set to None after each call, or they would be added up.
        seconds: to measure for, at least five times.
    """
    import torch

    def call() -> None:
        function()
        for tensor in clear or ():
            tensor.grad = None

    gpu = torch.cuda.is_available()
    calls = 10 if gpu else 1
    for _ in range(WARM_UP):
        call()
    spent: list[float] = []
    while sum(spent) < seconds or len(spent) < 5:
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if gpu:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    ordered = sorted(1e3 * s / calls for s in spent)
    return statistics.median(ordered), ordered[int(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of GPU memory that a function takes on top of what is taken before; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before
