"""Declaring an activation: by its formula in plain PyTorch, from which everything else follows."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.activations.spec import ActivationSpec, Value
from toolkit.errors import UserError, closest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolkit.activations.module import ActivationModule
    from toolkit.activations.properties import Properties

RESERVED = ("name", "learn", "per_channel", "x")


@dataclass(frozen=True)
class Parameter:
    """One parameter of an activation.

    Attributes:
        default: its value when a config does not give one; a number, or one of ``choices``.
        above, at_least, below, at_most: bounds of a number (exclusive, inclusive, exclusive, inclusive). A learned
            parameter that training pushes over a bound is used at the bound, and its gradient still passes.
        choices: the words it can take, for a parameter that selects a variant; such a parameter cannot be learned.
        learn: learned unless a config says ``learn=none``.
        integer: only whole numbers; such a parameter cannot be learned.
    """

    default: Value
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    learn: bool = False
    integer: bool = False

    @property
    def learnable(self) -> bool:
        """Whether it is a real number, which training can change."""
        return not self.choices and not self.integer

    def limits(self) -> tuple[float, float]:
        """The closed interval of usable values; an exclusive bound is drawn in by 1e-6 of its size, at least 1e-6."""
        low = high = None
        if self.at_least is not None:
            low = self.at_least
        elif self.above is not None:
            low = self.above + 1e-6 * max(1.0, abs(self.above))
        if self.at_most is not None:
            high = self.at_most
        elif self.below is not None:
            high = self.below - 1e-6 * max(1.0, abs(self.below))
        return (-math.inf if low is None else low, math.inf if high is None else high)

    def check(self, value: Value, what: str) -> Value:
        """Return ``value`` in the parameter's type.

        Raises:
            UserError: it is out of bounds or of another type.
        """
        if self.choices:
            if value not in self.choices:
                raise UserError(f"{what} is one of {', '.join(self.choices)}, not {value!r}")
            return value
        if isinstance(value, str) or math.isnan(float(value)):
            raise UserError(f"{what} is a number, not {value!r}")
        number = float(value)
        if self.integer and not number.is_integer():
            raise UserError(f"{what} is a whole number, not {value!r}")
        for ok, words in (
            (self.above is None or number > self.above, f"above {self.above}"),
            (self.at_least is None or number >= self.at_least, f"at least {self.at_least}"),
            (self.below is None or number < self.below, f"below {self.below}"),
            (self.at_most is None or number <= self.at_most, f"at most {self.at_most}"),
        ):
            if not ok:
                raise UserError(f"{what} must be {words}, not {number:g}")
        return number


@dataclass(frozen=True)
class Activation:
    """An activation function, declared once.

    Attributes:
        name: a Python identifier; what configs call it.
        formula: element-wise function ``(x, *parameters) -> tensor`` of the shape of ``x``, in differentiable PyTorch
            operations. Parameters come in the order of ``parameters``: floats when fixed, tensors that broadcast
            against ``x`` when learned, strings for choices.
        module: for a function that is not element-wise, a ``torch.nn.Module`` class in place of the formula. It is
            called with the parameters as keywords, and with ``channel_dim`` when its signature has that name.
        parameters: name -> :class:`Parameter`, in the order of the formula's arguments.
        reference: where the formula comes from (paper and equation).
        aliases: other names people look for.
        native: ``(fixed, learned) -> function or None``: given the fixed parameters' values and the learned ones' names,
            a function ``(x, *learned) -> tensor`` that computes the same faster in eager PyTorch, or None when there
            is none for these. The formula stays the reference.
        from_output: ``(fixed, learned) -> function or None``: the derivative as a function of the *output*, in PyTorch, for
            these parameters. Where it is exact, kernels keep the output for backward, which the next layer keeps anyway.
        triton: source of hand-written scalar Triton functions that replace those derived from the formula, or a function
            ``(fixed, learned) -> source``. Each is a plain ``def`` of ``x`` and the numeric parameters, named as in
            :func:`toolkit_triton.formula.write`: ``value``, ``dx``, ``dxx``, ``d_NAME``, ...; ``tl`` is at hand.
        implementation: the :class:`~toolkit.activations.module.ActivationModule` that computes it; a backend's own.
        output_range, gain, smoothness, monotonic: override what :mod:`toolkit.activations.properties` measures.

    Raises:
        UserError: the declaration contradicts itself (raised when it is made, so a plugin's author sees it at once).
    """

    name: str
    formula: Callable[..., Tensor] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    reference: str = ""
    aliases: tuple[str, ...] = ()
    module: Callable[..., torch.nn.Module] | None = None
    native: Callable[[Mapping[str, Value], tuple[str, ...]], Callable[..., Tensor] | None] | None = None
    from_output: Callable[[Mapping[str, Value], tuple[str, ...]], Callable[[Tensor], Tensor] | None] | None = None
    triton: str | Callable[[Mapping[str, Value], tuple[str, ...]], str] = ""
    implementation: type[ActivationModule] | None = None
    output_range: tuple[float, float] | None = None
    gain: float | None = None
    smoothness: int | None = None
    monotonic: bool | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.name):
            raise UserError(f"activation name {self.name!r} is not an identifier")
        if (self.formula is None) == (self.module is None):
            raise UserError(f"activation {self.name!r} needs either a formula or a module class")
        for name, parameter in self.parameters.items():
            if name in RESERVED or not name.isidentifier():
                raise UserError(f"activation {self.name!r}: a parameter cannot be named {name!r}")
            parameter.check(parameter.default, f"activation {self.name!r}: the default of {name}")
        if self.formula is not None:
            try:
                signature = inspect.signature(self.formula)
            except (TypeError, ValueError):  # built-in functions such as torch.tanh have none
                signature = None
            if signature is not None:
                positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
                variadic = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
                needed = len(self.parameters) + 1
                required = sum(p.default is p.empty for p in positional)
                if not variadic and not required <= needed <= len(positional):
                    raise UserError(
                        f"activation {self.name!r}: its formula takes {len(positional)} argument(s), "
                        f"its declaration gives x and {len(self.parameters)} parameter(s)"
                    )

    def __deepcopy__(self, memo: Any) -> Activation:
        return self  # nothing of it changes

    def __reduce__(self) -> Any:
        """A registered activation is pickled by its names, so that a formula may be a lambda."""
        from toolkit.activations.registry import registered

        provider = registered(self)
        return (_find, (provider, self.name)) if provider else object.__reduce_ex__(self, 2)

    def configure(self, spec: ActivationSpec) -> tuple[dict[str, Value], tuple[str, ...]]:
        """Values of all parameters, and the names of the learned ones, as ``spec`` asks for them.

        Raises:
            UserError: an unknown parameter, a value out of bounds, or one that cannot be learned.
        """
        known = ", ".join(self.parameters) or "none"
        for name in [key for key, _ in spec.parameters] + list(spec.learn or ()):
            if name not in self.parameters:
                raise UserError(f"activation {self.name!r} has no parameter {name!r} (it has: {known}).{closest(name, self.parameters)}")
        given = dict(spec.parameters)
        values = {
            name: parameter.check(given.get(name, parameter.default), f"{self.name}: {name}") for name, parameter in self.parameters.items()
        }
        learned = spec.learn if spec.learn is not None else tuple(n for n, p in self.parameters.items() if p.learn)
        for name in learned:
            if not self.parameters[name].learnable or self.formula is None:
                raise UserError(f"activation {self.name!r}: {name} cannot be learned")
        if spec.per_channel and not learned:
            raise UserError(f"activation {str(spec)!r}: per_channel=true needs a learned parameter, as in learn=NAME")
        return values, tuple(n for n in self.parameters if n in learned)

    @functools.cached_property
    def default_properties(self) -> Properties:
        """Measured properties at the default parameters."""
        return self.properties({name: p.default for name, p in self.parameters.items()})

    def properties(self, values: Mapping[str, Value]) -> Properties:
        """Output range, gain, smoothness and monotonicity at these parameter values, overrides applied.

        Raises:
            UserError: the activation has no formula to measure.
        """
        from toolkit.activations.properties import measure

        return measure(self, values)

    def values_in_order(self, values: Mapping[str, Any]) -> list[Any]:
        """``values`` in the order of the formula's arguments."""
        return [values[name] for name in self.parameters]


def _find(provider: str, name: str) -> Activation:
    from toolkit.activations.registry import registry

    return registry().find(f"{provider}/{name}")[1]
