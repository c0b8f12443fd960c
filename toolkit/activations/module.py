"""The ``torch.nn.Module`` of a chosen activation, made from its declaration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.activations.declare import Activation
from toolkit.activations.deferred import Deferred
from toolkit.activations.spec import ActivationSpec, Value
from toolkit.errors import UserError


class ActivationModule(nn.Module):
    """An activation at one site.

    Learned parameters are ``nn.Parameter`` of shape ``(1,)``, or ``(channels,)`` when per channel, registered under
    their own name, so a ``state_dict`` does not depend on the provider.

    Args:
        activation: the declaration.
        spec: the choice: parameter values, which are learned, and whether per channel.
        provider: the plugin that the declaration came from.
        channels: number of channels of the input; needed for ``per_channel``.
        channel_dim: which dimension of the input holds the channels (1 after a convolution, -1 after a linear layer).

    Raises:
        UserError: an unknown parameter, a value out of bounds, or ``per_channel`` without a known channel count.
    """

    def __init__(
        self,
        activation: Activation,
        spec: ActivationSpec | None = None,
        *,
        provider: str = "",
        channels: int | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        spec = spec or ActivationSpec(activation.name)
        self.activation = activation
        self.provider = provider
        self.fused_with = "-"
        self.channel_dim = channel_dim
        self.values, self.learned = activation.configure(spec)
        self.spec = ActivationSpec(activation.name, spec.provider, spec.parameters, spec.learn, spec.per_channel)
        if spec.per_channel and channels is None:
            raise UserError(f"activation {str(spec)!r}: the number of channels at this site is not known")
        for name in self.learned:
            shape = (channels,) if spec.per_channel and channels else (1,)
            self.register_parameter(name, nn.Parameter(torch.full(shape, float(self.values[name]))))
        self._limits = {n: activation.parameters[n].limits() for n in self.learned}
        self._native = self._find_native()
        self.inner: nn.Module | None = None
        if activation.module is not None:
            keywords: dict[str, Any] = dict(self.values)
            if "channel_dim" in inspect.signature(activation.module).parameters:
                keywords["channel_dim"] = channel_dim
            self.inner = activation.module(**keywords)

    def _find_native(self) -> Callable[..., Tensor] | None:
        if self.activation.native is None or (self.spec.per_channel and self.channel_dim != 1):
            return None
        return self.activation.native(self.values, self.learned)

    def __getstate__(self) -> dict[str, Any]:
        # Functions made for these values; a pickle has no room for them, and they are made again.
        return {k: v for k, v in vars(self).items() if k != "_native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._native = self._find_native()

    fusible = False
    """Whether the class has fused operations of its own, so that neighbours are looked for."""

    def parameter(self, name: str, ndim: int) -> Value | Tensor:
        """Parameter ``name`` as the formula takes it: a float or word, or a tensor that broadcasts over ``ndim`` dims."""
        if name not in self.learned:
            return self.values[name]
        value = self._bounded(name)
        if value.numel() == 1 or ndim < 2:
            return value.view(()) if ndim == 0 and value.numel() == 1 else value
        shape = [1] * ndim
        shape[self.channel_dim] = value.numel()
        return value.view(shape)

    def _bounded(self, name: str) -> Tensor:
        value = self.get_parameter(name)
        low, high = self._limits[name]
        if math.isinf(low) and math.isinf(high):
            return value
        # Straight through: used at the bound, while the gradient can still pull it back inside.
        return value + (value.clamp(low, high) - value).detach()

    @classmethod
    def source(cls, activation: Activation, spec: ActivationSpec) -> str:
        """The code that a backend generates for ``activation`` as chosen, for people to read; empty where there is none."""
        return ""

    @classmethod
    def conformance(cls, activation: Activation, spec: ActivationSpec) -> str:
        """A backend's own check that its version of ``activation`` as chosen is right: empty, or what is wrong."""
        return ""

    def can_fuse(self, x: Any) -> bool:
        """Whether the fused operations below would be faster than the plain sequence on ``x``."""
        return False

    def bias_act(self, x: Tensor, bias: Tensor) -> Tensor:
        """``f(x + bias)`` for x ``(N, C, ...)`` and a bias ``(C,)``."""
        return self(x + bias.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2)))

    def norm_act(self, x: Tensor, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
        """``f(norm(x) + residual)``; ``norm`` is a batch norm, whose running statistics move as in its own forward."""
        y = type(norm).forward(norm, x)
        if getattr(norm, "act", None) is self:  # timm's norms apply their activation themselves
            return y
        return self(y if residual is None else y + residual)

    def add_act(self, x: Tensor, residual: Tensor) -> Tensor:
        """``f(x + residual)``."""
        return self(x + residual)

    def forward(self, x: Tensor | Deferred) -> Tensor:
        """Apply the function to ``x`` of any shape; returns a tensor of the same shape and dtype."""
        return x.activated(self) if isinstance(x, Deferred) else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The function alone, of an ordinary tensor."""
        if self.inner is not None:
            return self.inner(x)
        if self._native is not None:
            return self._native(x, *(self._bounded(n).to(x.dtype) for n in self.learned))
        return self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        """The formula itself, without the native shortcut."""
        formula = self.activation.formula
        if formula is None:
            raise UserError(f"activation {self.activation.name!r} has no formula")
        arguments = [self.parameter(n, x.dim()) for n in self.activation.parameters]
        arguments = [a.to(x.dtype) if isinstance(a, Tensor) else a for a in arguments]
        return formula(x, *arguments)

    def output_range(self) -> tuple[float, float]:
        """Infimum and supremum of the function at its present parameters; unbounded for one without a formula."""
        if self.activation.formula is None:
            return self.activation.output_range or (-math.inf, math.inf)
        return self.activation.properties(self.values).output_range

    def gain(self) -> float:
        """The gain for initialisation at the initial parameters; 1 for a function without a formula."""
        return 1.0 if self.activation.formula is None else self.activation.properties(self.values).gain

    def extra_repr(self) -> str:
        return f"{self.provider}/{self.spec.name}" + str(self.spec).removeprefix(f"{self.spec.provider}/")[len(self.spec.name) :]
