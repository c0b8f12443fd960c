"""The built-in activations, each declared by its formula in plain PyTorch.

``native`` names the function of ``torch.nn.functional`` that computes the same with one kernel in eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import Activation, Parameter, hookimpl

Native = Callable[..., Tensor]


def _always(function: Native) -> Callable[[Mapping[str, float | str], tuple[str, ...]], Native | None]:
    return lambda fixed, learned: None if learned else function


def _slope_from_output(fixed: Mapping[str, float | str], learned: tuple[str, ...]) -> Native | None:
    slope = float(fixed["negative_slope"])
    # With a positive slope the output has the sign of the input.
    return None if learned or slope <= 0.0 else lambda y: torch.where(y > 0, 1.0, slope)


def _softplus_from_output(fixed: Mapping[str, float | str], learned: tuple[str, ...]) -> Native | None:
    beta = float(fixed["beta"])
    # sigmoid(t) = 1 - e^-log(1 + e^t)
    return None if learned else lambda y: -torch.expm1(-beta * y)


_SOFTSIGN = """
def dx(x):
    r = 1.0 / (1.0 + tl.abs(x))
    return r * r

def dxx(x):
    r = 1.0 / (1.0 + tl.abs(x))
    return tl.where(x < 0, 2.0, tl.where(x > 0, -2.0, 0.0)) * r * r * r
