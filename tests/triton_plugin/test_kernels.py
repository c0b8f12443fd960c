"""The kernels on a GPU, or on the CPU in Triton's interpreter; `test_plugin.py` starts this file there.

TRITON_INTERPRET=1 pytest tests/triton_plugin/test_kernels.py
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if os.environ.get("TRITON_INTERPRET", "0") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 (test_plugin.py runs these so)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from toolkit import Activation, Parameter
from toolkit.activations.assign import apply_rules, find_sites
from toolkit.activations.fuse import unfuse
from toolkit.activations.health import unit_health
from toolkit.activations.module import ActivationModule
from toolkit.activations.registry import registry
from toolkit.activations.spec import ActivationSpec
from toolkit.errors import UserError
from toolkit.gan.module import GAN
from toolkit_triton import kernels, launch, ops
from toolkit_triton.module import TritonActivation, scalars_of, triton_version

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = [
    "identity", "sigmoid", "tanh", "relu", "leaky_relu", "leaky_relu(negative_slope=0.2)", "leaky_relu(negative_slope=-0.3)",
    "leaky_relu(learn=negative_slope)", "prelu", "prelu(per_channel=true)", "elu", "elu(alpha=0.5, learn=alpha)", "swish",
    "swish(beta=1.5, learn=beta)", "swish(learn=beta, per_channel=true)", "gelu", "gelu(approximate=tanh)", "selu", "celu",
    "celu(alpha=1.3, learn=alpha, per_channel=true)", "mish", "hardswish", "softplus", "softplus(beta=2, learn=beta)", "softsign",
    "snake", "snake(a=0.7, learn=a, per_channel=true)",
]  # fmt: skip
OPS = ("plain", "bias", "add", "norm", "norm_eval", "norm_add")
# Of the largest value: what rounding to the type leaves, with room for a slope computed from a rounded output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPE = (3, 5, 4, 7)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("TOOLKIT_CACHE")
    os.environ["TOOLKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["TOOLKIT_CACHE"]
    else:
        os.environ["TOOLKIT_CACHE"] = before


def make(text: str, channels: int = 5) -> TritonActivation:
    spec = ActivationSpec.parse(text)
    provider, activation = registry().find(spec, ("triton",))
    module = TritonActivation(activation, spec, provider=provider, channels=channels)
    with torch.no_grad():  # parameters that differ between channels, so that a mix-up shows
        for p in module.parameters():
            p += 0.1 * torch.arange(p.numel())
    return module.to(DEVICE)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """``x`` in memory orders that activations meet."""
    strided = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    return {"contiguous": x, "channels_last": x.contiguous(memory_format=torch.channels_last), "strided": strided}


def same_order(x: Tensor, y: Tensor) -> bool:
    return y.stride() == torch.empty_like(x).stride()


def close(own: Tensor, reference: Tensor, tolerance: float, what: str, floor: float = 1e-3) -> None:
    assert own.shape == reference.shape, what
    own = own.detach().double().cpu()
    error = float((own - reference).abs().max()) if own.numel() else 0.0
    scale = float(reference.detach().abs().max()) + floor if own.numel() else 1.0
    assert error <= tolerance * scale, f"{what}: off by {error:.3g}, values up to {scale:.3g}"


class Case:
    """One operation: its own kernels, and the same in float64 PyTorch."""

    def __init__(self, op: str, act: TritonActivation, x: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        channels = x.shape[1]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.op, self.act = op, act
        self.norm = nn.BatchNorm2d(channels, eps=1e-3)
        with torch.no_grad():
            for tensor, values in (
                (self.norm.weight, draw(channels)), (self.norm.bias, draw(channels)),
                (self.norm.running_mean, draw(channels)), (self.norm.running_var, draw(channels).abs() + 0.5),
            ):  # fmt: skip
                tensor.copy_(values)
        self.norm.train(op != "norm_eval")
        bias, residual = draw(channels), torch.empty_like(x).copy_(draw(*x.shape).to(x))
        self.inputs: dict[str, Tensor] = {"x": x}
        if op == "bias":
            self.inputs["bias"] = bias.to(DEVICE)
        if op in ("add", "norm_add"):
            self.inputs["residual"] = residual
        if op.startswith("norm"):
            self.inputs |= {"weight": self.norm.weight.detach().to(DEVICE), "norm_bias": self.norm.bias.detach().to(DEVICE)}
        self.inputs |= {name: p.detach() for name, p in act.named_parameters()}
        self.norm.to(DEVICE)

    def own(self, **t: Tensor) -> Tensor:
        act = self.act
        for name in act.learned:
            act.register_parameter(name, None)
            delattr(act, name)
            setattr(act, name, t[name])  # a plain tensor that gradients reach
        act._bounded = lambda name: getattr(act, name)
        assert act.can_fuse(t["x"])
        if self.op == "plain":
            return act(t["x"])
        if self.op == "bias":
            return act.bias_act(t["x"], t["bias"])
        if self.op == "add":
            return act.add_act(t["x"], t["residual"])
        norm = copy.deepcopy(self.norm)
        for name, value in (("weight", t["weight"]), ("bias", t["norm_bias"])):
            norm.register_parameter(name, None)
            delattr(norm, name)
            setattr(norm, name, value)
        self.after = norm
        return act.norm_act(t["x"], norm, t.get("residual"))

    def reference(self, **t: Tensor) -> Tensor:
        x, shape = t["x"], [1, -1, *[1] * (t["x"].dim() - 2)]
        if self.op == "bias":
            x = x + t["bias"].view(shape)
        elif self.op.startswith("norm"):
            mean, variance = (b.double().cpu() for b in (self.norm.running_mean, self.norm.running_var))
            x = F.batch_norm(x, mean, variance, t["weight"], t["norm_bias"], self.norm.training, 0.1, self.norm.eps)
            self.after_reference = (mean, variance)
        if "residual" in t:
            x = x + t["residual"]
        formula, declared = self.act.activation.formula, self.act.activation.parameters
        arguments = [t[n].view(shape) if n in self.act.learned else self.act.values[n] for n in declared]
        return formula(x, *arguments)


def differentiate(function: Callable[..., Tensor], inputs: dict[str, Tensor], twice: bool) -> dict[str, Tensor]:
    """Value, gradients by every input, and gradients of a function of these gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)

    def wave(t: Tensor, shift: float) -> Tensor:
        # The same numbers whatever the memory order, and exact in every type.
        return (8 * torch.cos(torch.arange(t.numel(), dtype=torch.float64) * 0.7 + shift)).round().div(8).view(t.shape).to(t)

    result = {"value": y}
    first = torch.autograd.grad((y * wave(y, 0.0)).sum(), list(leaves.values()), create_graph=twice)
    result |= {f"gradient by {name}": g for name, g in zip(leaves, first, strict=True)}
    if twice:
        total = sum((g.float() if g.dtype != torch.float64 else g).mul(wave(g, 1.0).to(g)).sum() for g in first)
        if total.requires_grad:
            second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            result |= {f"second gradient by {n}": g for n, g in zip(leaves, second, strict=True) if g is not None}
    return result


