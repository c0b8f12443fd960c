"""From an activation's formula to scalar Triton functions: traced with ``make_fx``, printed as source.

Nothing here imports Triton, so the source can be made and read on a machine without it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import keyword
import math
import operator
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from toolkit.activations.declare import Activation
from toolkit.activations.spec import ActivationSpec, Value

aten = torch.ops.aten
Text = str
Operand = float | bool | Text
"""What a node of the graph has become: a known number, or a piece of source."""

MAX_PARAMETERS = 4
"""Learned parameters that the kernels have room for."""
_INLINE = 60
_NEEDED_HELPERS = ("sigmoid", "tanh", "expm1", "log1p", "sin", "cos", "atan", "asinh", "power")


def _safe(name: str) -> str:
    """A parameter's name as a variable of the printed source, apart from those that this has already."""
    taken = keyword.iskeyword(name) or name in ("P", "tl", "triton", "x", "y", *_NEEDED_HELPERS) or re.fullmatch(r"t\d+|own_\w*", name)
    return f"{name}_" if taken else name


class NoTriton(Exception):
    """A formula has no Triton version; the message says why, in a few words."""


@dataclass(frozen=True)
class Scalars:
    """The scalar functions of one activation at given fixed parameters, as Triton source.

    Attributes:
        key: the canonical string of the activation and a hash of the source, e.g. ``swish(beta=1.5, learn=beta)@1f...``; the
            name under which the operators find these functions.
        learned: names of the learned parameters, in the order in which kernels receive them.
        source: the source of a Python module with ``value``, ``dx``, ``dxx`` and so on; see :func:`write`.
        needs: what the derivative by x is computed from: the ``input``, the ``output``, or ``none`` where it is constant.
        identity: whether the function returns x unchanged.
        twice: empty, or why there is no second derivative.
        formula: the formula as a function of x and the learned parameters, for tensors that broadcast.
        slope_from_output: the derivative as a function of the output, in PyTorch, where ``needs`` is ``output``.
    """

    key: str
    learned: tuple[str, ...]
    source: str
    needs: str
    identity: bool
    twice: str
    formula: Callable[..., Tensor] = field(compare=False)
    slope_from_output: Callable[[Tensor], Tensor] | None = field(compare=False, default=None)


@functools.cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    # The backward formulas of PyTorch's own activations are single operators; everything is wanted in elementary ones.
    names = [
        "celu", "elu", "elu_backward", "gelu", "gelu_backward", "hardshrink", "hardsigmoid", "hardsigmoid_backward",
        "hardswish", "hardswish_backward", "hardtanh", "hardtanh_backward", "leaky_relu", "leaky_relu_backward",
        "log_sigmoid_backward", "log_sigmoid_forward", "mish", "mish_backward", "_prelu_kernel", "_prelu_kernel_backward",
        "prelu", "relu6", "rrelu_with_noise", "selu", "sigmoid_backward", "silu", "silu_backward", "softplus",
        "softplus_backward", "softshrink", "softshrink_backward", "square", "tanh_backward", "threshold",
        "threshold_backward", "addcmul", "addcdiv", "lerp", "sinc", "logit", "logit_backward", "xlogy", "special_entr",
        "heaviside", "sgn", "rsub", "hypot", "logaddexp", "softsign", "tanhshrink",
    ]  # fmt: skip
    found = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return {**core_aten_decompositions(), **get_decompositions(found)}


def _differentiate(y: Tensor, by: Tensor) -> Tensor:
    """dy/d(by) of element-wise ``y``, itself differentiable; zeros where y does not depend on it."""
    if not y.requires_grad:
        return torch.zeros_like(by)
    (gradient,) = torch.autograd.grad(y, by, torch.ones_like(y), create_graph=True, allow_unused=True)
    return torch.zeros_like(by) if gradient is None else gradient


