"""The differentiable operations: an ``autograd.Function`` for eager PyTorch, and the same registered with ``torch.library``.

Dispatch of a registered operator costs several times that of an ``autograd.Function``, which is much for a small layer; so
modules call :func:`activate` and :func:`norm_activate`, which are Functions. ``torch.ops.toolkit_triton.*`` is for code
that compilers and exporters look into. Both share what they compute, what they keep, and how they differentiate it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from toolkit.errors import UserError
from toolkit_triton import launch
from toolkit_triton.formula import Scalars

_KNOWN: dict[str, Scalars] = {}


def register(scalars: Scalars) -> str:
    """Make an activation's functions known to the operators; returns the key that these name them by."""
    _KNOWN.setdefault(scalars.key, scalars)
    return scalars.key


def _empty(x: Tensor) -> Tensor:
    """Registered operators return tensors only; an empty one stands for None."""
    return x.new_empty(0)


# --- activation, with a bias or a residual -------------------------------------------------------------------------


def _keeps(scalars: Scalars, residual: Tensor | None) -> str:
    """What the backward pass is computed from: ``none``, ``output``, ``input``, or the ``sum`` with a residual."""
    if scalars.needs != "input":
        return scalars.needs
    return "input" if residual is None else "sum"


def _activate(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, parameters: Tensor, key: str, channel_dim: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    scalars = _KNOWN[key]
    x = launch.dense(x)
    residual = None if residual is None else launch.as_laid_out(residual, x)
    keep = differentiate and _keeps(scalars, residual) == "sum"
    y, z = launch.forward(scalars, x, bias, residual, parameters, channel_dim, keep=keep)
    return y, _empty(x) if z is None else z


def _activate_backward(
    dy: Tensor, saved: Tensor | None, bias: Tensor | None, parameters: Tensor, key: str, channel_dim: int, sum_g: bool, sum_p: bool
) -> tuple[Tensor, Tensor]:
    scalars = _KNOWN[key]
    if saved is not None:
        saved = launch.dense(saved)
        dy = launch.as_laid_out(dy, saved)
    else:
        dy = launch.dense(dy)
    return launch.backward(
        scalars, dy, saved, bias, parameters, channel_dim, from_output=scalars.needs == "output", sum_g=sum_g, sum_p=sum_p
    )


def _activate_second(
    dy: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    parameters: Tensor,
    u: Tensor | None,
    u_bias: Tensor | None,
    u_parameters: Tensor | None,
    key: str,
    channel_dim: int,
    sum_s: bool,
    sum_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scalars = _KNOWN[key]
    saved = launch.dense(saved)
    return launch.second(
        scalars,
        launch.as_laid_out(dy, saved),
        saved,
        bias,
        parameters,
        None if u is None else launch.as_laid_out(u, saved),
        u_bias,
        torch.zeros_like(parameters) if u_parameters is None else u_parameters.float().contiguous(),
        channel_dim,
        from_output=scalars.needs == "output",
        sum_s=sum_s,
        sum_p=sum_p,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, residual, parameters, key, channel_dim, _ = inputs
    y, z = output
    ctx.key, ctx.channel_dim = key, channel_dim
    ctx.bias_like = None if bias is None else (bias.dtype, bias.shape)
    ctx.has_residual = residual is not None
    ctx.needs = _keeps(_KNOWN[key], residual)
    kept = {"none": None, "output": y, "input": x, "sum": z}[ctx.needs]
    ctx.save_for_backward(kept, bias if ctx.needs == "input" else None, parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, again: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
    # The sum z is no result, but what is differentiated a second time, and then it has a gradient.
    if ctx.needs != "sum":
        dz = None
    if dy is None:
        return (dz, None, dz, *(None,) * 4)
    saved, bias, parameters = ctx.saved_tensors
    need_x, need_bias, need_residual, need_p = ctx.needs_input_grad[:4]
    need_p = need_p and parameters.shape[0] > 0
    g, sums = again(dy, saved, bias, parameters, ctx.key, ctx.channel_dim, need_bias, need_p)
    d_bias = d_p = None
    if need_bias:
        d_bias = sums[0].to(ctx.bias_like[0])
    if need_p:
        d_p = sums[int(need_bias) :]
        d_p = d_p if parameters.shape[1] > 1 else d_p.sum(1, keepdim=True)
    if dz is not None:
        g = g + dz
    return (g if need_x else None, d_bias, g if ctx.has_residual and need_residual else None, d_p, None, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, saved, bias, parameters, ctx.key, ctx.channel_dim, ctx.sum_g, ctx.sum_p = inputs
    ctx.save_for_backward(dy, saved, bias, parameters)
    ctx.set_materialize_grads(False)


class _NoThird(Function):
    """Hands its first tensors on, and refuses to be differentiated.

    (``once_differentiable`` says nothing when only its saved tensors need a gradient: a third derivative would be missing.)
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise UserError("a Triton activation has two derivatives, not three; take the formula's own: toolkit_builtin/NAME")


def _no_third(results: tuple[Any, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return results
    refused: tuple[Any, ...] = _NoThird.apply(len(results), *results, *inputs)
    return refused


def _refuse_second(scalars: Scalars) -> None:
    if scalars.twice:
        raise UserError(
            f"activation {scalars.key.split('@')[0]} has no second derivative, so a gradient penalty (R1, WGAN-GP) cannot pass through it: "
            f"{scalars.twice}"
        )


def _second(ctx: Any, u: Tensor | None, u_sums: Tensor | None, compute: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> tuple[Any, ...]:
    dy, saved, bias, parameters = ctx.saved_tensors
    _refuse_second(_KNOWN[ctx.key])
    u_bias = u_p = None
    if u_sums is not None:
        u_bias = u_sums[0].contiguous() if ctx.sum_g else None
        u_p = u_sums[int(ctx.sum_g) :] if ctx.sum_p else None
        if u_p is not None and u_p.shape[1] != parameters.shape[1]:
            # One parameter for all channels: the gradient of its sum over channels is the same for each.
            u_p = u_p[:, :1]
    need_dy, need_saved, need_bias, need_p = ctx.needs_input_grad[:4]
    need_p = need_p and parameters.shape[0] > 0
    # A constant slope has no tensor to differentiate by; dy stands in for it.
    ddy, ds, sums = compute(
        dy,
        dy if saved is None else saved,
        bias,
        parameters,
        u,
        u_bias,
        u_p,
        ctx.key,
        ctx.channel_dim,
        need_bias and bias is not None,
        need_p,
    )
    d_bias = d_p = None
    if need_bias and bias is not None:
        d_bias = sums[0].to(bias.dtype)
    if need_p:
        d_p = sums[int(d_bias is not None) :]
        d_p = d_p if parameters.shape[1] > 1 else d_p.sum(1, keepdim=True)
    results = (ddy if need_dy else None, ds if need_saved and saved is not None else None, d_bias, d_p)
    return (*_no_third(results, (dy, saved, bias, parameters, u, u_sums)), None, None, None, None)


class _ActivateBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _activate_backward(*arguments)

    setup_context = staticmethod(_setup_backward)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        u, u_sums = gradients
        return _second(ctx, u, u_sums, _activate_second)


class _Activate(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _activate(*arguments)

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, dy, dz, _ActivateBackward.apply)


def activate(scalars: Scalars, x: Tensor, bias: Tensor | None, residual: Tensor | None, parameters: Tensor, channel_dim: int) -> Tensor:
    """``f(x + bias)`` or ``f(x + residual)`` by one kernel, differentiable twice.

    Args:
        x: any shape and layout, float32, float16 or bfloat16; the result has its shape, dtype and layout.
        bias: ``(C,)``, added along ``channel_dim``.
        residual: of the shape and dtype of x.
        parameters: the learned parameters, ``(P, 1)`` or ``(P, C)`` float32.
    """
    register(scalars)
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual, parameters))
    return _Activate.apply(x, bias, residual, parameters, scalars.key, channel_dim, differentiate)[0]


# --- batch norm and activation ---------------------------------------------------------------------------------------


def _norm_activate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    parameters: Tensor,
    key: str,
    eps: float,
    channel_dim: int,
    running: launch.Running | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y; in training (``mean`` None) the mean and variance ``(2, C)``; with a group the count. Empty otherwise."""
    x = launch.dense(x)
    residual = None if residual is None else launch.as_laid_out(residual, x)
    stats, count = _empty(x), None
    if mean is None or variance is None:
        stats, count = launch.statistics(x, channel_dim, running, group)
        mean, variance = stats.unbind()
    norm = (mean, variance, weight, eps)
    y, _ = launch.forward(_KNOWN[key], x, bias, residual, parameters, channel_dim, norm=norm)
    return y, stats, _empty(x) if count is None else count


def _norm_activate_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    parameters: Tensor,
    key: str,
    eps: float,
    channel_dim: int,
    training: bool,
    has_residual: bool,
    sum_g: bool,
    sum_p: bool,
    count: Tensor | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = launch.dense(x)
    mean, variance = stats.unbind()
    dx, g, sums = launch.norm_backward(
        _KNOWN[key],
        launch.as_laid_out(dy, x),
        x,
        None if residual is None else launch.as_laid_out(residual, x),
        None if y is None else launch.as_laid_out(y, x),
        mean,
        variance,
        weight,
        bias,
        parameters,
        eps,
        channel_dim,
        training=training,
        has_residual=has_residual,
        sum_g=sum_g,
        sum_p=sum_p,
        count=count,
        group=group,
    )
    return dx, _empty(x) if g is None else g, sums


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, mean, variance, parameters, ctx.key, ctx.eps, ctx.channel_dim, *rest = inputs
    y, stats, count = output
    ctx.group = rest[1] if rest else None
    ctx.training, ctx.has_residual = mean is None, residual is not None
    from_output = residual is not None and _KNOWN[ctx.key].needs == "output"
    # Without a residual what the slope needs is computed from x again, which the norm keeps in any case.
    kept_residual = residual if not from_output and _KNOWN[ctx.key].needs != "none" else None
    count_kept = None if ctx.group is None else count
    ctx.save_for_backward(x, kept_residual, y if from_output else None, weight, bias, stats, mean, variance, parameters, count_kept)
    ctx.set_materialize_grads(False)
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(stats, count)


def _backward_norm(ctx: Any, dy: Tensor | None, again: Callable[..., tuple[Tensor, Tensor, Tensor]], extra: int) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * (10 + extra)
    x, residual, y, weight, bias, stats, mean, variance, parameters, count = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, _, _, need_p = ctx.needs_input_grad[:7]
    need_p = need_p and parameters.shape[0] > 0
    if mean is not None:
        stats = torch.stack([mean, variance])
    rest = (count, ctx.group) if extra else ()
    affine = need_weight or need_bias
    dx, g, sums = again(
        dy, x, residual, y, weight, bias, stats, parameters, ctx.key, ctx.eps, ctx.channel_dim, ctx.training, ctx.has_residual,
        affine, need_p, *rest,
    )  # fmt: skip
    summed = 2 * int(affine or ctx.training)
    d_weight = sums[1].to(weight.dtype) if need_weight else None
    d_bias = sums[0].to(bias.dtype) if need_bias else None
    d_p = None
    if need_p:
        d_p = sums[summed:]
        d_p = d_p if parameters.shape[1] > 1 else d_p.sum(1, keepdim=True)
    gradients = (dx if need_x else None, g if need_residual else None, d_weight, d_bias, None, None, d_p)
    return (*gradients, *(None,) * (3 + extra))


def _setup_norm_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    dy, x, residual, y, weight, bias, stats, parameters = inputs[:8]
    ctx.key, ctx.eps, ctx.channel_dim, ctx.training, ctx.has_residual, ctx.sum_g, ctx.sum_p, *rest = inputs[8:]
    ctx.group = rest[1] if rest else None
    ctx.extra = len(rest)
    ctx.save_for_backward(dy, x, residual, y, weight, bias, stats, parameters)
    ctx.set_materialize_grads(False)


def _second_norm(ctx: Any, u: Tensor | None, u_residual: Tensor | None, u_sums: Tensor | None) -> tuple[Any, ...]:
    """Differentiate the backward pass, written out in PyTorch.

    A penalty through batch norm is rare (it mixes the samples that the penalty looks at one by one), so this is made to be
    right rather than fast.
    """
    dy, x, residual, y, weight, bias, _, parameters = ctx.saved_tensors
    scalars = _KNOWN[ctx.key]
    _refuse_second(scalars)
    if ctx.group is not None:
        raise UserError("a gradient penalty cannot pass through batch norm that is synchronised over processes; use norm: layer")
    inputs = (dy, x, residual, y, weight, bias, parameters)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().float().requires_grad_() for t in inputs]
        outputs = _norm_backward_reference(scalars, leaves, ctx.saved_tensors[6], ctx)
        wanted = [(o, g) for o, g in zip(outputs, (u, u_residual, u_sums), strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in wanted],
                [t for t in leaves if t is not None],
                [g.to(o.dtype).view_as(o) for o, g in wanted],
                allow_unused=True,
            )
        )
    d = [None if t is None else next(found) for t in leaves]
    d = [None if g is None else g.to(t.dtype) for g, t in zip(d, inputs, strict=True)]
    d = list(_no_third(tuple(d), (*inputs, u, u_residual, u_sums)))
    return (*d[:6], None, d[6], *(None,) * (7 + ctx.extra))


def _norm_backward_reference(scalars: Scalars, leaves: list[Any], stats: Tensor, ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`_norm_activate_backward` computes, in differentiable PyTorch: dx, g, and the sums ``(Q, C)``."""
    dy, x, residual, y, weight, bias, parameters = leaves
    channel = ctx.channel_dim % x.dim()
    dims = [d for d in range(x.dim()) if d != channel]
    shape = [1] * x.dim()
    shape[channel] = x.shape[channel]
    count = x.numel() // x.shape[channel]
    if ctx.training:
        mean = x.mean(dims, keepdim=True)
        variance = ((x - mean) ** 2).mean(dims, keepdim=True)
    else:
        mean, variance = stats[0].view(shape), stats[1].view(shape)
    inverse = torch.rsqrt(variance + ctx.eps)
    normal = (x - mean) * inverse
    w = 1.0 if weight is None else weight.view(shape)
    per_channel = parameters.expand(-1, x.shape[channel])
    by_parameters = per_channel[:0]
    if y is not None:
        assert scalars.slope_from_output is not None
        g = dy * scalars.slope_from_output(y)
    else:
        z = normal * w + (0.0 if bias is None else bias.view(shape)) + (0.0 if residual is None else residual)
        value = scalars.formula(z, *(p.view(shape) for p in per_channel))
        g, *rest = torch.autograd.grad(value, [z, *([per_channel] if ctx.sum_p else [])], dy, create_graph=True, allow_unused=True)
        g = torch.zeros_like(z) if g is None else g
        if rest:
            by_parameters = rest[0]
    sums = [g.sum(dims), (g * normal).sum(dims)]
    dx = g
    if ctx.training:
        dx = g - sums[0].view(shape) / count - normal * (sums[1].view(shape) / count)
    kept = sums if ctx.sum_g or ctx.training else []
    return w * inverse * dx, g, torch.cat([torch.stack(kept), by_parameters]) if kept else by_parameters


class _NormActivateBackward(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _norm_activate_backward(*arguments)

    setup_context = staticmethod(_setup_norm_backward)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return _second_norm(ctx, *gradients)


class _NormActivate(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _norm_activate(*arguments)

    setup_context = staticmethod(_setup_norm)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _backward_norm(ctx, dy, _NormActivateBackward.apply, extra=2)


def norm_activate(
    scalars: Scalars,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    parameters: Tensor,
    eps: float,
    *,
    running: launch.Running | None = None,
    group: Any = None,
) -> Tensor:
    """``f(batch_norm(x) + residual)``, differentiable twice; backward keeps x and two numbers per channel.

    Args:
        x: ``(N, C, ...)``, float32, float16 or bfloat16, any layout; the result has its shape, dtype and layout.
        residual: of the shape and dtype of x.
        weight, bias: ``(C,)``, of the norm; both or neither.
        statistics: mean and variance to normalise with (evaluation), or None to take those of x (training).
        parameters: the learned parameters, ``(P, 1)`` or ``(P, C)`` float32.
        running: running statistics to move, in training.
        group: the process group over which statistics are taken together.
    """
    register(scalars)
    mean, variance = statistics or (None, None)
    return _NormActivate.apply(x, residual, weight, bias, mean, variance, parameters, scalars.key, eps, 1, running, group)[0]


# --- the same, registered ----------------------------------------------------------------------------------------------


def _fake_activate(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, parameters: Tensor, key: str, channel_dim: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    keep = differentiate and _keeps(_KNOWN[key], residual) == "sum"
    return torch.empty_like(x), torch.empty_like(x) if keep else _empty(x)


def _fake_activate_backward(
    dy: Tensor, saved: Tensor | None, bias: Tensor | None, parameters: Tensor, key: str, channel_dim: int, sum_g: bool, sum_p: bool
) -> tuple[Tensor, Tensor]:
    like = dy if saved is None else saved
    wide = sum_g or parameters.shape[1] > 1 or (bias is not None and _KNOWN[key].needs != "output")
    quantities = int(sum_g) + int(sum_p) * parameters.shape[0]
    return torch.empty_like(like), dy.new_empty((quantities, like.shape[channel_dim] if wide else 1), dtype=torch.float32)


def _fake_activate_second(
    dy: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    parameters: Tensor,
    u: Tensor | None,
    u_bias: Tensor | None,
    u_parameters: Tensor | None,
    key: str,
    channel_dim: int,
    sum_s: bool,
    sum_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = sum_s or u_bias is not None or bias is not None or parameters.shape[1] > 1
    quantities = int(sum_s) + int(sum_p) * parameters.shape[0]
    sums = dy.new_empty((quantities, saved.shape[channel_dim] if wide else 1), dtype=torch.float32)
    return torch.empty_like(saved), torch.empty_like(saved), sums


def _fake_norm_activate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    parameters: Tensor,
    key: str,
    eps: float,
    channel_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((2, x.shape[channel_dim]), dtype=torch.float32) if mean is None else _empty(x)
    return torch.empty_like(x), stats, _empty(x)


def _fake_norm_activate_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    parameters: Tensor,
    key: str,
    eps: float,
    channel_dim: int,
    training: bool,
    has_residual: bool,
    sum_g: bool,
    sum_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    quantities = 2 * int(sum_g or training) + int(sum_p) * parameters.shape[0]
    g = torch.empty_like(x) if has_residual else _empty(x)
    return torch.empty_like(x), g, x.new_empty((quantities, x.shape[channel_dim]), dtype=torch.float32)


def _registered(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    schema = torch.library.infer_schema(fake, mutates_args=())
    op = torch.library.custom_op(f"toolkit_triton::{name}", real, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


activate_op = _registered("activate", _activate, _fake_activate)
activate_backward_op = _registered("activate_backward", _activate_backward, _fake_activate_backward)
activate_second_op = _registered("activate_second", _activate_second, _fake_activate_second)
norm_activate_op = _registered("norm_activate", _norm_activate, _fake_norm_activate)
norm_activate_backward_op = _registered("norm_activate_backward", _norm_activate_backward, _fake_norm_activate_backward)

activate_op.register_autograd(lambda ctx, dy, dz: _backward(ctx, dy, dz, activate_backward_op), setup_context=_setup)
activate_backward_op.register_autograd(lambda ctx, u, u_sums: _second(ctx, u, u_sums, activate_second_op), setup_context=_setup_backward)
norm_activate_op.register_autograd(lambda ctx, dy, _, __: _backward_norm(ctx, dy, norm_activate_backward_op, 0), setup_context=_setup_norm)
norm_activate_backward_op.register_autograd(_second_norm, setup_context=_setup_norm_backward)
