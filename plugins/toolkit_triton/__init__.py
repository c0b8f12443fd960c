"""Every activation that has a formula as Triton kernels, alone and fused with its neighbour, for training on GPUs.

- ``formula``: a formula is traced and printed as scalar Triton functions: value, derivatives, derivatives by parameters;
- ``scalars``: the functions that these are printed with, where Triton's own lose accuracy;
- ``kernels``: the generic kernels, which take scalar functions as compile-time arguments;
- ``launch``: how a tensor is cut into tiles, and which kernel does what;
- ``ops``: differentiable operations, as ``autograd.Function`` and registered with ``torch.library``;
- ``module``: the activation module that uses them where it can, and the formula elsewhere;
- ``ahead``: all kernels compiled for GPUs that are not there.

A config takes these with ``prefer: [triton]``, or ``triton/swish`` for one site. Nothing here is imported before that.
"""

from __future__ import annotations

from collections.abc import Callable

from toolkit import Activation, hookimpl


@hookimpl
def toolkit_activation_backends() -> Callable[[Activation], Activation]:
    from toolkit_triton.module import triton_version

    return triton_version