"""


def _leaky_relu(x: Tensor, negative_slope: Tensor | float) -> Tensor:
    return torch.where(x > 0, x, negative_slope * x)


def _native_leaky_relu(fixed: Mapping[str, float | str], learned: tuple[str, ...]) -> Native | None:
    if learned:
        return F.prelu
    slope = float(fixed["negative_slope"])
    return lambda x: F.leaky_relu(x, slope)


def _not_above_zero(x: Tensor) -> Tensor:
    # The exponential of a large positive x would overflow, and its unused infinity would spoil the gradient. Not clamp:
    # its derivative at zero itself is a matter of the version of PyTorch, and that of these functions is one.
    return torch.where(x > 0, 0.0, x)


def _elu(x: Tensor, alpha: Tensor | float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(_not_above_zero(x)))


def _celu(x: Tensor, alpha: Tensor | float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(_not_above_zero(x) / alpha))


def _selu(x: Tensor) -> Tensor:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return scale * torch.where(x > 0, x, alpha * torch.expm1(_not_above_zero(x)))


def _native_swish(fixed: Mapping[str, float | str], learned: tuple[str, ...]) -> Native | None:
    return F.silu if not learned and fixed["beta"] == 1.0 else None


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        # Beyond 10 the tanh is 1 to the last bit of float64, and the cube of a large x would overflow.
        c = torch.clamp(x, -10.0, 10.0)
        inner = 0.7978845608028654 * (c + 0.044715 * c * c * c)
        return 0.5 * x * (1.0 + torch.tanh(inner))
    # Likewise the square of a large x, in the derivative.
    return 0.5 * x * (1.0 + torch.erf(torch.clamp(x, -40.0, 40.0) * 0.7071067811865476))


def _native_gelu(fixed: Mapping[str, float | str], learned: tuple[str, ...]) -> Native | None:
    approximate = str(fixed["approximate"])
    return lambda x: F.gelu(x, approximate=approximate)


def _softplus(x: Tensor, beta: Tensor | float) -> Tensor:
    # log(1 + e^t) = -log(sigmoid(-t)), which PyTorch computes without overflow and differentiates rightly at zero.
    return -F.logsigmoid(-beta * x) / beta


def _native_softplus(fixed: Mapping[str, float | str], learned: tuple[str, ...]) -> Native:
    # F.softplus returns x itself where beta * x > 20; the difference there is under 2e-9. Unlike logsigmoid it keeps channels_last.
    if not learned:
        return lambda x: F.softplus(x, float(fixed["beta"]))

    def with_learned(x: Tensor, beta: Tensor) -> Tensor:
        beta = beta.view(-1, *[1] * (x.dim() - 2)) if beta.numel() > 1 else beta.view(())
        return F.softplus(beta * x) / beta

    return with_learned


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(_softplus(x, 1.0))


def _hardswish(x: Tensor) -> Tensor:
    return x * (torch.clamp(x + 3.0, 0.0, 6.0) / 6.0)


class Softmax(nn.Module):
    """Softmax over the channels: a function of all of a position's channels together, so it has no element-wise formula.

    Bridle 1990. Input and output: any shape with a channel dimension; the output is positive and sums to 1 over it.
    """

    def __init__(self, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(x, dim=self.channel_dim)
        # PyTorch's softmax returns the channels-first layout whatever it is given.
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last) if last else y


@hookimpl
def toolkit_activations() -> list[Activation]:
    slope = Parameter(0.01)
    return [
        Activation("identity", lambda x: x * 1.0, aliases=("linear",), native=_always(lambda x: x), reference="f(x) = x"),
        Activation("sigmoid", torch.sigmoid, native=_always(torch.sigmoid), reference="f(x) = 1 / (1 + exp(-x))"),
        Activation("tanh", torch.tanh, native=_always(torch.tanh), reference="LeCun et al. 1998, Efficient BackProp, 4.4"),
        Activation("relu", torch.relu, native=_always(F.relu), reference="Nair & Hinton 2010"),
        Activation(
            "leaky_relu",
            _leaky_relu,
            parameters={"negative_slope": slope},
            native=_native_leaky_relu,
            from_output=_slope_from_output,
            reference="Maas, Hannun & Ng 2013, eq. 3",
        ),
        Activation(
            "prelu",
            _leaky_relu,
            parameters={"negative_slope": Parameter(0.25, learn=True)},
            native=_native_leaky_relu,
            from_output=_slope_from_output,
            reference="He et al. 2015, arXiv:1502.01852, eq. 1",
        ),
        Activation(
            "elu",
            _elu,
            parameters={"alpha": Parameter(1.0, above=0.0)},
            native=lambda fixed, learned: None if learned else (lambda x, a=float(fixed["alpha"]): F.elu(x, a)),
            reference="Clevert et al. 2015, arXiv:1511.07289, eq. 15",
        ),
        Activation(
            "swish",
            lambda x, beta: x * torch.sigmoid(beta * x),
            parameters={"beta": Parameter(1.0)},
            aliases=("silu",),
            native=_native_swish,
            reference="Ramachandran et al. 2017, arXiv:1710.05941; SiLU of Elfwing et al. 2017, arXiv:1702.03118",
        ),
        Activation(
            "gelu",
            _gelu,
            parameters={"approximate": Parameter("none", choices=("none", "tanh"))},
            native=_native_gelu,
            reference="Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2",
        ),
        Activation("softmax", module=Softmax, reference="Bridle 1990", output_range=(0.0, 1.0)),
        Activation("selu", _selu, native=_always(F.selu), reference="Klambauer et al. 2017, arXiv:1706.02515, eq. 2"),
        Activation(
            "celu",
            _celu,
            parameters={"alpha": Parameter(1.0, above=0.0)},
            native=lambda fixed, learned: None if learned else (lambda x, a=float(fixed["alpha"]): F.celu(x, a)),
            reference="Barron 2017, arXiv:1704.07483",
        ),
        Activation(
            "mish",
            _mish,
            native=_always(lambda x: x * torch.tanh(F.softplus(x))),  # F.mish: second derivative NaN above 88
            reference="Misra 2019, arXiv:1908.08681",
        ),
        Activation("hardswish", _hardswish, native=_always(F.hardswish), reference="Howard et al. 2019, arXiv:1905.02244, 5.2"),
        Activation(
            "softplus",
            _softplus,
            parameters={"beta": Parameter(1.0, above=0.0)},
            native=_native_softplus,
            from_output=_softplus_from_output,
            reference="Dugas et al. 2001",
        ),
        Activation(
            "softsign",
            lambda x: x / (1.0 + torch.abs(x)),
            native=_always(F.softsign),
            triton=_SOFTSIGN,  # the derived form is a difference of two numbers that are close for large x
            reference="Glorot & Bengio 2010",
        ),
        Activation(
            "snake",
            lambda x, a: x + torch.sin(a * x) ** 2 / a,
            parameters={"a": Parameter(1.0, above=0.0)},
            reference="Liu et al. 2020, arXiv:2006.08195, eq. 3",
        ),
    ]