def compare(case: Case, tolerance: float, twice: bool = True) -> None:
    own = differentiate(case.own, case.inputs, twice)
    reference = differentiate(case.reference, {n: t.detach().double().cpu() for n, t in case.inputs.items()}, twice)
    for name, expected in reference.items():
        # A sum's error grows with the root of its length, however small the sum.
        summed = case.inputs["x"].numel() / max(1, expected.numel())
        floor = 1e-3 + (0.1 * math.sqrt(summed) if summed > 1 else 0.0)
        if name in own:
            factor = 4 if name.startswith("second") else 1
            close(own[name], expected, tolerance * factor, f"{case.act.spec} {case.op}: {name}", floor)
        else:
            assert not expected.any(), f"{case.act.spec} {case.op}: no {name}"
    x, y = case.inputs["x"], own["value"]
    assert y.dtype == x.dtype
    assert same_order(x, y) or y.stride() == x.stride()
    assert own["gradient by x"].dtype == x.dtype


def sample(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return (1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("text", SPECS)
def test_every_function_and_operation(text: str, op: str, dtype: torch.dtype, layout: str) -> None:
    compare(Case(op, make(text), layouts(sample(dtype))[layout]), TOLERANCE[dtype])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 3, 3), (1, 3, 65, 33), (33, 130), (4, 7, 1, 1), (5, 3, 2, 3, 2), (3, 300, 1, 2), (2, 2, 70, 40), (2, 260, 3, 3)],
    ids=str,
)
def test_sizes_that_are_multiples_of_nothing(op: str, shape: tuple[int, ...]) -> None:
    if op.startswith("norm") and len(shape) != 4:
        pytest.skip("batch norm here is of images")
    text = "swish(learn=beta, per_channel=true)"
    compare(Case(op, make(text, shape[1]), sample(torch.float32, shape)), 2e-5)
    if len(shape) == 4:
        compare(Case(op, make(text, shape[1]), sample(torch.float32, shape).contiguous(memory_format=torch.channels_last)), 2e-5)