def _try_twice(function: Callable[..., Tensor], count: int) -> None:
    """Differentiate twice with ``backward``, which runs into a ``once_differentiable`` that ``grad`` walks past.

    Raises:
        NoTriton: there is no second derivative.
    """
    arguments = [torch.linspace(0.2, 0.8, 3, requires_grad=True) for _ in range(count + 1)]
    y = function(*arguments)
    if not y.requires_grad:
        return
    (g,) = torch.autograd.grad(y.sum(), arguments[0], create_graph=True, allow_unused=True)
    if g is None or not g.requires_grad:
        return
    try:
        g.sum().backward()
    except RuntimeError as error:
        raise NoTriton(str(error).splitlines()[0]) from error


def _trace(function: Callable[..., Tensor], count: int) -> GraphModule:
    def traced(*arguments: Tensor) -> Tensor:
        return function(*(a.detach().requires_grad_() for a in arguments)).detach()

    # Any positive numbers do: the graph depends on shapes and types alone.
    example = [torch.linspace(0.2, 0.8, 3) for _ in range(count)]
    if traced(*example).shape != example[0].shape:
        raise NoTriton("it is not element-wise")
    graph: GraphModule = make_fx(traced, decomposition_table=dict(_decompositions()), tracing_mode="real")(*example)
    if any(getattr(n.target, "_schema", None) is not None and n.target._schema.is_mutable for n in graph.graph.nodes):
        graph = make_fx(functionalize(graph), tracing_mode="real")(*example)
    _avoid_cancellation(graph)
    graph.graph.eliminate_dead_code()
    return graph


def _is_one(argument: Any) -> bool:
    """Whether an argument of a node is the number 1, plainly or as a tensor of ones."""
    while isinstance(argument, Node) and argument.target is aten.copy.default:
        argument = argument.args[1]
    if isinstance(argument, Node) and argument.target in (aten.full_like.default, aten.full.default):
        argument = argument.args[1]
    return argument == 1 or (isinstance(argument, Node) and argument.target is aten.ones_like.default)


def _squared_tanh(node: Any) -> Node | None:
    """The argument t where ``node`` is tanh(t) squared."""
    if not isinstance(node, Node) or node.target not in (aten.mul.Tensor, aten.pow.Tensor_Scalar):
        return None
    base, other = node.args
    if other != (base if node.target is aten.mul.Tensor else 2) or not isinstance(base, Node) or base.target is not aten.tanh.default:
        return None
    t = base.args[0]
    return t if isinstance(t, Node) else None


def _avoid_cancellation(graph: GraphModule) -> None:
    """Replace differences that lose their digits where they are tiny by equal forms that do not.

    1 - sigmoid(t) becomes sigmoid(-t), expm1(t) + 1 becomes exp(t), and 1 - tanh(t)^2 becomes 4 sigmoid(2t) sigmoid(-2t).
    """
    sigmoid = aten.sigmoid.default
    for node in graph.graph.nodes:
        if node.target in (aten.detach.default, aten.alias.default, aten.clone.default):
            node.replace_all_uses_with(node.args[0])
            continue
        if len(node.args) != 2 or node.kwargs:
            continue
        a, b = node.args
        better: Node | None = None
        with graph.graph.inserting_before(node):
            if node.target is aten.sub.Tensor and _is_one(a) and isinstance(b, Node) and b.target is sigmoid:
                minus = graph.graph.call_function(aten.neg.default, (b.args[0],))
                better = graph.graph.call_function(sigmoid, (minus,))
            elif node.target is aten.sub.Tensor and _is_one(a) and (t := _squared_tanh(b)) is not None:
                twice = graph.graph.call_function(aten.mul.Tensor, (t, 2.0))
                minus = graph.graph.call_function(aten.neg.default, (twice,))
                factors = [graph.graph.call_function(sigmoid, (argument,)) for argument in (twice, minus)]
                product = graph.graph.call_function(aten.mul.Tensor, tuple(factors))
                better = graph.graph.call_function(aten.mul.Tensor, (product, 4.0))
            elif node.target in (aten.add.Tensor, aten.add.Scalar) and (_is_one(a) or _is_one(b)):
                inner = b if _is_one(a) else a
                if isinstance(inner, Node) and inner.target is aten.expm1.default:
                    better = graph.graph.call_function(aten.exp.default, (inner.args[0],))
        if better is not None:
            node.replace_all_uses_with(better)


