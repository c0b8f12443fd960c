"""What can be measured from a formula: output range, gain for initialisation, smoothness, monotonicity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from toolkit.activations.spec import Value
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.activations.declare import Activation

SMOOTHNESS_CAP = 3


@dataclass(frozen=True)
class Properties:
    """Properties of an activation at given parameters.

    Attributes:
        output_range: infimum and supremum of the function over the reals; ``inf`` where it is unbounded.
        gain: ``1 / sqrt(E[f(z)^2])`` for ``z ~ N(0, 1)``: the factor that keeps the second moment of a layer's output
            at 1 (He et al. 2015, eq. 10, for any f; sqrt(2) for ReLU).
        smoothness: how many derivatives are continuous: -1 for a jump in the function itself, 0 for a kink (ReLU),
            1 for a kink in the slope (ELU), at most 3, which stands for "3 or more".
        monotonic: whether the function never decreases.
    """

    output_range: tuple[float, float]
    gain: float
    smoothness: int
    monotonic: bool


def measure(activation: Activation, values: Mapping[str, Value]) -> Properties:
    """Measure ``activation`` in float64 at fixed parameter ``values``; its declared overrides win.

    Raises:
        UserError: the activation is declared by a module, not by a formula.
    """
    formula = activation.formula
    if formula is None:
        raise UserError(f"activation {activation.name!r} has no formula, so nothing can be measured from it")
    arguments = activation.values_in_order(values)

    def function(x: torch.Tensor) -> torch.Tensor:
        return formula(x, *arguments)

    return Properties(
        output_range=activation.output_range or _output_range(function),
        gain=activation.gain if activation.gain is not None else _gain(function),
        smoothness=activation.smoothness if activation.smoothness is not None else _smoothness(function),
        monotonic=activation.monotonic if activation.monotonic is not None else _monotonic(function),
    )


def derivatives(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, order: int) -> torch.Tensor:
    """The ``order``-th derivative of an element-wise ``function`` at ``x``, by repeated differentiation."""
    x = x.detach().requires_grad_(order > 0)
    y = function(x)
    for _ in range(order):
        if not y.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)
        y = torch.zeros_like(x) if gradient is None else gradient
    return y.detach()


def _grid() -> torch.Tensor:
    near = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    far = torch.logspace(1, 6, 2000, dtype=torch.float64)
    return torch.cat([-far.flip(0), near, far]).sort().values


def _output_range(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    y = function(_grid())
    y = y[torch.isfinite(y)]
    if not len(y):
        return (math.nan, math.nan)
    edge = function(torch.tensor([-1e6, -1e5, 1e5, 1e6], dtype=torch.float64)).tolist()
    low, high = float(y.min()), float(y.max())
    # A function that still moves by a tenth of its value over the last decade of its argument has no bound there.
    for outer, inner in ((edge[0], edge[1]), (edge[3], edge[2])):
        if not math.isfinite(outer) or abs(outer - inner) > 0.1 * max(1.0, abs(inner)):
            if outer > inner:
                high = math.inf
            else:
                low = -math.inf
    # A bound approached only in the limit (tanh, softsign) is met on the grid but for 1e-6 or so.
    low = float(round(low)) if math.isfinite(low) and abs(low - round(low)) < 1e-5 else low
    high = float(round(high)) if math.isfinite(high) and abs(high - round(high)) < 1e-5 else high
    return (low, high)


def _gain(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    moment = float(torch.trapezoid(function(z) ** 2 * density, z))
    return 1.0 / math.sqrt(moment) if moment > 0 else math.inf


def _monotonic(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    y = function(torch.linspace(-12, 12, 24001, dtype=torch.float64))
    return bool((y[1:] - y[:-1] >= -1e-12).all())


def _smoothness(function: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Look for the first derivative with a jump, by bisecting towards the steepest change on a grid."""
    for order in range(SMOOTHNESS_CAP + 1):
        if _jumps(lambda x, order=order: derivatives(function, x, order)):  # type: ignore[misc]
            return order - 1
    return SMOOTHNESS_CAP


def _jumps(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    # An odd number of irregularly placed points: a kink is never hit exactly, where a subgradient could hide the jump.
    x = torch.linspace(-11.37, 11.71, 8001, dtype=torch.float64)
    y = function(x)
    if not torch.isfinite(y).all():
        return True
    scale = float(y.abs().max()) + 1e-12
    steepest = np.argsort(-(y[1:] - y[:-1]).abs().numpy())[:16].copy()
    left, right = x[steepest].clone(), x[steepest + 1].clone()
    for _ in range(36):
        middle = (left + right) / 2
        f_left, f_middle, f_right = (function(p) for p in (left, middle, right))
        go_left = (f_middle - f_left).abs() >= (f_right - f_middle).abs()
        left, right = torch.where(go_left, left, middle), torch.where(go_left, middle, right)
    # After 36 halvings a continuous function differs by less than 1e-11 times its slope.
    return bool((function(right) - function(left)).abs().max() > 1e-5 * scale)
