"""From a formula to Triton source: what is printed, and what is refused with a reason. Needs neither Triton nor a GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from toolkit import Activation, Parameter
from toolkit.activations.registry import registry
from toolkit_triton.formula import NoTriton, write

BUILT_IN = [a for n, a in registry().providers["toolkit_builtin"].items() if n == a.name and a.formula is not None]


def source_of(activation: Activation, *learned: str) -> str:
    return write(activation, {n: p.default for n, p in activation.parameters.items()}, learned).source


def body(source: str, name: str) -> str:
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.unparse(found.body[-1])


@pytest.mark.parametrize("activation", BUILT_IN, ids=lambda a: a.name)
def test_every_built_in_formula_is_printed_with_all_derivatives(activation: Activation) -> None:
    learnable = [n for n, p in activation.parameters.items() if p.learnable]
    for learned in ((), tuple(learnable)):
        source = source_of(activation, *learned)
        names = {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
        expected = {"value", "dx", "dxx", "by_parameters", "second_dy", "second_dx", "second_parameters"}
        expected |= {f"{d}_{p}" for p in learned for d in ("d", "dx")} | {f"d_{p}_{q}" for p in learned for q in learned}
        assert expected <= names


def test_the_generic_kernels_name_no_activation() -> None:
    import toolkit_triton

    folder = toolkit_triton.__path__[0]
    for file in ("kernels.py", "launch.py", "ops.py"):
        names = {n.id for n in ast.walk(ast.parse(Path(folder, file).read_text())) if isinstance(n, ast.Name)}
        assert not names & {a.name for a in BUILT_IN}


@pytest.mark.parametrize(
    ("name", "learned", "needs"),
    [
        ("relu", (), "output"), ("sigmoid", (), "output"), ("tanh", (), "output"), ("leaky_relu", (), "output"),
        ("softplus", (), "output"), ("identity", (), "none"), ("swish", (), "input"), ("mish", (), "input"),
        ("leaky_relu", ("negative_slope",), "input"), ("elu", (), "input"),
    ],
)  # fmt: skip
def test_what_backward_is_computed_from(name: str, learned: tuple[str, ...], needs: str) -> None:
    activation = registry().providers["toolkit_builtin"][name]
    scalars = write(activation, {n: p.default for n, p in activation.parameters.items()}, learned)
    assert scalars.needs == needs
    assert scalars.identity == (name == "identity")


def test_a_negative_slope_cannot_be_told_from_the_output() -> None:
    assert write(registry().providers["toolkit_builtin"]["leaky_relu"], {"negative_slope": -0.1}, ()).needs == "input"


def test_parameters_may_have_any_name() -> None:
    """Names that the printed source has for itself."""
    for name in ("t0", "P", "tl", "sigmoid", "total", "g", "lambda", "triton", "own_dx"):
        activation = Activation("named", lambda x, p: p * torch.sigmoid(p * x) * torch.exp(-p * x * x), parameters={name: Parameter(0.7)})
        for function in ast.parse(source_of(activation, name)).body:
            if isinstance(function, ast.FunctionDef):
                assigned = [t.id for n in function.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
                assert len(assigned) == len(set(assigned))
                assert not {"P", "tl", "x", "sigmoid", "triton"} & set(assigned)


def test_cancellation_is_avoided() -> None:
    """1 - sigmoid(t) and expm1(t) + 1 are exact where they are tiny."""
    assert "sigmoid(-x)" in source_of(Activation("a", lambda x: x * torch.sigmoid(x)))
    assert "+ 1.0" not in body(source_of(Activation("b", torch.expm1)), "dx")


def test_fixed_parameters_are_numbers_and_choices_select_a_formula() -> None:
    swish = registry().providers["toolkit_builtin"]["swish"]
    assert "1.5" in write(swish, {"beta": 1.5}, ()).source
    gelu = registry().providers["toolkit_builtin"]["gelu"]
    assert "erf" in write(gelu, {"approximate": "none"}, ()).source
    assert "tanh" in write(gelu, {"approximate": "tanh"}, ()).source


@pytest.mark.parametrize(
    ("formula", "why"),
    [
        (lambda x: x - x.mean(), "mean"),
        (lambda x: torch.cumsum(x, 0), "cumsum"),
        (lambda x: torch.softmax(x, 0), "amax|sum|softmax"),
        (lambda x: x if float(x.detach().flatten()[0]) > 0 else -x, "traced|value"),
        (lambda x: torch.special.bessel_j0(x), "bessel_j0"),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0]), "table of numbers"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
        (lambda x: x.unsqueeze(0) * x.unsqueeze(1), "not element-wise"),
        (lambda x: x.sum() * 0 + 1, "not element-wise|sum"),
        (lambda x: x + torch.rand_like(x), "rand"),
    ],
)
def test_what_cannot_be_printed_says_why(formula, why: str) -> None:
    with pytest.raises(NoTriton, match=why):
        write(Activation("odd", formula), {}, ())


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def dx(x:\n", "not Python"),
        ("def slope(x):\n  return x", "defines slope, which is none of value, dx"),
        ("y = 3", "other than functions"),
        ("def dx(x):\n  return x\nimport os", "other than functions"),
    ],
)
def test_hand_written_source_is_checked(source: str, why: str) -> None:
    with pytest.raises(NoTriton, match=why):
        write(Activation("own", torch.tanh, triton=source), {}, ())


def test_hand_written_source_replaces_what_it_names() -> None:
    activation = Activation("own", lambda x, a: a * x, parameters={"a": Parameter(2.0)}, triton="def dxx(x, a):\n    return x * 7.0\n")
    assert "own_dxx(x, P[0])" in source_of(activation, "a")
    assert "own_dxx(x, 2.0)" in source_of(activation)
    assert "own_dx(" not in source_of(activation)


def test_formulas_with_in_place_operations_and_pytorch_functions() -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1).clamp_(min=0)
        return y

    assert "2.0" in source_of(Activation("in_place", in_place))
    for function in (F.silu, F.hardsigmoid, F.softshrink, F.hardshrink, F.tanhshrink, F.relu6, F.hardtanh, F.logsigmoid, torch.erf,
                     torch.rsqrt, torch.square, lambda x: x**3, lambda x: x**1.5, lambda x: torch.maximum(x, -x),
                     lambda x: torch.logaddexp(x, x * 0), F.gelu, F.mish, F.selu, torch.sign, torch.cosh):  # fmt: skip
        source_of(Activation("known", function))