def _number(value: float | bool) -> str:
    if isinstance(value, bool):
        return repr(value)
    value = float(value)
    return f'float("{value}")' if not math.isfinite(value) else repr(value)


def _text(value: Operand) -> str:
    """An operand as a part of a larger expression: negative numbers and compound expressions in parentheses."""
    if not isinstance(value, str):
        return _number(value) if not isinstance(value, float) or value >= 0 or not math.isfinite(value) else f"({_number(value)})"
    return value if value.isidentifier() or (value.endswith(")") and _one_call(value)) else f"({value})"


def _one_call(text: str) -> bool:
    try:
        return isinstance(ast.parse(text, mode="eval").body, ast.Call)
    except SyntaxError:
        return False


def _infix(sign: str) -> Callable[..., Operand]:
    folded = {
        "+": operator.add, "-": operator.sub, "*": operator.mul, "<": operator.lt, "<=": operator.le,
        ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
    }  # fmt: skip

    def emit(a: Operand, b: Operand, alpha: float = 1.0, **_: Any) -> Operand:
        if alpha != 1.0:
            b = _infix("*")(b, alpha)
        if not isinstance(a, str) and not isinstance(b, str):
            if sign in folded:
                return folded[sign](a, b)
            if sign == "/" and b != 0:
                return a / b
        if (sign == "*" and b == 1.0) or (sign == "/" and b == 1.0) or (sign in "+-" and b == 0.0 and not isinstance(b, bool)):
            return a
        if (sign == "*" and a == 1.0) or (sign == "+" and a == 0.0):
            return b
        if sign in "*/" and b == -1.0:
            return _negate(a)
        if sign == "*" and a == -1.0:
            return _negate(b)
        return f"{_text(a)} {sign} {_text(b)}"

    return emit


def _call(name: str) -> Callable[..., Operand]:
    return lambda a, **_: f"{name}({a if isinstance(a, str) else _number(a)})"


def _where(condition: Operand, a: Operand, b: Operand) -> Operand:
    if not isinstance(condition, str):
        return a if condition else b
    if a == b:
        return a
    left, right = (v if isinstance(v, str) else _number(v) for v in (a, b))
    return f"tl.where({condition}, {left}, {right})"


def _maximum(a: Operand, b: Operand) -> Operand:
    a, b = (b, a) if isinstance(b, str) else (a, b)
    if not isinstance(b, str) and isinstance(a, str):  # the comparison is false for NaN, which stays
        return f"tl.where({_text(a)} < {_text(b)}, {_number(b)}, {a})"
    a, b = _text(a), _text(b)
    return f"tl.where(({a} > {b}) | ({a} != {a}), {a}, {b})"


def _minimum(a: Operand, b: Operand) -> Operand:
    a, b = (b, a) if isinstance(b, str) else (a, b)
    if not isinstance(b, str) and isinstance(a, str):
        return f"tl.where({_text(a)} > {_text(b)}, {_number(b)}, {a})"
    a, b = _text(a), _text(b)
    return f"tl.where(({a} < {b}) | ({a} != {a}), {a}, {b})"


def _clamp(a: Operand, low: Operand | None = None, high: Operand | None = None, **keywords: Operand) -> Operand:
    low, high = keywords.get("min", low), keywords.get("max", high)
    result = a
    if low is not None:
        result = _maximum(result, low)
    if high is not None:
        # The inner expression appears twice; the compiler computes it once.
        result = _minimum(result, high)
    return result


def _power(a: Operand, exponent: Operand) -> Operand:
    if not isinstance(exponent, str):
        e = float(exponent)
        if e == 0.0:
            return 1.0
        if e.is_integer() and abs(e) <= 16:
            return _repeated(_text(a), int(abs(e))) if e > 0 else f"1.0 / ({_repeated(_text(a), int(-e))})"
        if e == 0.5:
            return f"tl.sqrt({a})"
        if e == -0.5:
            return f"tl.rsqrt({a})"
    return f"power({a}, {_text(exponent)})"