@pytest.mark.parametrize("text", ["swish", "relu", "prelu(per_channel=true)", "prelu"])
@pytest.mark.parametrize("op", OPS)
def test_expanded_and_transposed_inputs(op: str, text: str) -> None:
    x = sample(torch.float32, (3, 1, 4, 7)).expand(3, 5, 4, 7)
    compare(Case(op, make(text), x), 2e-5)
    compare(Case(op, make(text), sample(torch.float32, (7, 4, 5, 3)).permute(3, 2, 1, 0)), 2e-5)


@pytest.mark.parametrize("text", ["swish", "relu", "swish(learn=beta)", "identity", "softplus"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (4, 5, 0, 2)], ids=str)
def test_empty_and_scalar_tensors(text: str, shape: tuple[int, ...]) -> None:
    act = make(text)
    x = sample(torch.float32, shape).requires_grad_()
    y = act(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, act.reference(x), rtol=1e-5, atol=1e-6)
    inputs = [x, *act.parameters()]
    own = torch.autograd.grad(y.sum(), inputs)
    expected = torch.autograd.grad(act.reference(x).sum(), inputs, allow_unused=True)
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-5, atol=1e-6)


POINTS = [0.0, -0.0, 1e-38, -1e-38, 1e-7, -1e-7, 1e-4, -1e-4, 0.49, 0.5, -0.5, 0.51, 1.0, -1.0, 2.0, -2.0, 5.0, -5.0, 10.0, -10.0]
POINTS += [17.0, -17.0, 20.5, -20.5, 40.0, -41.0, 88.0, -88.0, 89.0, -90.0, 104.0, -104.0, 1e3, -1e3, 1e5, -1e5, 1e10, -1e10]
POINTS += [1.7e13, -1.7e13, 1e20, -1e20, 1e30, -1e30, 1e38, -1e38]


@pytest.mark.parametrize("text", SPECS)
def test_sound_wherever_a_float_can_be(text: str) -> None:
    """Value and both derivatives at magnitudes from 1e-38 to the largest, at zero, and value at inf and NaN."""
    act = make(text.replace(", per_channel=true", "").replace("(per_channel=true)", ""))
    # Beyond 1e10 a sine's argument is reduced with loss; neighbouring float32 are 1024 apart there.
    points = [p for p in POINTS if abs(p) < 1e10 or "snake" not in text]
    x = torch.tensor(points, device=DEVICE, requires_grad=True)
    y = act(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, allow_unused=True) if g.requires_grad else (None,)
    h = torch.zeros_like(x) if h is None else h
    wide = x.detach().double().cpu().requires_grad_()
    parameters = {n: getattr(act, n).detach().double().cpu() for n in act.learned}
    expected = act.activation.formula(wide, *(parameters.get(n, act.values[n]) for n in act.activation.parameters))
    (eg,) = torch.autograd.grad(expected.sum(), wide, create_graph=True)
    (eh,) = torch.autograd.grad(eg.sum(), wide, allow_unused=True) if eg.requires_grad else (None,)
    eh = torch.zeros_like(wide) if eh is None else eh
    for what, own, right in (("value", y, expected), ("derivative", g, eg), ("second derivative", h, eh)):
        # The argument of a sine carries the rounding of a x.
        slack = 2e-7 * wide.abs().clamp(max=1e15) if "snake" in text and what != "value" else 0.0
        error = (own.detach().double().cpu() - right).abs() - 1e-5 * right.abs() - 2e-6 - slack * (0.5 if "a=0.7" in text else 0.0)
        for p, e, a, b in zip(points, error.tolist(), own.tolist(), right.tolist(), strict=True):
            assert e <= 0 or a == b, f"{text}: {what} at {p:g} is {a:g}, not {b:g}"
    special = torch.tensor([math.inf, -math.inf, math.nan], device=DEVICE)
    if "snake" not in text:
        torch.testing.assert_close(act(special).cpu(), act.reference(special).detach().cpu(), equal_nan=True)
    assert torch.isnan(act(special)[2])


