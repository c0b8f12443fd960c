"""Activations and fused operations: own kernels against eager PyTorch, eager in place, and ``torch.compile``."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.activations.module import ActivationModule
from toolkit.activations.registry import registry
from toolkit.activations.spec import ActivationSpec
from toolkit.bench.timing import gpu_times, peak_memory, wall_times
from toolkit.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("forward", "backward", "full", "second")
PROVIDERS = ("eager", "in place", "compile", "triton")
FUSED = ("bias_act", "norm_act", "norm_add_act", "add_act")

# Passes over the tensor that cannot be avoided, forward and backward, when each kernel reads and writes memory once; the
# gradient of the gradient reads dy, x and u and writes two.
PASSES = {"act": (2, 3, 5), "bias_act": (2, 3, 5), "add_act": (3, 3, 5), "norm_act": (3, 5, 0), "norm_add_act": (4, 7, 0)}

# PyTorch's own functions that can overwrite their input.
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "selu": F.selu, "celu": F.celu, "swish": F.silu, "mish": F.mish,
    "hardswish": F.hardswish,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A tensor to measure on: a name for tables, and its shape ``(N, C, H, W)``."""

    name: str
    shape: tuple[int, int, int, int]


def _dcgan(image_size: int, width: int = 64, batch: int = 128) -> list[Size]:
    levels = int(math.log2(image_size)) - 2
    maps = [(width * 2 ** (levels - 1 - i), 4 * 2**i) for i in range(levels)]
    return [Size(f"dcgan{image_size} {c}x{s}x{s}", (batch, c, s, s)) for c, s in maps]


def _resnet50(batch: int = 64) -> list[Size]:
    maps = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
    return [Size(f"resnet50 {c}x{s}x{s}", (batch, c, s, s)) for c, s in maps]