def _repeated(a: str, times: int) -> str:
    """``a`` to a whole power by squaring: x * x * x is one multiplication more than needed only from 6 on."""
    if times == 1:
        return a
    half = _repeated(a, times // 2)
    half = half if times // 2 == 1 else f"({half})"
    return f"{half} * {half}" + (f" * {a}" if times % 2 else "")


def _negate(a: Operand) -> Operand:
    if not isinstance(a, str):
        return -a
    if a.startswith("-") and (a[1:].isidentifier() or (a.endswith(")") and _one_call(a[1:]))):
        return a[1:]
    return f"-{_text(a)}"


def _keep(a: Operand, *_: Any, **__: Any) -> Operand:
    return a


def _convert(a: Operand, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Operand:
    dtype = dtype or next((r for r in rest if isinstance(r, torch.dtype)), None)
    if dtype is None or not isinstance(a, str):
        return a if dtype is None or not dtype.is_floating_point else float(a)
    if dtype is torch.bool:
        return f"{_text(a)} != 0"
    if not dtype.is_floating_point:
        return f"{_text(a)}.to(tl.int32)"
    return f"{_text(a)}.to(tl.float32)"


def _full(*arguments: Any, **_: Any) -> Operand:
    return arguments[1]


_PRINT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _infix("+"), aten.add.Scalar: _infix("+"),
    aten.sub.Tensor: _infix("-"), aten.sub.Scalar: _infix("-"),
    aten.mul.Tensor: _infix("*"), aten.mul.Scalar: _infix("*"),
    aten.div.Tensor: _infix("/"), aten.div.Scalar: _infix("/"),
    aten.gt.Scalar: _infix(">"), aten.gt.Tensor: _infix(">"), aten.ge.Scalar: _infix(">="), aten.ge.Tensor: _infix(">="),
    aten.lt.Scalar: _infix("<"), aten.lt.Tensor: _infix("<"), aten.le.Scalar: _infix("<="), aten.le.Tensor: _infix("<="),
    aten.eq.Scalar: _infix("=="), aten.eq.Tensor: _infix("=="), aten.ne.Scalar: _infix("!="), aten.ne.Tensor: _infix("!="),
    aten.logical_and.default: _infix("&"), aten.logical_or.default: _infix("|"), aten.logical_xor.default: _infix("^"),
    aten.bitwise_and.Tensor: _infix("&"), aten.bitwise_or.Tensor: _infix("|"), aten.bitwise_xor.Tensor: _infix("^"),
    aten.logical_not.default: lambda a: f"{_text(a)} == 0", aten.bitwise_not.default: lambda a: f"{_text(a)} == 0",
    aten.where.self: _where, aten.where.ScalarOther: _where, aten.where.ScalarSelf: _where, aten.where.Scalar: _where,
    aten.neg.default: _negate, aten.abs.default: _call("tl.abs"),
    aten.exp.default: _call("tl.exp"), aten.exp2.default: _call("tl.exp2"), aten.expm1.default: _call("expm1"),
    aten.log.default: _call("tl.log"), aten.log2.default: _call("tl.log2"), aten.log1p.default: _call("log1p"),
    aten.log10.default: lambda a: f"tl.log({a}) * {1 / math.log(10)!r}",
    aten.sqrt.default: _call("tl.sqrt"), aten.rsqrt.default: _call("tl.rsqrt"), aten.erf.default: _call("tl.erf"),
    aten.reciprocal.default: lambda a: f"1.0 / {_text(a)}",
    aten.sin.default: _call("sin"), aten.cos.default: _call("cos"), aten.tan.default: lambda a: f"sin({a}) / cos({a})",
    aten.tanh.default: _call("tanh"), aten.sigmoid.default: _call("sigmoid"),
    aten.sinh.default: lambda a: f"0.5 * (expm1({a}) - expm1(-{_text(a)}))",
    aten.cosh.default: lambda a: f"0.5 * (tl.exp({a}) + tl.exp(-{_text(a)}))",
    aten.floor.default: _call("tl.floor"), aten.ceil.default: _call("tl.ceil"),
    aten.relu.default: lambda a: _maximum(a, 0.0),
    aten.sign.default: lambda a: f"tl.where({_text(a)} > 0, 1.0, tl.where({_text(a)} < 0, -1.0, 0.0))",
    aten.sgn.default: lambda a: f"tl.where({_text(a)} > 0, 1.0, tl.where({_text(a)} < 0, -1.0, 0.0))",
    aten.isnan.default: lambda a: f"{_text(a)} != {_text(a)}",
    aten.isinf.default: lambda a: f'tl.abs({a}) == float("inf")',
    aten.maximum.default: _maximum, aten.minimum.default: _minimum,
    aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp, aten.clamp_min.default: _maximum, aten.clamp_max.default: _minimum,
    aten.clamp_min.Tensor: _maximum, aten.clamp_max.Tensor: _minimum,
    aten.pow.Tensor_Scalar: _power, aten.pow.Tensor_Tensor: _power, aten.pow.Scalar: _power,
    aten.full_like.default: _full, aten.full.default: _full,
    aten.ones_like.default: lambda *_, **__: 1.0, aten.zeros_like.default: lambda *_, **__: 0.0,
    # Memory that is about to be written: what is copied there counts.
    aten.empty.memory_format: lambda *_, **__: 0.0, aten.empty_like.default: lambda *_, **__: 0.0,
    aten.empty_permuted.default: lambda *_, **__: 0.0, aten.copy.default: lambda _, b, **__: b,
    aten.hardshrink_backward.default: lambda g, x, limit: _where(f"tl.abs({x}) <= {limit}", 0.0, g),
    aten.softshrink_backward.default: lambda g, x, limit: _where(f"tl.abs({x}) <= {limit}", 0.0, g),
    aten.atan.default: _call("atan"), aten.asinh.default: _call("asinh"),
    aten.scalar_tensor.default: _keep, aten.lift_fresh_copy.default: _keep,
    aten._to_copy.default: _convert, torch.ops.prims.convert_element_type.default: _convert,
    aten.clone.default: _keep, aten.detach.default: _keep, aten.alias.default: _keep,
    aten.view.default: _keep, aten.expand.default: _keep, aten.squeeze.default: _keep, aten.unsqueeze.default: _keep,
}  # fmt: skip


def _body(graph: GraphModule, names: Sequence[str]) -> tuple[list[str], Operand]:
    """The statements of a traced graph, and what it returns.

    Raises:
        NoTriton: an operator that has no printed form.
    """
    lines: list[str] = []
    values: dict[Node, Any] = {}
    rest = iter(names)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "get_attr":
            constant = getattr(graph, str(node.target))
            if not isinstance(constant, Tensor) or constant.numel() != 1:
                raise NoTriton("the formula holds a table of numbers")
            values[node] = constant.item()
        elif node.op == "output":
            return lines, values[node.args[0]]
        else:
            values[node] = _statement(node, values, lines)
    raise AssertionError("a graph without an output")


def _statement(node: Node, values: dict[Node, Any], lines: list[str]) -> Operand:
    if node.target not in _PRINT:
        raise NoTriton(f"it uses {str(node.target).removeprefix('aten.').removesuffix('.default')}, which has no scalar Triton form")
    if any(isinstance(a, list | tuple) and any(isinstance(e, Node) for e in a) for a in node.args):
        raise NoTriton("it is not element-wise")

    if node.target in (aten._to_copy.default, torch.ops.prims.convert_element_type.default) and _is_float(node.args[0]) and _is_float(node):
        return values[node.args[0]]  # type: ignore[index]

    def known(argument: Any) -> Any:
        return values[argument] if isinstance(argument, Node) else argument

    text = _PRINT[node.target](*map(known, node.args), **{k: known(v) for k, v in node.kwargs.items()})
    if not isinstance(text, str) or text.isidentifier() or (len(node.users) < 2 and len(text) <= _INLINE):
        return text
    name = f"t{len(lines)}"
    lines.append(f"{name} = {text}")
    return name


def _is_float(node: Any) -> bool:
    meta = node.meta.get("tensor_meta") or node.meta.get("val")
    return getattr(meta, "dtype", None) is not None and meta.dtype.is_floating_point


def _mentions(lines: Sequence[str], result: Operand, name: str) -> bool:
    source = "\n".join([*lines, str(result)])
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(ast.parse(source)))


