"""The built-in activations against PyTorch's own and against finite differences."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats
from torch import nn

from toolkit import ActivationSpec, UserError, registry
from toolkit.activations.module import ActivationModule

BUILTIN = {n: a for n, a in registry().providers["toolkit_builtin"].items() if n == a.name}
FORMULAS = sorted(n for n, a in BUILTIN.items() if a.formula is not None)
EXPECTED = {
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "prelu",
    "elu",
    "swish",
    "gelu",
    "softmax",
    "identity",
    "selu",
    "celu",
    "mish",
    "hardswish",
    "softplus",
    "softsign",
    "snake",
}
# Independent references in NumPy and SciPy, float64.
REFERENCES = {
    "sigmoid": lambda x: special.expit(x),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "prelu": lambda x: np.where(x > 0, x, 0.25 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "swish": lambda x: x * special.expit(x),
    "gelu": lambda x: x * stats.norm.cdf(x),
    "identity": lambda x: x,
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))),
    "celu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "snake": lambda x: x + np.sin(x) ** 2,
}


def make(text: str, **keywords: object) -> ActivationModule:
    provider, activation = registry().find(text)
    return ActivationModule(activation, ActivationSpec.parse(text), provider=provider, **keywords)


def test_every_promised_function_is_there() -> None:
    assert set(BUILTIN) == EXPECTED
    assert registry().find("silu")[1].name == "swish"
    assert registry().find("linear")[1].name == "identity"


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_equals_independent_reference(name: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e4, -700.0, 700.0, 1e4, 1e-8, -1e-8]])
    with torch.no_grad():
        got = make(name).double().reference(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, REFERENCES[name](x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_native_equals_formula(name: str) -> None:
    module = make(name)
    x = torch.linspace(-20, 20, 4001).requires_grad_(True)
    native, formula = module(x), module.reference(x)
    torch.testing.assert_close(native, formula, rtol=2e-5, atol=2e-6)
    (a,) = torch.autograd.grad(native.sum(), x)
    (b,) = torch.autograd.grad(formula.sum(), x)
    torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_against_finite_differences(name: str) -> None:
    learnable = [n for n, p in BUILTIN[name].parameters.items() if p.learnable]
    text = f"{name}(learn=[{', '.join(learnable)}], per_channel=true)" if learnable else name
    module = make(text, channels=3).double()
    # Away from the kinks at 0 and at +-3, where a finite difference straddles two pieces.
    x = torch.tensor([-5.3, -2.1, -0.7, 0.4, 1.9, 4.6], dtype=torch.float64).repeat(3, 1).T.reshape(2, 3, 3).requires_grad_(True)
    parameters = [module.get_parameter(n) for n in module.learned]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return module.reference(inputs[0])

    assert torch.autograd.gradcheck(function, (x, *parameters))
    if BUILTIN[name].default_properties.smoothness >= 1:
        assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("name", FORMULAS)
def test_infinite_and_nan_inputs(name: str) -> None:
    module = make(name)
    with torch.no_grad():
        assert torch.isnan(module(torch.tensor([float("nan")]))).all()
        assert torch.isnan(module.reference(torch.tensor([float("nan")]))).all()
        big = module.reference(torch.tensor([1e30, -1e30]))
    if name != "snake":  # the sine of 1e30 is defined but not meaningful
        assert not torch.isnan(big).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_keeps_shape_dtype_and_memory_format_and_input(name: str, dtype: torch.dtype) -> None:
    module = make(name).to(dtype)
    x = torch.randn(2, 4, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    y = module(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


def test_softmax_over_channels() -> None:
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(make("softmax")(x), F.softmax(x, dim=1))
    torch.testing.assert_close(make("softmax", channel_dim=-1)(x), F.softmax(x, dim=-1))


def test_swish_with_beta_and_gelu_tanh() -> None:
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(make("swish(beta=1.5)")(x), x * torch.sigmoid(1.5 * x))
    torch.testing.assert_close(make("gelu(approximate=tanh)").reference(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_prelu_equals_torch_also_per_channel() -> None:
    x = torch.randn(3, 6, 4, 4)
    ours = make("prelu(per_channel=true)", channels=6)
    theirs = nn.PReLU(6)
    with torch.no_grad():
        values = torch.linspace(-0.5, 1.0, 6)
        ours.negative_slope.copy_(values)
        theirs.weight.copy_(values)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.reference(x), theirs(x))


def test_per_channel_on_the_last_dimension() -> None:
    module = make("swish(learn=beta, per_channel=true)", channels=7, channel_dim=-1)
    with torch.no_grad():
        module.beta.copy_(torch.arange(7.0))
    x = torch.randn(2, 5, 7)
    torch.testing.assert_close(module(x), x * torch.sigmoid(torch.arange(7.0) * x))


def test_learned_parameter_outside_its_bounds_stays_usable() -> None:
    module = make("snake(learn=a)")
    with torch.no_grad():
        module.a.fill_(-0.5)
    y = module(torch.randn(10))
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert module.a.grad is not None
    assert torch.isfinite(module.a.grad).all()


def test_state_dict_pickle_and_deepcopy() -> None:
    module = make("swish(beta=1.5, learn=beta)")
    assert list(module.state_dict()) == ["beta"]
    x = torch.randn(8)
    for twin in (copy.deepcopy(module),):
        assert torch.equal(twin(x), module(x))
    assert pickle.loads(pickle.dumps(module.spec)) == module.spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swish(bta=1)", "no parameter 'bta'.*Did you mean 'beta'"),
        ("gelu(approximate=maybe)", "one of none, tanh"),
        ("elu(alpha=-1)", "above 0"),
        ("gelu(learn=approximate)", "cannot be learned"),
        ("relu(per_channel=true)", "needs a learned parameter"),
        ("snake(a=0)", "above 0"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(text)


def test_properties_are_measured_right() -> None:
    sigmoid, relu, elu, tanh = (BUILTIN[n].default_properties for n in ("sigmoid", "relu", "elu", "tanh"))
    assert sigmoid.output_range == (0.0, 1.0)
    assert tanh.output_range == (-1.0, 1.0)
    assert relu.output_range == (0.0, math.inf)
    assert elu.output_range == (-1.0, math.inf)
    assert relu.gain == pytest.approx(math.sqrt(2), rel=1e-6)
    assert tanh.gain == pytest.approx(1.59254, rel=1e-4)  # 1 / sqrt(E[tanh(z)^2]), Monte Carlo of 1e8 draws
    assert BUILTIN["selu"].default_properties.gain == pytest.approx(1.0, abs=1e-6)  # what selu is made for
    assert {n: BUILTIN[n].default_properties.smoothness for n in ("relu", "leaky_relu", "elu", "selu", "softsign", "hardswish")} == {
        "relu": 0,
        "leaky_relu": 0,
        "elu": 1,
        "selu": 0,
        "softsign": 1,
        "hardswish": 0,
    }
    assert all(BUILTIN[n].default_properties.smoothness == 3 for n in ("swish", "gelu", "mish", "tanh", "sigmoid", "softplus"))
    assert not BUILTIN["swish"].default_properties.monotonic
    assert BUILTIN["elu"].default_properties.monotonic
    assert BUILTIN["swish"].default_properties.output_range[0] == pytest.approx(-0.278464, abs=1e-5)
