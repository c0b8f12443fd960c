"""A value on its way to an activation that computes the last step before it as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from toolkit.activations.module import ActivationModule

SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
SUMS_IN_PLACE = {"add_", "__iadd__"}
_CHEAP = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "dim", "size", "numel"}


class Deferred:
    """A value that is still to be computed: ``norm(x)`` or ``x + bias`` or x, plus a residual.

    It stands for the tensor that it will be: any function of PyTorch, any attribute and any operator computes it first.

    Args:
        x: what the deferred part is applied to.
        part: the module whose work is put off: a batch norm, a convolution (its bias), or None.
        residual: a tensor to be added.
    """

    def __init__(self, x: Tensor, part: nn.Module | None, residual: Tensor | None = None) -> None:
        self.x, self.part, self.residual = x, part, residual
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The ordinary tensor, computed once."""
        if self._value is None:
            y = self.x
            if isinstance(self.part, _BatchNorm):
                y = type(self.part).forward(self.part, y)
            elif self.part is not None:
                bias = self.part.bias
                assert isinstance(bias, Tensor)
                y = y + bias.to(y.dtype).view(1, -1, *[1] * (y.dim() - 2))
            self._value = y if self.residual is None else y + self.residual
        return self._value

    def activated(self, act: ActivationModule) -> Tensor:
        """``act`` of the value, by its fused operation."""
        if self._value is not None:
            return act(self._value)
        if isinstance(self.part, _BatchNorm):
            return act.norm_act(self.x, self.part, self.residual)
        if self.part is not None:
            bias = self.part.bias
            assert isinstance(bias, Tensor)
            return act.bias_act(self.x, bias) if self.residual is None else act(self.value())
        return act(self.x) if self.residual is None else act.add_act(self.x, self.residual)

    def _plus(self, other: Any) -> Deferred | None:
        """The sum with a tensor, put off too; None where that is not possible."""
        plain = type(other) in (Tensor, nn.Parameter) and other.shape == self.x.shape and other.dtype == self.x.dtype
        if not plain or self.residual is not None or self._value is not None or isinstance(self.part, nn.Conv2d | nn.ConvTranspose2d):
            return None
        return Deferred(self.x, self.part, other)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in SUMS and len(args) == 2 and not kwargs:
            own, other = (args[0], args[1]) if isinstance(args[0], Deferred) else (args[1], args[0])
            # x += deferred changes x, which is another tensor than the one put off.
            if not (name in SUMS_IN_PLACE and own is args[1]):
                put_off = own._plus(other)
                if put_off is not None:
                    return put_off
        return func(*_computed(args), **_computed(kwargs or {}))

    def __add__(self, other: Any) -> Any:
        return self._plus(other) or self.value() + _computed(other)

    def __radd__(self, other: Any) -> Any:
        return self._plus(other) or _computed(other) + self.value()

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("x", "part", "residual", "_value"):
            raise AttributeError(name)
        return getattr(self.x if name in _CHEAP else self.value(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.value()[index]

    def __len__(self) -> int:
        return len(self.x)


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Deferred, *others: Any) -> Any:
        return getattr(self.value(), name)(*_computed(others))

    return method


for _name in ("sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "matmul", "neg", "abs", "lt", "le", "gt", "ge"):
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))


def _computed(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.value()
    if isinstance(value, tuple | list):
        return type(value)(_computed(v) for v in value)
    if isinstance(value, dict):
        return {k: _computed(v) for k, v in value.items()}
    return value