def sizes(names: Sequence[str], itemsize: int) -> list[Size]:
    """The tensors that size names stand for.

    Args:
        names: ``dcgan64``, ``dcgan128``, ``dcgan256``, ``resnet50`` (every distinct layer); ``1MB`` to ``1GB``; ``odd``;
            ``huge``, of more than 2^31 elements; or a shape such as ``64x256x14x14``.
        itemsize: bytes of an element.

    Raises:
        UserError: a name that is none of these.
    """
    result: list[Size] = []
    for name in names:
        if name.startswith("dcgan") and name[5:] in ("64", "128", "256"):
            result += _dcgan(int(name[5:]))
        elif name == "resnet50":
            result += _resnet50()
        elif name == "odd":
            result.append(Size(name, (7, 131, 53, 37)))
        elif name == "huge":
            result.append(Size(name, (129, 128, 361, 361)))
        elif name.upper().endswith(("MB", "GB")) and name[:-2].isdigit():
            elements = int(name[:-2]) * 2 ** (20 if name.upper().endswith("MB") else 30) // itemsize
            result.append(Size(name, (max(1, elements // (256 * 32 * 32)), 256, 32, 32)))
        else:
            try:
                n, c, h, w = (int(part) for part in name.split("x"))
            except ValueError as error:
                raise UserError(
                    f"size {name!r} is none of dcgan64, dcgan128, dcgan256, resnet50, 1MB to 1GB, odd, huge, and no shape NxCxHxW"
                ) from error
            result.append(Size(name, (n, c, h, w)))
    return result


@dataclass(frozen=True)
class Row:
    """One measurement. Times in milliseconds; ``passes`` over the tensor that the operation needs; ``copy`` in GB/s."""

    operation: str
    activation: str
    provider: str
    mode: str
    size: Size
    dtype: str
    layout: str
    kernel: tuple[float, float, float]
    wall: float
    gigabytes: float
    copy: float
    peak: int

    @property
    def gb_per_s(self) -> float:
        """The memory traffic that the operation needs, over its time."""
        return self.gigabytes / (self.kernel[0] / 1e3)


def _module(text: str, provider: str | None, channels: int, device: torch.device) -> ActivationModule:
    spec = ActivationSpec.parse(text)
    found, activation = registry().find(spec, (provider,) if provider else ())
    kind = activation.implementation or ActivationModule
    return kind(activation, spec, provider=found, channels=channels).to(device)


def _function(
    operation: str, text: str, provider: str, channels: int, device: torch.device
) -> tuple[Callable[..., Tensor], list[Tensor]] | None:
    """The operation as a provider computes it, and its parameters; None where the provider has no way of its own."""
    act = _module(text, "triton" if provider == "triton" else None, channels, device)
    norm = nn.BatchNorm2d(channels).to(device)
    bias = nn.Parameter(torch.randn(channels, device=device))
    parameters: list[Tensor] = list(act.parameters())
    apply: Callable[[Tensor], Tensor] = act
    if provider == "in place":
        own = _IN_PLACE.get(act.activation.name)
        if own is None or act.learned:
            return None
        fixed = {k: v for k, v in act.values.items() if k in ("negative_slope", "alpha")}

        def apply(x: Tensor) -> Tensor:
            return own(x, inplace=True, **fixed)

    if provider == "triton" and not act.can_fuse(torch.zeros(1, 1, 1, 1, device=device)):
        return None
    functions: dict[str, Callable[..., Tensor]]
    if provider == "triton":
        functions = {
            "act": act, "bias_act": lambda x: act.bias_act(x, bias), "add_act": act.add_act,
            "norm_act": lambda x: act.norm_act(x, norm), "norm_add_act": lambda x, r: act.norm_act(x, norm, r),
        }  # fmt: skip
    else:
        functions = {
            "act": apply,
            "bias_act": lambda x: apply(x + bias.to(x.dtype).view(1, -1, 1, 1)),
            "add_act": lambda x, r: apply(x + r),
            "norm_act": lambda x: apply(norm(x)),
            "norm_add_act": lambda x, r: apply(norm(x) + r),
        }
    function = functions[operation]
    if provider == "compile":
        function = torch.compile(function, dynamic=False)
    parameters += [bias] if operation == "bias_act" else list(norm.parameters()) if operation.startswith("norm") else []
    return function, parameters


def _work(
    function: Callable[..., Tensor], parameters: list[Tensor], inputs: list[Tensor], mode: str, in_place_leaf: bool
) -> tuple[Callable[[], Any], list[Tensor]] | None:
    """What is timed in a mode, and the tensors whose gradients it leaves behind."""
    leaves = [*inputs, *parameters]
    if mode == "forward":
        # Without a graph, as in evaluation, where a leaf may be overwritten.
        return (lambda: _without_graph(function, inputs)), []
    if in_place_leaf:
        return None
    if mode == "full":
        dy = torch.randn_like(inputs[0])
        return (lambda: function(*inputs).backward(dy)), leaves
    y = function(*inputs)
    dy = torch.randn_like(y)
    if mode == "backward":
        return (lambda: y.backward(dy, retain_graph=True)), leaves
    dy.requires_grad_()
    try:
        (g,) = torch.autograd.grad(y, inputs[0], dy, create_graph=True)
        u = torch.randn_like(g)
        torch.autograd.grad(g, [dy], u, retain_graph=True)
    except RuntimeError:
        return None  # torch.compile cannot differentiate twice
    return (lambda: torch.autograd.backward(g, u, retain_graph=True)), [*leaves, dy]


def _without_graph(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def _layout(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def copy_bandwidth(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> float:
    """GB/s that a plain copy of such a tensor reads and writes."""
    x = torch.randn(*shape, device=device).to(dtype)
    y = torch.empty_like(x)
    time = _times(lambda: y.copy_(x), device, None)[0]
    return 2 * x.numel() * x.element_size() / 1e9 / (time / 1e3)


def _times(function: Callable[[], Any], device: torch.device, clear: list[Any] | None) -> tuple[float, float, float]:
    return gpu_times(function, clear) if device.type == "cuda" else wall_times(function, clear)


def measure(
    operations: Iterable[str],
    activations: Iterable[str],
    names: Sequence[str],
    dtypes: Iterable[str],
    layouts: Iterable[str],
    modes: Iterable[str],
    providers: Iterable[str],
    device: torch.device,
) -> Iterator[Row]:
    """Measure every combination; one that a provider cannot compute, or that does not fit the memory, is left out."""
    for dtype, layout in itertools.product(dtypes, layouts):
        kind = DTYPES[dtype]
        for size in sizes(names, kind.itemsize):
            copy = copy_bandwidth(size.shape, kind, device)
            for operation, text, provider, mode in itertools.product(operations, activations, providers, modes):
                try:
                    row = _measure(operation, text, provider, mode, size, dtype, layout, device, copy)
                except torch.OutOfMemoryError:
                    row = None
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                if row is not None:
                    yield row


def _measure(
    operation: str, text: str, provider: str, mode: str, size: Size, dtype: str, layout: str, device: torch.device, copy: float
) -> Row | None:
    passes = PASSES[operation]
    needed = {"forward": passes[0], "backward": passes[1], "full": passes[0] + passes[1], "second": passes[2]}[mode]
    if not needed:
        return None
    torch._dynamo.reset()
    made = _function(operation, text, provider, size.shape[1], device)
    if made is None:
        return None
    function, parameters = made
    generator = torch.Generator(device).manual_seed(0)
    count = 2 if "add" in operation else 1
    kind = DTYPES[dtype]
    inputs = [_layout(torch.randn(size.shape, device=device, generator=generator).to(kind), layout).requires_grad_() for _ in range(count)]
    work = _work(function, parameters, inputs, mode, provider == "in place" and operation == "act")
    if work is None:
        return None
    timed, clear = work
    timed()
    for tensor in clear:
        tensor.grad = None
    peak = peak_memory(timed)
    kernel = _times(timed, device, clear)
    wall = wall_times(timed, clear)[0] if device.type == "cuda" else kernel[0]
    gigabytes = needed * inputs[0].numel() * kind.itemsize / 1e9
    return Row(operation, text, provider, mode, size, dtype, layout, kernel, wall, gigabytes, copy, peak)


# Those of Liger-Kernel's benchmark data, so that its tools read this file; the version is the toolkit's.
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label", "x_value",
    "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip


def records(rows: Iterable[Row], device_name: str, version: str) -> list[dict[str, Any]]:
    """The rows as records with Liger-Kernel's columns: for each its speed, wall time, share of the copy and memory."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    result = []
    for r in rows:
        share = r.gb_per_s / r.copy
        metrics = (
            ("speed", "ms", r.kernel), ("wall time", "ms", (r.wall,) * 3), ("bandwidth", "GB/s", (r.gb_per_s,) * 3),
            ("share of copy bandwidth", "", (share,) * 3), ("memory", "MB", (r.peak / 2**20,) * 3),
        )  # fmt: skip
        for name, unit, (middle, low, high) in metrics:
            config = f'{{"size": "{r.size.name}", "shape": {list(r.size.shape)}, "dtype": "{r.dtype}", "layout": "{r.layout}"}}'
            values = (
                f"{r.operation} {r.activation}", r.provider, r.mode, name, unit, "elements", "elements", math.prod(r.size.shape), middle,
                low, high, config, device_name, now, version,
            )  # fmt: skip
            result.append(dict(zip(COLUMNS, values, strict=True)))
    return result


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows as a table for people; ratios are times of eager and of ``torch.compile`` over that of the row."""
    reference = {(r.operation, r.activation, r.mode, r.size, r.dtype, r.layout, r.provider): r.kernel[0] for r in rows}

    def ratio(r: Row, provider: str) -> str:
        other = reference.get((r.operation, r.activation, r.mode, r.size, r.dtype, r.layout, provider))
        return "-" if other is None else f"{other / r.kernel[0]:.2f}"

    return [
        (
            r.operation, r.activation, r.size.name, r.dtype, r.layout, r.mode, r.provider, f"{r.kernel[0]:.3f}",
            f"{r.kernel[1]:.3f}-{r.kernel[2]:.3f}", f"{r.wall:.3f}", f"{r.gb_per_s:.0f}", f"{r.gb_per_s / r.copy:.2f}",
            ratio(r, "eager"), ratio(r, "in place"), ratio(r, "compile"), f"{r.peak / 2**20:.0f}" if r.peak else "-",
        )
        for r in rows
    ]  # fmt: skip


HEADINGS = (
    "operation", "activation", "size", "dtype", "layout", "mode", "provider", "ms", "p20-p80", "wall ms", "GB/s", "of copy",
    "x eager", "x in place", "x compile", "peak MB",
)  # fmt: skip


def plot(rows: Sequence[Row], title: str) -> str:
    """A page with one chart per operation and mode: share of the copy bandwidth over size, a line per provider."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = list(dict.fromkeys((r.operation, r.activation, r.mode) for r in rows))
    columns = min(3, len(panels))
    figure = make_subplots(-(-len(panels) // columns), columns, subplot_titles=[" ".join(p) for p in panels])
    colours = dict(zip(PROVIDERS, ("#7f7f7f", "#bcbd22", "#1f77b4", "#d62728"), strict=True))
    shown: set[str] = set()
    for place, panel in enumerate(panels):
        for provider in PROVIDERS:
            points = sorted(
                (math.prod(r.size.shape), r.gb_per_s / r.copy, f"{r.size.name} {r.dtype} {r.layout}: {r.kernel[0]:.3f} ms")
                for r in rows
                if (r.operation, r.activation, r.mode) == panel and r.provider == provider
            )
            if points:
                figure.add_trace(
                    go.Scatter(
                        x=[p[0] for p in points], y=[p[1] for p in points], text=[p[2] for p in points], mode="lines+markers",
                        name=provider, line_color=colours[provider], legendgroup=provider, showlegend=provider not in shown,
                    ),
                    place // columns + 1, place % columns + 1,
                )  # fmt: skip
                shown.add(provider)
    figure.update_xaxes(type="log", title_text="elements")
    figure.update_yaxes(title_text="share of copy bandwidth", rangemode="tozero")
    figure.update_layout(title=title, height=380 * -(-len(panels) // columns), width=520 * columns, template="plotly_white")
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