def test_slopes_at_kinks_are_those_of_pytorch() -> None:
    natives = {"relu": F.relu, "leaky_relu(negative_slope=0.2)": lambda t: F.leaky_relu(t, 0.2), "elu": F.elu, "selu": F.selu}
    natives |= {"celu": F.celu, "softplus": F.softplus, "gelu": F.gelu, "softsign": F.softsign, "elu(learn=alpha)": F.elu}
    for text, native in natives.items():
        x = torch.zeros(4, device=DEVICE, requires_grad=True)
        (own,) = torch.autograd.grad(make(text)(x).sum(), x)
        (expected,) = torch.autograd.grad(native(x).sum(), x)
        torch.testing.assert_close(own, expected, msg=lambda m, text=text: f"{text}: {m}")


def saved_bytes(function: Callable[[], Tensor], but: list[Tensor]) -> int:
    """Bytes of all tensors that are kept for backward, parameters and other tensors that are there anyway left out."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    y.sum().backward()
    free = {t.untyped_storage().data_ptr() for t in but}
    return sum(size for place, size in storages.items() if place not in free)


@pytest.mark.parametrize("text", [s for s in SPECS if s != "identity"])
def test_what_is_kept_for_backward(text: str) -> None:
    act = make(text)
    act.requires_grad_(False)
    x = sample(torch.bfloat16).requires_grad_()
    size, channels = x.numel() * 2, x.shape[1]
    parameters = [p.detach() for p in act.parameters()]
    norm = nn.BatchNorm2d(channels).to(DEVICE)
    bias = torch.randn(channels, device=DEVICE)
    residual = sample(torch.bfloat16)
    small = 4 * channels  # learned parameters in float32, as the kernels read them
    counts = {
        "plain": saved_bytes(lambda: act(x), parameters),
        "bias": saved_bytes(lambda: act.bias_act(x, bias), [*parameters, bias]),
        "add": saved_bytes(lambda: act.add_act(x, residual), parameters),
        "norm": saved_bytes(lambda: act.norm_act(x, norm), [*parameters, norm.weight, norm.bias]),
        "norm_add": saved_bytes(lambda: act.norm_act(x, norm, residual), [*parameters, norm.weight, norm.bias]),
    }
    extra = small if act.learned else 0
    assert counts["plain"] <= size + extra
    assert counts["bias"] <= size + extra
    assert counts["add"] <= size + extra
    assert size + 8 * channels <= counts["norm"] <= size + 8 * channels + extra
    assert counts["norm_add"] <= 2 * size + 8 * channels + extra


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_moves_its_statistics_as_in_pytorch(momentum: float | None, affine: bool, track: bool) -> None:
    act = make("swish")
    own = nn.BatchNorm2d(5, eps=1e-2, momentum=momentum, affine=affine, track_running_stats=track).to(DEVICE)
    other = copy.deepcopy(own)
    for step in range(3):
        x = sample(torch.float32) * (1 + step) + step
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = act.norm_act(a, own), act(other(b))
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        w = torch.cos(torch.arange(y.numel(), dtype=torch.float32)).view_as(y).to(DEVICE)
        (y * w).sum().backward()
        (z * w).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for (name, p), (_, q) in zip(own.state_dict().items(), other.state_dict().items(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    own.eval(), other.eval()
    torch.testing.assert_close(act.norm_act(x, own), act(other(x)), rtol=1e-5, atol=1e-5)


def test_statistics_far_from_zero() -> None:
    """A mean of 1e4 standard deviations loses nothing: sums of squares would lose everything."""
    x = torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 1e4
    stats, _ = launch.statistics(x, 1, None)
    wide = x.double().cpu()
    torch.testing.assert_close(stats[0].double().cpu(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1].double().cpu(), wide.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


def test_batch_norm_refuses_one_value_per_channel() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make("relu").norm_act(sample(torch.float32, (1, 5, 1, 1)), nn.BatchNorm2d(5).to(DEVICE))


def test_gradients_do_not_vary_from_run_to_run() -> None:
    act = make("swish(learn=beta, per_channel=true)", 16)
    x = sample(torch.float32, (6, 16, 24, 24))
    runs = []
    for _ in range(3):
        act.zero_grad()
        act(x).square().sum().backward()
        runs.append(act.beta.grad.clone())
    assert all(torch.equal(runs[0], r) for r in runs)


def third_party() -> Activation:
    """Something that no built-in function is, with two parameters."""
    return Activation(
        "bump",
        lambda x, a, b: x * torch.exp(-a * x**2) + b * torch.atan(x) + torch.asinh(a * x),
        parameters={"a": Parameter(0.3, above=0.0), "b": Parameter(0.1)},
    )


@pytest.mark.parametrize("op", OPS)
def test_a_third_party_formula_needs_no_triton(op: str) -> None:
    activation = triton_version(third_party())
    for text in ("bump", "bump(learn=[a, b])", "bump(learn=[a, b], per_channel=true)", "bump(a=0.7, learn=b)"):
        act = TritonActivation(activation, ActivationSpec.parse(text), provider="triton", channels=5).to(DEVICE)
        compare(Case(op, act, sample(torch.float32)), 2e-5)


def test_a_hand_written_function_wins() -> None:
    """A wrong one on purpose, so that it can be told from the derived one."""
    source = "def dx(x, a):\n    return 10.0 * a + _twice(x) * 0.0\n\ndef _twice(x):\n    return x * 2.0\n"
    activation = Activation("own", lambda x, a: a * x**2, parameters={"a": Parameter(2.0)}, triton=source)
    for text in ("own", "own(learn=a)"):
        act = TritonActivation(triton_version(activation), ActivationSpec.parse(text), channels=5).to(DEVICE)
        x = sample(torch.float32).requires_grad_()
        (g,) = torch.autograd.grad(act(x).sum(), x)
        torch.testing.assert_close(g, torch.full_like(g, 20.0))


def test_no_second_derivative_is_said_clearly() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].sign()

    act = TritonActivation(triton_version(Activation("once", lambda x: Once.apply(x) * x)), ActivationSpec("once")).to(DEVICE)
    x = sample(torch.float32).requires_grad_()
    (g,) = torch.autograd.grad(act(x).sum(), x, create_graph=True)
    with pytest.raises(UserError, match=r"once has no second derivative.*gradient penalty"):
        g.square().sum().backward()
    norm = nn.BatchNorm2d(5).to(DEVICE)
    (g,) = torch.autograd.grad(act.norm_act(x, norm).sum(), x, create_graph=True)
    with pytest.raises(UserError, match="once has no second derivative"):
        g.square().sum().backward()


def test_third_order_is_refused() -> None:
    x = sample(torch.float32).requires_grad_()
    (g,) = torch.autograd.grad(make("swish")(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(UserError, match="two derivatives, not three"):
        torch.autograd.grad(h.sum(), x)
    norm = nn.BatchNorm2d(5).to(DEVICE)
    (g,) = torch.autograd.grad(make("swish").norm_act(x, norm).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="two derivatives, not three"):
        torch.autograd.grad(h.square().sum(), x)


# --- in networks -------------------------------------------------------------------------------------------------------


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_alike(own: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert own.keys() == other.keys()
    for name in own:
        close(own[name], other[name].double().cpu(), tolerance, name, floor=1e-2)


@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
@pytest.mark.parametrize("norm", ["batch", "none", "layer"])
def test_a_gan_is_the_same_with_fused_operations(norm: str, upsampling: str) -> None:
    options = {"generator_width": 4, "discriminator_width": 4, "generator_norm": norm, "discriminator_norm": norm}
    rules = {"generator": {"*": "swish(learn=beta)", "output": "tanh"}}
    own = GAN(16, upsampling=upsampling, activations=rules, prefer=["triton"], **options).to(DEVICE)
    plain = GAN(16, upsampling=upsampling, activations=rules, **options).to(DEVICE)
    plain.load_state_dict(own.state_dict())
    fused = {s.name: s.fused for s in find_sites(copy.deepcopy(own.generator).cpu(), own.generator.example()).sites.values()}
    assert fused["up1.act"] == {"batch": "norm up1.norm", "none": "-", "layer": "-"}[norm]
    if norm == "none":
        assert fused["up2.act"].startswith("bias up2.conv")
    z = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for gan in (own, plain):
        images = gan.generator(z)
        results.append((images, gradients(gan, gan.discriminator(images).sin().sum())))
    close(results[0][0], results[1][0].detach().double().cpu(), 1e-5, "images")
    assert_alike(results[0][1], results[1][1], 1e-3)
    for (name, p), q in zip(own.state_dict().items(), plain.state_dict().values(), strict=True):
        close(p, q.double().cpu(), 1e-5, name)
    # The averaged copy has fused operations of its own, on its own norms.
    own.ema.load_state_dict(own.generator.state_dict())
    close(own.ema(z), plain.generator.eval()(z).detach().double().cpu(), 1e-5, "averaged copy")


def test_gradient_penalties_pass_through_fused_operations() -> None:
    """R1 (Mescheder et al. 2018) of a discriminator with and without batch norm, against the plain network."""
    for norm in ("none", "layer", "batch"):
        rules = {"discriminator": {"*": "swish(learn=beta)"}}
        options = {"generator_width": 4, "discriminator_width": 4, "discriminator_norm": norm, "activations": rules}
        own, plain = GAN(16, prefer=["triton"], **options).to(DEVICE), GAN(16, **options).to(DEVICE)
        plain.load_state_dict(own.state_dict())
        results = []
        for gan in (own, plain):
            x = sample(torch.float32, (4, 3, 16, 16)).requires_grad_()
            (g,) = torch.autograd.grad(gan.discriminator(x).sum(), x, create_graph=True)
            results.append(gradients(gan.discriminator, g.square().sum()))
        assert_alike(results[0], results[1], 2e-3)


def backbone(name: str, rule: str) -> tuple[nn.Module, nn.Module]:
    """A timm backbone with fused operations, and the same without; statistics that are not those of a new network."""
    import timm

    own = timm.create_model(name, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    sites = [n for n, s in find_sites(own, torch.zeros(2, 3, 32, 32)).sites.items() if s.activation in ("ReLU", "SiLU", "GELU")]
    rules = dict.fromkeys(sites, rule)
    plain = copy.deepcopy(own)
    apply_rules(own, rules, example=torch.zeros(2, 3, 32, 32), prefer=["triton"])
    apply_rules(plain, rules, example=torch.zeros(2, 3, 32, 32))
    return own.to(DEVICE), plain.to(DEVICE)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("test_resnet", {"norm", "norm+residual"}),
        ("test_efficientnet", {"norm"}),
        ("test_mambaout", set()),
        ("test_byobnet", {"norm", "bias", "residual"}),
    ],
)
def test_a_timm_backbone_is_the_same_with_fused_operations(name: str, kinds: set[str]) -> None:
    own, plain = backbone(name, "swish")
    assert list(own.state_dict()) == list(plain.state_dict())
    fused = [s.fused for s in find_sites(copy.deepcopy(own).cpu(), torch.zeros(2, 3, 32, 32)).sites.values()]
    found = {f.split()[0] + ("+residual" if "+ residual" in f else "") for f in fused if f != "-"}
    assert kinds <= found, found
    x = sample(torch.float32, (4, 3, 32, 32))
    for training in (True, False):
        own.train(training), plain.train(training)
        torch.manual_seed(0)
        a = own(x)
        torch.manual_seed(0)
        b = plain(x)
        close(a, b.detach().double().cpu(), 1e-4, "features")
        assert_alike(gradients(own, a.sin().sum()), gradients(plain, b.sin().sum()), 5e-3)
    for (key, p), q in zip(own.state_dict().items(), plain.state_dict().values(), strict=True):
        close(p, q.double().cpu(), 1e-4, key)


def test_a_network_that_takes_another_turn_is_still_right() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(5), nn.ReLU()
            self.turn = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            if self.turn:
                return y * 2 + y.mean() - (1 - y[:, :1])
            return self.act(y)

    network = Turning()
    apply_rules(network, {"act": "swish"}, example=torch.randn(2, 5, 3, 3), prefer=["triton"])
    network.to(DEVICE)
    assert network.act.fused_with == "norm norm"
    x = sample(torch.float32)
    plain = copy.deepcopy(network)
    unfuse(plain)
    assert "forward" not in vars(plain.norm)
    for network.turn in (False, True):
        plain.turn = network.turn
        torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.norm.running_mean, plain.norm.running_mean)


def test_probes_see_what_the_activation_really_gets() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    apply_rules(network, {"2": "relu"}, example=torch.randn(2, 3, 8, 8), prefer=["triton"])
    network.to(DEVICE)
    seen: list[dict[str, float]] = []
    handle = network[2].register_forward_hook(lambda m, a, y: seen.append(unit_health(m, a[0], y)))
    x = sample(torch.float32, (2, 3, 8, 8))
    with_probe = network(x)
    handle.remove()
    assert 0.3 < seen[0]["saturated"] < 0.7  # of normalised inputs half are below zero
    torch.testing.assert_close(with_probe, network(x), rtol=1e-5, atol=1e-5)


def test_rules_can_be_applied_again() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    example = torch.randn(2, 3, 8, 8)
    for text in ("relu", "swish", "softsign"):
        apply_rules(network, {"2": text}, example=example, prefer=["triton"])
        network.to(DEVICE)
        x = sample(torch.float32, (2, 3, 8, 8))
        fused = network(x)
        unfuse(network)
        torch.testing.assert_close(fused, network(x), rtol=1e-4, atol=1e-5)
        network.cpu()
    apply_rules(network, {"2": "relu"}, example=example)
    assert "forward" not in vars(network[1])


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt")
    norm = nn.SyncBatchNorm(5, momentum=data["momentum"])
    norm.load_state_dict(data["norm"])
    act = make("swish(learn=beta)").cpu()
    # Batches of different sizes, as at the end of an epoch.
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    x, r = (data[n][part].requires_grad_() for n in ("x", "residual"))
    y = act.norm_act(x, norm, r)
    (y * data["weights"][part]).sum().backward()
    for p in (*norm.parameters(), *act.parameters()):
        torch.distributed.all_reduce(p.grad)
    norm.eval()
    torch.save(
        {"y": y.detach(), "x": x.grad, "residual": r.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, "beta": act.beta.grad,
         "state": norm.state_dict(), "eval": act.norm_act(x, norm).detach()},
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="two processes share the CPU; on GPUs there would have to be two")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_processes_share_the_statistics_of_a_synchronised_norm(momentum: float | None, tmp_path: Path) -> None:
    """SyncBatchNorm over two processes equals batch norm of the whole batch in one."""
    generator = torch.Generator().manual_seed(0)
    x, residual, weights = (torch.randn(5, 5, 4, 3, generator=generator) for _ in range(3))
    norm = nn.BatchNorm2d(5, momentum=momentum)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.save({"x": x, "residual": residual, "weights": weights, "norm": norm.state_dict(), "momentum": momentum}, tmp_path / "data.pt")
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    act = make("swish(learn=beta)")
    x.requires_grad_(), residual.requires_grad_()
    y = act(norm(x) + residual)
    (y * weights).sum().backward()
    expected = {"y": y, "x": x.grad, "residual": residual.grad}
    for name, whole in expected.items():
        close(torch.cat([first[name], second[name]]), whole.detach().double(), 1e-5, name)
    for name, whole in (("weight", norm.weight.grad), ("bias", norm.bias.grad), ("beta", act.beta.grad)):
        close(first[name], whole.double(), 1e-5, name)
    for name, value in norm.state_dict().items():
        close(first["state"][name], value.double(), 1e-5, name)
        assert torch.equal(first["state"][name], second["state"][name])
    norm.eval()
    close(torch.cat([first["eval"], second["eval"]]), act(norm(x)).detach().double(), 1e-5, "evaluation")


# --- as a citizen of PyTorch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["swish(learn=beta, per_channel=true)", "relu", "swish"])
def test_registered_operators_pass_opcheck(text: str) -> None:
    act = make(text)
    key = ops.register(act.scalars)
    p = act._parameters_tensor(torch.zeros(1, device=DEVICE)).detach().clone().requires_grad_(bool(act.learned))
    x = sample(torch.float32).requires_grad_()
    bias, weight = (torch.randn(5, device=DEVICE, requires_grad=True) for _ in range(2))
    residual = sample(torch.float32).requires_grad_()
    torch.library.opcheck(ops.activate_op, (x, None, None, p, key, 1, True))
    torch.library.opcheck(ops.activate_op, (x, bias, None, p, key, 1, True))
    torch.library.opcheck(ops.activate_op, (x, None, residual, p, key, 1, True))
    torch.library.opcheck(ops.norm_activate_op, (x, None, weight, bias, None, None, p, key, 1e-5, 1))
    torch.library.opcheck(ops.norm_activate_op, (x, residual, weight, bias, None, None, p, key, 1e-5, 1))
    mean, variance = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    torch.library.opcheck(ops.norm_activate_op, (x, None, weight, bias, mean, variance, p, key, 1e-5, 1))
    dy = sample(torch.float32).requires_grad_()
    saved = act(x).detach().requires_grad_() if act.scalars.needs == "output" else x
    torch.library.opcheck(ops.activate_backward_op, (dy, saved, None, p, key, 1, False, bool(act.learned)))


def test_no_graph_break_under_compile() -> None:
    """Registered operators in a graph, and a network with fused operations, which compilers see as its formula."""
    act = make("swish")
    key, p = ops.register(act.scalars), torch.empty((0, 1), device=DEVICE)
    x = sample(torch.float32)

    def f(t: Tensor) -> Tensor:
        return torch.ops.toolkit_triton.activate(t * 2, None, None, p, key, 1, True)[0].sum()

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a).backward()
    torch.compile(f, fullgraph=True, backend="aot_eager")(b).backward()
    torch.testing.assert_close(a.grad, b.grad)

    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3), nn.ReLU())
    apply_rules(network, {"2": "swish", "4": "prelu"}, example=torch.randn(2, 3, 8, 8), prefer=["triton"])
    network.to(DEVICE)
    assert network[2].fused_with == "norm 1"
    assert network[4].fused_with == "bias 3"
    x = sample(torch.float32, (2, 3, 8, 8))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_mixed_precision() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3), nn.ReLU())
    apply_rules(network, {"2": "swish", "4": "prelu"}, example=torch.randn(2, 3, 8, 8), prefer=["triton"])
    network.to(DEVICE)
    x = sample(torch.float32, (2, 3, 8, 8))
    expected = network(x).detach()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    close(y, expected.double().cpu(), 5e-2, "autocast")
    y.float().sin().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@triton.jit
def _offsets(out_ptr, channel_ptr, block, t, N, C, S, LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    offsets, _, channel, _ = kernels.tile_at(tl.program_id(0) + block, tl.program_id(0) + t, N, C, S, LAST, R, K)
    place = tl.arange(0, R)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + place, offsets)
    tl.store(channel_ptr + place, tl.broadcast_to(channel, (R, K)))


@pytest.mark.parametrize("last", [True, False])
def test_offsets_beyond_an_int(last: bool) -> None:
    """Where a tile of a tensor of 10^10 elements lies, without making one."""
    n, c, s, rows, columns = (40_000_000, 250, 1, 4, 64) if last else (40_000, 250, 1000, 2, 256)
    block, t = (3, 9_000_000) if last else (249, 4 * 19_000 + 3)
    out = torch.zeros(rows, columns, dtype=torch.int64, device=DEVICE)
    channel = torch.zeros(rows, columns, dtype=torch.int32, device=DEVICE)
    _offsets[(1,)](out, channel, block, t, n, c, s, LAST=last, R=rows, K=columns)
    r, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    if last:
        expected = (t * rows + r) * c + block * columns + k
    else:
        expected = ((t // 4 * rows + r) * c + block) * s + (t % 4) * columns + k
    assert int(expected.max()) > 2**31
    assert torch.equal(out.cpu(), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_more_elements_than_an_int_can_count() -> None:
    act = make("swish")
    n = 2**31 + 4099
    x = torch.zeros(n, device=DEVICE, dtype=torch.bfloat16)
    x[-5:] = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0], device=DEVICE)
    y = act(x)
    torch.testing.assert_close(y[-5:], F.silu(x[-5:]), rtol=2e-2, atol=1e-2)
    dx = launch.backward(act.scalars, x, x, None, torch.empty((0, 1), device=DEVICE), 1, from_output=False, sum_g=False, sum_p=False)[0]
    assert dx[-1] != 0
    del dx, y
    x = x[: 2**31 + 4096].view(1, 2, -1, 64)
    stats, _ = launch.statistics(x, 1, None)
    assert torch.isfinite(stats).all()
    y = act.norm_act(x, nn.BatchNorm2d(2, track_running_stats=False).to(DEVICE))
    assert torch.isfinite(y[0, 1, -1]).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_step_in_a_cuda_graph() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    apply_rules(network, {"2": "swish", "4": "prelu"}, example=torch.randn(2, 3, 16, 16), prefer=["triton"])
    network.to(DEVICE)
    x = sample(torch.float32, (4, 3, 16, 16))
    step = torch.cuda.make_graphed_callables(network, (x,))
    plain = copy.deepcopy(network)
    for _ in range(2):
        x = torch.randn_like(x)
        torch.testing.assert_close(step(x), plain(x), rtol=1e-4, atol=1e-5)


def test_functions_that_are_not_fused_keep_the_base_class() -> None:
    provider, activation = registry().find("softmax", ("triton",))
    assert provider == "toolkit_builtin"
    assert activation.implementation is None
    assert ActivationModule.fusible is False
    assert scalars_of(registry().find("swish", ("triton",))[1], {"beta": 1.0}, ()).needs == "input"