def _live(lines: Sequence[str], result: Operand) -> list[str]:
    """The statements that the result depends on: folding constants can leave others behind."""
    kept: list[str] = []
    for line in reversed(lines):
        if _mentions(kept, result, line.split(" = ")[0]):
            kept.insert(0, line)
    return kept


def _function(name: str, lines: Sequence[str], result: Operand, learned: Sequence[str], doc: str, variable: str = "x") -> str:
    lines = _live(lines, result)
    names = [_safe(p) for p in learned]
    used = [f"{p} = P[{i}]" for i, p in enumerate(names) if _mentions(lines, result, p)]
    if not _mentions(lines, result, variable) and not used:
        result = f"tl.zeros_like({variable}) + {_number(result) if not isinstance(result, str) else result}"
    body = [f'"""{doc}"""', *used, *lines, f"return {result}"]
    return f"@triton.jit\ndef {name}({variable}, P):\n" + textwrap.indent("\n".join(body), "    ")


def write(activation: Activation, values: Mapping[str, Value], learned: tuple[str, ...]) -> Scalars:
    """Make the scalar Triton functions of ``activation``.

    The module that is written has, for learned parameters ``P`` (a tuple):

    - ``value(x, P)``, ``dx(x, P)``, ``dxx(x, P)``: the function and its derivatives;
    - ``d_NAME(x, P)``, ``dx_NAME(x, P)``, ``d_NAME_OTHER(x, P)``: derivatives by a learned parameter;
    - ``dx_y(y, P)``, ``dxx_y(y, P)``: the derivative as a function of the output, and its derivative, where there is one;
    - ``by_parameters``, ``second_dy``, ``second_dx``, ``second_parameters``: their sums, in the form the kernels ask for.

    Args:
        activation: with a formula.
        values: of all parameters; those of fixed ones become constants.
        learned: the parameters that kernels receive as tensors.

    Raises:
        NoTriton: it has no formula, or one with an operator that cannot be printed.
    """
    formula = activation.formula
    if formula is None:
        raise NoTriton("it is not element-wise")
    order = list(activation.parameters)

    def chosen(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(learned, parameters, strict=True))
        return formula(x, *(given.get(n, values[n]) for n in order))

    own = _own_functions(activation, values, learned)
    functions: dict[str, str] = {}
    results: dict[str, tuple[list[str], Operand]] = {}
    count = len(learned)

    def derive(name: str, function: Callable[..., Tensor], doc: str, variable: str = "x", arguments: int = count + 1) -> None:
        if name in own:
            functions[name] = own[name]
            return
        try:
            graph = _trace(function, arguments)
        except NoTriton:
            raise
        except Exception as error:
            # Whatever a formula does when it is traced, the answer is the same: no Triton version, and why.
            raise NoTriton(f"it cannot be traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
        lines, result = results[name] = _body(graph, [variable, *map(_safe, learned)][:arguments])
        functions[name] = _function(name, lines, result, learned, doc, variable)

    def by(*places: int) -> Callable[..., Tensor]:
        def derivative(*arguments: Tensor) -> Tensor:
            y = chosen(*arguments)
            for place in places:
                y = _differentiate(y, arguments[place])
            return y

        return derivative

    derive("value", by(), f"{activation.name}, from its formula.")
    derive("dx", by(0), "Its derivative.")
    for i, name in enumerate(learned):
        derive(f"d_{name}", by(i + 1), f"Its derivative by {name}.")
    twice = ""
    try:
        _try_twice(chosen, count)
        derive("dxx", by(0, 0), "Its second derivative.")
        for i, name in enumerate(learned):
            derive(f"dx_{name}", by(0, i + 1), f"The derivative of dx by {name}.")
            for j, other in enumerate(learned):
                derive(f"d_{name}_{other}", by(i + 1, j + 1), f"The derivative of d_{name} by {other}.")
    except NoTriton as error:
        twice = str(error)
        functions = {n: s for n, s in functions.items() if n in ("value", "dx") or n in {f"d_{p}" for p in learned}}

    needs = "input"
    h: Callable[[Tensor], Tensor] | None = None
    if "dx" in results and not learned and not _mentions(*results["dx"], "x"):
        needs = "none"
    elif not learned and "dx" not in own:
        h = _derivative_of_output(activation, values, chosen)
        if h is not None:
            derive("dx_y", h, "Its derivative, from its output.", "y", 1)
            derive("dxx_y", lambda y, h=h: _differentiate(h(y), y), "The derivative of dx_y by the output.", "y", 1)
            needs = "output"
    identity = "value" in results and results["value"] == ([], "x")
    spec = ActivationSpec(
        activation.name,
        None,
        tuple((n, v) for n, v in values.items() if n not in learned and v != activation.parameters[n].default),
        learned if learned else None,
    )
    source = _module(str(spec), functions, learned, own, twice, needs)
    key = f"{spec}@{hashlib.sha256(source.encode()).hexdigest()[:10]}"
    return Scalars(key, learned, source, needs, identity, twice, chosen, h)


def _derivative_of_output(
    activation: Activation, values: Mapping[str, Value], formula: Callable[..., Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """The derivative as a function of the output: as declared, or where tracing shows that it depends on nothing else."""
    if activation.from_output is not None:
        return activation.from_output(values, ())

    def joint(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = formula(x)
        return y.detach(), _differentiate(y, x).detach()

    graph: GraphModule = make_fx(joint, decomposition_table=dict(_decompositions()), tracing_mode="real")(torch.linspace(0.2, 0.8, 3))
    (x,) = graph.graph.find_nodes(op="placeholder")
    results: Any = graph.graph.output_node().args[0]
    value, slope = results
    same = {value}
    while value.target in (aten.detach.default, aten.alias.default):
        value = value.args[0]
        same.add(value)
    if slope in same or value is x:
        return None
    seen: set[Node] = set()
    todo: list[Node] = [slope]
    while todo:
        node = todo.pop()
        if node is x:
            return None
        if node in same or node in seen:
            continue
        seen.add(node)
        # ones_like and its kind look at the shape of x alone.
        if node.target not in (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default):
            todo += node.all_input_nodes

    def from_output(y: Tensor) -> Tensor:
        known: dict[Any, Any] = dict.fromkeys(same, y)

        def get(argument: Any) -> Any:
            return known.get(argument, y) if isinstance(argument, Node) else argument

        for node in graph.graph.nodes:
            if node in seen and node.op == "call_function":
                known[node] = node.target(*map(get, node.args), **{k: get(v) for k, v in node.kwargs.items()})
            elif node in seen and node.op == "get_attr":
                known[node] = getattr(graph, str(node.target))
        result: Tensor = known[slope]
        return result

    return from_output


def _own_functions(activation: Activation, values: Mapping[str, Value], learned: tuple[str, ...]) -> dict[str, str]:
    """The hand-written functions of a declaration, each with the uniform signature ``(x, P)`` added."""
    text = activation.triton if isinstance(activation.triton, str) else activation.triton(values, learned)
    text = textwrap.dedent(text).strip()
    if not text:
        return {}
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise NoTriton(f"its hand-written source is not Python: {error.msg} in line {error.lineno}") from error
    numeric = [n for n, p in activation.parameters.items() if not p.choices]

    def names(parameters: Sequence[str]) -> list[str]:
        by_two = [f"d_{p}_{q}" for p in parameters for q in parameters]
        return ["value", "dx", "dxx", "dx_y", "dxx_y", *(f"{d}_{p}" for p in parameters for d in ("d", "dx")), *by_two]

    result: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            raise NoTriton("its hand-written source holds something other than functions")
        if node.name not in names(numeric) and not node.name.startswith("_"):
            raise NoTriton(f"its hand-written source defines {node.name}, which is none of {', '.join(names(numeric))}, nor begins with _")
        if node.name not in names(learned) and not node.name.startswith("_"):
            continue  # a derivative by a parameter that is fixed here
        variable = "y" if node.name.endswith("_y") else "x"
        arguments = ", ".join([variable, *(f"P[{learned.index(n)}]" if n in learned else _number(float(values[n])) for n in numeric)])
        own = ast.unparse(node)
        if node.name.startswith("_"):
            result[node.name] = f"@triton.jit\n{own}"
            continue
        own = own.replace(f"def {node.name}(", f"def own_{node.name}(", 1)
        result[node.name] = f"@triton.jit\n{own}\n\n\n@triton.jit\ndef {node.name}({variable}, P):\n    return own_{node.name}({arguments})"
    return result


def _module(key: str, functions: Mapping[str, str], learned: tuple[str, ...], own: Mapping[str, str], twice: str, needs: str) -> str:
    """The whole source: the functions, then the sums over parameters that the generic kernels call."""
    helpers = [n for n in own if n.startswith("_")]
    parts = [own[n] for n in helpers] + list(functions.values())

    def tuple_of(items: Sequence[str]) -> str:
        return "(" + ", ".join(items) + ("," if len(items) == 1 else "") + ")"

    def sums(name: str, arguments: str, doc: str, result: str) -> None:
        parts.append(f'@triton.jit\ndef {name}({arguments}):\n    """{doc}"""\n    return {result}')

    sums(
        "by_parameters",
        "x, P, g, total",
        "``total`` plus ``g`` times the derivative by each learned parameter.",
        tuple_of([f"total[{i}] + g * d_{p}(x, P)" for i, p in enumerate(learned)]),
    )
    if not twice:
        crossed = "".join(f" + Q[{i}] * d_{p}(x, P)" for i, p in enumerate(learned))
        sums("second_dy", "x, P, u, Q", "Gradient of the gradient, by the incoming gradient.", f"u * dx(x, P){crossed}")
        crossed = "".join(f" + Q[{i}] * dx_{p}(x, P)" for i, p in enumerate(learned))
        sums("second_dx", "x, P, u, Q", "The same by x, to be multiplied by the incoming gradient.", f"u * dxx(x, P){crossed}")
        if needs == "output":
            sums("second_dy_y", "x, P, u, Q", "The same as second_dy, from the output.", "u * dx_y(x, P)")
            sums("second_dx_y", "x, P, u, Q", "The same by the output.", "u * dxx_y(x, P)")
        sums(
            "second_parameters",
            "x, P, g, u, Q, total",
            "``total`` plus the same by each learned parameter.",
            tuple_of(
                [
                    f"total[{i}] + g * (u * dx_{p}(x, P)" + "".join(f" + Q[{j}] * d_{p}_{q}(x, P)" for j, q in enumerate(learned)) + ")"
                    for i, p in enumerate(learned)
                ]
            ),
        )
    head = [
        f'"""Scalar Triton functions of {key}, made from its formula. P holds the learned parameters: {", ".join(learned) or "none"}.',
        "",
        "For the derivative, backward keeps " + {"input": "the input.", "output": "the output.", "none": "nothing."}[needs],
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
    ]
    body = "\n\n\n".join(parts)
    used = [h for h in _NEEDED_HELPERS if any(isinstance(n, ast.Name) and n.id == h for n in ast.walk(ast.parse(body)))]
    if used:
        head += [f"from toolkit_triton.scalars import {', '.join(sorted(used))}"]
    return "\n".join(head) + "\n\n\n" + body + "\n"
