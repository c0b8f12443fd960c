"""Check one activation's kernels, in a process of their own: ``python -m toolkit_triton.conform triton/NAME SPEC``.

With ``TRITON_INTERPRET=1`` they run on the CPU and are compared with the formula in float64: value, gradients and gradients of
gradients, alone and after batch norm. Otherwise they are compiled ahead of time. The last line printed says what is wrong.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.activations.registry import registry
from toolkit.activations.spec import ActivationSpec
from toolkit_triton.module import TritonActivation, interpreting, scalars_of

CHANNELS = 5


def compile_problem(name: str, text: str) -> str:
    """What stands against compiling its kernels for an sm_90; empty if nothing does."""
    from toolkit_triton import ahead

    spec = ActivationSpec.parse(text)
    _, activation = registry().find(name)
    scalars = scalars_of(activation, *activation.configure(spec))
    for variant in ahead.variants(scalars, per_channel=spec.per_channel):
        try:
            ahead.compile_variant(variant, "sm_90")
        except Exception as error:
            # Whatever the compiler raises is about this kernel.
            return f"{variant.name} does not compile: {' '.join(str(error).split())[-300:]}"
    return ""


def run_problem(name: str, text: str) -> str:
    """Where its kernels and its formula in float64 disagree, in Triton's interpreter; empty if nowhere."""
    from toolkit_triton.ops import activate, norm_activate

    spec = ActivationSpec.parse(text)
    provider, activation = registry().find(name)
    module = TritonActivation(activation, spec, provider=provider, channels=CHANNELS)
    scalars = module.scalars
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, CHANNELS, 4, 7, generator=generator)
    parameters = module._parameters_tensor(x).detach().clone()
    shape = (1, -1, 1, 1)

    def plain(x: Tensor, p: Tensor) -> Tensor:
        return activate(scalars, x, None, None, p, 1)

    def normed(x: Tensor, p: Tensor) -> Tensor:
        return norm_activate(scalars, x, None, None, None, None, p, 1e-5)

    def formula(x: Tensor, p: Tensor) -> Tensor:
        return scalars.formula(x, *(q.view(shape) for q in p))

    def formula_normed(x: Tensor, p: Tensor) -> Tensor:
        return formula(F.batch_norm(x, None, None, None, None, True, 0.0, 1e-5), p)

    for what, own, reference in (("alone", plain, formula), ("after batch norm", normed, formula_normed)):
        results = []
        for function, dtype in ((own, torch.float32), (reference, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in ((x, parameters) if scalars.learned else (x,))]
            y = function(leaves[0], leaves[1] if scalars.learned else parameters.to(dtype))
            weights = torch.cos(torch.arange(y.numel(), dtype=dtype)).view_as(y)
            found = {"value": y}
            first = torch.autograd.grad((y * weights).sum(), leaves, create_graph=not scalars.twice)
            found |= {f"gradient by {n}": g for n, g in zip(("x", "parameters"), first, strict=False)}
            if not scalars.twice:
                total = sum((g * torch.sin(1 + torch.arange(g.numel(), dtype=dtype)).view_as(g)).sum() for g in first)
                second = torch.autograd.grad(total, leaves, allow_unused=True) if isinstance(total, Tensor) and total.requires_grad else ()
                found |= {f"second gradient by {n}": g for n, g in zip(("x", "parameters"), second, strict=False) if g is not None}
            results.append(found)
        for key, right in results[1].items():
            mine = results[0].get(key, torch.zeros_like(right)).double().detach()
            error = (mine - right.detach()).abs() / (right.detach().abs().max() + 1.0)
            place = int(error.nan_to_num(nan=torch.inf).argmax())
            if not float(error.flatten()[place]) <= 1e-4:
                where = f" at x = {float(x.flatten()[place]):.6g}" if right.shape == x.shape and what == "alone" else ""
                return f"{what}, the {key}{where} is {float(mine.flatten()[place]):.7g}, in float64 {float(right.flatten()[place]):.7g}"
    return ""


if __name__ == "__main__":
    problem = run_problem(sys.argv[1], sys.argv[2]) if interpreting() else compile_problem(sys.argv[1], sys.argv[2])
    if problem:
        print(problem)
        sys.exit(1)
