"""The generic kernels. Scalar functions of an activation come in as compile-time arguments; none is named here.

A tensor is seen as ``(N, C, S)``: samples, channels, positions. With ``LAST`` its memory order is ``(N, C)`` with S = 1
(channels last, positions counted as samples), otherwise ``(N, C, S)``. A tensor whose channels do not matter is ``(1, 1, S)``.

Every kernel runs on a grid of ``blocks x splits``: a block is K channels (``LAST``) or one channel, and a split is
``TILES`` consecutive tiles of R x K elements of that block. All arithmetic is in float32. Sums over a channel are written
per split, in float32, and added up in the order of splits afterwards: no atomics, so results do not vary from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(block, t, N, C, S, LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Offsets, mask, channel and completeness of tile ``t`` of a block; offsets in 64 bits beyond the tile's own."""
    rows = tl.arange(0, R)
    columns = tl.arange(0, K)
    t = t.to(tl.int64)
    if LAST:
        first = t * R
        channel = (block * K + columns)[None, :]
        offsets = first * C + (rows[:, None] * C + channel)
        mask = ((first + rows) < N)[:, None] & (channel < C)
        full = (first + R <= N) & (block * K + K <= C)
        channel = tl.where(channel < C, channel, 0)
    else:
        along = (S + K - 1) // K
        sample = (t // along) * R
        start = (t % along) * K
        offsets = (((sample + rows) * C + block) * S)[:, None] + (start + columns)[None, :]
        mask = ((sample + rows) < N)[:, None] & ((start + columns) < S)[None, :]
        full = (sample + R <= N) & (start + K <= S)
        channel = tl.full([1, 1], 0, tl.int32) + block
    return offsets, mask, channel, full


@triton.jit
def load(pointer, offsets, mask, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        values = tl.load(pointer + offsets)
    return values.to(tl.float32)


@triton.jit
def store(pointer, offsets, values, mask, MASKED: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    values = tl.broadcast_to(values, (R, K)).to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, values, mask=mask)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def parameters(pointer, channel, C, NP: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """The learned parameters as a tuple, each a number or a row per channel; stored as ``(NP, C)`` or ``(NP, 1)``."""
    stride = 1
    place = channel * 0
    if PER_CHANNEL:
        stride = C
        place = channel
    P = ()
    if NP == 1:
        P = (tl.load(pointer + place).to(tl.float32),)
    if NP == 2:
        P = (tl.load(pointer + place).to(tl.float32), tl.load(pointer + stride + place).to(tl.float32))
    if NP == 3:
        P = (
            tl.load(pointer + place).to(tl.float32),
            tl.load(pointer + stride + place).to(tl.float32),
            tl.load(pointer + 2 * stride + place).to(tl.float32),
        )
    if NP == 4:
        P = (
            tl.load(pointer + place).to(tl.float32),
            tl.load(pointer + stride + place).to(tl.float32),
            tl.load(pointer + 2 * stride + place).to(tl.float32),
            tl.load(pointer + 3 * stride + place).to(tl.float32),
        )
    return P


@triton.jit
def zeros(NP: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """A tuple of NP tiles of zeros."""
    Z = ()
    if NP == 1:
        Z = (tl.zeros((R, K), tl.float32),)
    if NP == 2:
        Z = (tl.zeros((R, K), tl.float32), tl.zeros((R, K), tl.float32))
    if NP == 3:
        Z = (tl.zeros((R, K), tl.float32), tl.zeros((R, K), tl.float32), tl.zeros((R, K), tl.float32))
    if NP == 4:
        Z = (
            tl.zeros((R, K), tl.float32),
            tl.zeros((R, K), tl.float32),
            tl.zeros((R, K), tl.float32),
            tl.zeros((R, K), tl.float32),
        )
    return Z


@triton.jit
def write_sum(pointer, quantity, values, block, split, splits, C, LAST: tl.constexpr, K: tl.constexpr):
    """Write one split's sums of a quantity to ``(quantity, split, channel)``."""
    place = pointer + (quantity * splits + split).to(tl.int64) * C
    if LAST:
        channels = block * K + tl.arange(0, K)
        tl.store(place + channels, tl.sum(values, axis=0), mask=channels < C)
    else:
        tl.store(place + block, tl.sum(tl.sum(values, axis=1), axis=0))


@triton.jit
def pre_activation(x, channel, mean_ptr, var_ptr, w_ptr, b_ptr, eps, NORM: tl.constexpr, AFFINE: tl.constexpr):
    """What the activation is applied to, but for the residual: normalised with NORM, with a bias otherwise."""
    if NORM:
        x = (x - tl.load(mean_ptr + channel).to(tl.float32)) * tl.rsqrt(tl.load(var_ptr + channel).to(tl.float32) + eps)
        if AFFINE:
            x = x * tl.load(w_ptr + channel).to(tl.float32) + tl.load(b_ptr + channel).to(tl.float32)
    elif AFFINE:
        x = x + tl.load(b_ptr + channel).to(tl.float32)
    return x


@triton.jit
def forward_tile(
    x_ptr, r_ptr, y_ptr, z_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, C, offsets, mask, channel,
    VALUE: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    x = load(x_ptr, offsets, mask, MASKED)
    z = pre_activation(x, channel, mean_ptr, var_ptr, w_ptr, b_ptr, eps, NORM, AFFINE)
    if RESIDUAL:
        z = z + load(r_ptr, offsets, mask, MASKED)
    if KEEP:
        store(z_ptr, offsets, z, mask, MASKED, R, K)
    store(y_ptr, offsets, VALUE(z, parameters(p_ptr, channel, C, NP, PER_CHANNEL)), mask, MASKED, R, K)


@triton.jit
def forward_kernel(
    x_ptr, r_ptr, y_ptr, z_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, N, C, S, blocks,
    VALUE: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``y = value(pre_activation(x) + r)``; one tile a program. With KEEP the argument of the function is written too."""
    program = tl.program_id(0)
    offsets, mask, channel, full = tile_at(program % blocks, program // blocks, N, C, S, LAST, R, K)
    # The branch without a mask is what lets the compiler load and store 128 bits at a time.
    if full:
        forward_tile(
            x_ptr, r_ptr, y_ptr, z_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, C, offsets, mask, channel,
            VALUE, NP, PER_CHANNEL, NORM, AFFINE, RESIDUAL, KEEP, R, K, False,
        )  # fmt: skip
    else:
        forward_tile(
            x_ptr, r_ptr, y_ptr, z_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, C, offsets, mask, channel,
            VALUE, NP, PER_CHANNEL, NORM, AFFINE, RESIDUAL, KEEP, R, K, True,
        )  # fmt: skip


@triton.jit
def backward_tile(
    dy_ptr, x_ptr, r_ptr, s_ptr, g_ptr, dx_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, C, offsets, mask, channel,
    sum_g, sum_gx, sum_p,
    DX: tl.constexpr, BY: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, SLOPE_FROM: tl.constexpr, WRITE_G: tl.constexpr, WRITE_DX: tl.constexpr,
    SUM_G: tl.constexpr, SUM_P: tl.constexpr, R: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dy = load(dy_ptr, offsets, mask, MASKED)
    P = parameters(p_ptr, channel, C, NP, PER_CHANNEL)
    x = dy
    z = dy
    if NORM or SLOPE_FROM == "input":
        x = load(x_ptr, offsets, mask, MASKED)
        z = pre_activation(x, channel, mean_ptr, var_ptr, w_ptr, b_ptr, eps, NORM, AFFINE)
        if RESIDUAL:
            z = z + load(r_ptr, offsets, mask, MASKED)
    if SLOPE_FROM == "saved":
        z = load(s_ptr, offsets, mask, MASKED)
    g = dy * DX(z, P)
    if MASKED:
        # Not a number times the zero of a masked place would spoil the sums.
        g = tl.where(mask, g, 0.0)
    if WRITE_G:
        store(g_ptr, offsets, g, mask, MASKED, R, K)
    if SUM_G:
        sum_g = sum_g + g
    if NORM:
        inverse = tl.rsqrt(tl.load(var_ptr + channel).to(tl.float32) + eps)
        if SUM_G:
            normal = (x - tl.load(mean_ptr + channel).to(tl.float32)) * inverse
            if MASKED:
                normal = tl.where(mask, normal, 0.0)
            sum_gx = sum_gx + g * normal
        if WRITE_DX:
            if AFFINE:
                inverse = inverse * tl.load(w_ptr + channel).to(tl.float32)
            store(dx_ptr, offsets, g * inverse, mask, MASKED, R, K)
    if SUM_P:
        weight = dy
        if MASKED:
            weight = tl.where(mask, dy, 0.0)
            z = tl.where(mask, z, 1.0)
        sum_p = BY(z, P, weight, sum_p)
    return sum_g, sum_gx, sum_p


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, r_ptr, s_ptr, g_ptr, dx_ptr, sums_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps,
    N, C, S, blocks, splits,
    DX: tl.constexpr, BY: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, SLOPE_FROM: tl.constexpr, WRITE_G: tl.constexpr, WRITE_DX: tl.constexpr,
    SUM_G: tl.constexpr, SUM_P: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``g = dy * dx(z)``, written with WRITE_G, and with WRITE_DX times the scale of a norm in evaluation.

    Sums per channel and split, in this order: g (SUM_G), g times the normalised input (SUM_G and NORM), and dy times the
    derivative by each learned parameter (SUM_P). The slope comes from the ``input`` or from a ``saved`` output; ``none``
    where it is constant.
    """
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks
    sum_g = tl.zeros((R, K), tl.float32)
    sum_gx = tl.zeros((R, K), tl.float32)
    sum_p = zeros(NP, R, K)
    for i in range(TILES):
        offsets, mask, channel, full = tile_at(block, split * TILES + i, N, C, S, LAST, R, K)
        if full:
            sum_g, sum_gx, sum_p = backward_tile(
                dy_ptr, x_ptr, r_ptr, s_ptr, g_ptr, dx_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, C, offsets, mask,
                channel, sum_g, sum_gx, sum_p, DX, BY, NP, PER_CHANNEL, NORM, AFFINE, RESIDUAL, SLOPE_FROM, WRITE_G,
                WRITE_DX, SUM_G, SUM_P, R, K, False,
            )  # fmt: skip
        else:
            sum_g, sum_gx, sum_p = backward_tile(
                dy_ptr, x_ptr, r_ptr, s_ptr, g_ptr, dx_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, C, offsets, mask,
                channel, sum_g, sum_gx, sum_p, DX, BY, NP, PER_CHANNEL, NORM, AFFINE, RESIDUAL, SLOPE_FROM, WRITE_G,
                WRITE_DX, SUM_G, SUM_P, R, K, True,
            )  # fmt: skip
    if SUM_G:
        write_sum(sums_ptr, 0, sum_g, block, split, splits, C, LAST, K)
        if NORM:
            write_sum(sums_ptr, 1, sum_gx, block, split, splits, C, LAST, K)
    if SUM_P:
        for i in tl.static_range(NP):
            write_sum(sums_ptr, (2 if NORM else 1) * SUM_G + i, sum_p[i], block, split, splits, C, LAST, K)


@triton.jit
def norm_dx_kernel(
    dy_ptr, x_ptr, g_ptr, dx_ptr, sums_ptr, count_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, p_ptr, eps, count, N, C, S, blocks,
    DX: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr, AFFINE: tl.constexpr, HAVE_G: tl.constexpr,
    COUNTED: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Gradient of batch norm in training (Ioffe & Szegedy 2015, section 3): ``scale (g - mean(g) - xhat mean(g xhat))``.

    ``sums`` holds the sums of g and of g xhat per channel, over ``count`` elements each (counted over processes and in memory
    with COUNTED); g is read with HAVE_G, computed from dy otherwise.
    """
    program = tl.program_id(0)
    offsets, mask, channel, full = tile_at(program % blocks, program // blocks, N, C, S, LAST, R, K)
    inverse = tl.rsqrt(tl.load(var_ptr + channel).to(tl.float32) + eps)
    mean = tl.load(mean_ptr + channel).to(tl.float32)
    if COUNTED:
        count = tl.load(count_ptr)
    mean_g = tl.load(sums_ptr + channel) / count
    mean_gx = tl.load(sums_ptr + C + channel) / count
    scale = inverse
    if AFFINE:
        scale = inverse * tl.load(w_ptr + channel).to(tl.float32)
    if full:
        x = load(x_ptr, offsets, mask, False)
        normal = (x - mean) * inverse
        if HAVE_G:
            g = load(g_ptr, offsets, mask, False)
        else:
            z = pre_activation(x, channel, mean_ptr, var_ptr, w_ptr, b_ptr, eps, True, AFFINE)
            g = load(dy_ptr, offsets, mask, False) * DX(z, parameters(p_ptr, channel, C, NP, PER_CHANNEL))
        store(dx_ptr, offsets, scale * (g - mean_g - normal * mean_gx), mask, False, R, K)
    else:
        x = load(x_ptr, offsets, mask, True)
        normal = (x - mean) * inverse
        if HAVE_G:
            g = load(g_ptr, offsets, mask, True)
        else:
            z = pre_activation(x, channel, mean_ptr, var_ptr, w_ptr, b_ptr, eps, True, AFFINE)
            g = load(dy_ptr, offsets, mask, True) * DX(z, parameters(p_ptr, channel, C, NP, PER_CHANNEL))
        store(dx_ptr, offsets, scale * (g - mean_g - normal * mean_gx), mask, True, R, K)


@triton.jit
def second_tile(
    dy_ptr, s_ptr, u_ptr, ub_ptr, up_ptr, ddy_ptr, ds_ptr, b_ptr, p_ptr, C, offsets, mask, channel, sum_s, sum_p,
    SECOND_DY: tl.constexpr, SECOND_DX: tl.constexpr, SECOND_P: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BIAS: tl.constexpr, U: tl.constexpr, U_BIAS: tl.constexpr, SUM_S: tl.constexpr, SUM_P: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dy = load(dy_ptr, offsets, mask, MASKED)
    s = pre_activation(load(s_ptr, offsets, mask, MASKED), channel, b_ptr, b_ptr, b_ptr, b_ptr, 0.0, False, BIAS)
    u = tl.zeros((R, K), tl.float32)
    if U:
        u = load(u_ptr, offsets, mask, MASKED)
    if U_BIAS:
        u = u + tl.load(ub_ptr + channel).to(tl.float32)
    if MASKED:
        # A place that is not there must not contribute, whatever the functions are at zero.
        dy = tl.where(mask, dy, 0.0)
        s = tl.where(mask, s, 1.0)
    P = parameters(p_ptr, channel, C, NP, PER_CHANNEL)
    Q = parameters(up_ptr, channel, C, NP, PER_CHANNEL)
    store(ddy_ptr, offsets, SECOND_DY(s, P, u, Q), mask, MASKED, R, K)
    ds = dy * SECOND_DX(s, P, u, Q)
    store(ds_ptr, offsets, ds, mask, MASKED, R, K)
    if SUM_S:
        sum_s = sum_s + ds
    if SUM_P:
        sum_p = SECOND_P(s, P, dy, u, Q, sum_p)
    return sum_s, sum_p


@triton.jit
def second_kernel(
    dy_ptr, s_ptr, u_ptr, ub_ptr, up_ptr, ddy_ptr, ds_ptr, sums_ptr, b_ptr, p_ptr, N, C, S, blocks, splits,
    SECOND_DY: tl.constexpr, SECOND_DX: tl.constexpr, SECOND_P: tl.constexpr, NP: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BIAS: tl.constexpr, U: tl.constexpr, U_BIAS: tl.constexpr, SUM_S: tl.constexpr, SUM_P: tl.constexpr,
    LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of the backward pass ``g = dy * dx(s)``, given the gradient u of g (and of the sums over it).

    Writes the gradients by dy and by s, and sums per channel and split: that by s (SUM_S), that by each parameter (SUM_P).
    """
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks
    sum_s = tl.zeros((R, K), tl.float32)
    sum_p = zeros(NP, R, K)
    for i in range(TILES):
        offsets, mask, channel, full = tile_at(block, split * TILES + i, N, C, S, LAST, R, K)
        if full:
            sum_s, sum_p = second_tile(
                dy_ptr, s_ptr, u_ptr, ub_ptr, up_ptr, ddy_ptr, ds_ptr, b_ptr, p_ptr, C, offsets, mask, channel, sum_s, sum_p,
                SECOND_DY, SECOND_DX, SECOND_P, NP, PER_CHANNEL, BIAS, U, U_BIAS, SUM_S, SUM_P, R, K, False,
            )  # fmt: skip
        else:
            sum_s, sum_p = second_tile(
                dy_ptr, s_ptr, u_ptr, ub_ptr, up_ptr, ddy_ptr, ds_ptr, b_ptr, p_ptr, C, offsets, mask, channel, sum_s, sum_p,
                SECOND_DY, SECOND_DX, SECOND_P, NP, PER_CHANNEL, BIAS, U, U_BIAS, SUM_S, SUM_P, R, K, True,
            )  # fmt: skip
    if SUM_S:
        write_sum(sums_ptr, 0, sum_s, block, split, splits, C, LAST, K)
    if SUM_P:
        for i in tl.static_range(NP):
            write_sum(sums_ptr, SUM_S + i, sum_p[i], block, split, splits, C, LAST, K)


@triton.jit
def statistics_kernel(x_ptr, sums_ptr, N, C, S, blocks, splits, LAST: tl.constexpr, R: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr):
    """Count, mean and sum of squared deviations per channel and split (Welford 1962; Chan et al. 1979 joins them).

    Every place of the tile runs Welford's recurrence of its own, so that nothing is ever squared before its mean is off.
    """
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks
    count = tl.zeros((R, K), tl.float32)
    mean = tl.zeros((R, K), tl.float32)
    squares = tl.zeros((R, K), tl.float32)
    for i in range(TILES):
        offsets, mask, _, full = tile_at(block, split * TILES + i, N, C, S, LAST, R, K)
        if full:
            x = load(x_ptr, offsets, mask, False)
            count = count + 1.0
            delta = x - mean
            mean = mean + delta / count
            squares = squares + delta * (x - mean)
        else:
            x = load(x_ptr, offsets, mask, True)
            count = count + tl.where(mask, 1.0, 0.0)
            delta = tl.where(mask, x - mean, 0.0)
            mean = mean + delta / tl.where(count > 0.0, count, 1.0)
            squares = squares + delta * (x - mean)
    if LAST:
        total = tl.sum(count, axis=0)
        middle = tl.sum(count * mean, axis=0) / tl.where(total > 0.0, total, 1.0)
        off = mean - middle[None, :]
        spread = tl.sum(squares + count * off * off, axis=0)
        place = block * K + tl.arange(0, K)
        inside = place < C
        base = sums_ptr + split.to(tl.int64) * C + place
        step = splits * C
        tl.store(base, total, mask=inside)
        tl.store(base + step, middle, mask=inside)
        tl.store(base + 2 * step, spread, mask=inside)
    else:
        total = tl.sum(tl.sum(count, axis=1), axis=0)
        middle = tl.sum(tl.sum(count * mean, axis=1), axis=0) / tl.where(total > 0.0, total, 1.0)
        off = mean - middle
        spread = tl.sum(tl.sum(squares + count * off * off, axis=1), axis=0)
        base = sums_ptr + split.to(tl.int64) * C + block
        tl.store(base, total)
        tl.store(base + splits * C, middle)
        tl.store(base + 2 * splits * C, spread)


@triton.jit
def join_kernel(
    sums_ptr, out_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, splits, C,
    RUNNING: tl.constexpr, CUMULATIVE: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Join the statistics of all splits (Chan, Golub & LeVeque 1979, eq. 2.1): mean and biased variance per channel.

    With RUNNING the running mean and the unbiased running variance move by ``momentum``, or by one over the number of
    batches seen with CUMULATIVE.
    """
    rows = tl.arange(0, ROWS)
    channels = tl.program_id(0) * K + tl.arange(0, K)
    inside = channels < C
    mask = (rows < splits)[:, None] & inside[None, :]
    place = sums_ptr + rows[:, None] * C + channels[None, :]
    count = tl.load(place, mask=mask, other=0.0)
    mean = tl.load(place + splits * C, mask=mask, other=0.0)
    squares = tl.load(place + 2 * splits * C, mask=mask, other=0.0)
    total = tl.sum(count, axis=0)
    middle = tl.sum(count * mean, axis=0) / tl.where(total > 0.0, total, 1.0)
    off = mean - middle[None, :]
    spread = tl.sum(squares + count * off * off, axis=0)
    variance = spread / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + channels, middle, mask=inside)
    tl.store(out_ptr + C + channels, variance, mask=inside)
    if RUNNING:
        share = momentum
        if CUMULATIVE:
            share = 1.0 / tl.load(batches_ptr).to(tl.float32)
        old = tl.load(running_mean_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        new = old + share * (middle - old)
        tl.store(running_mean_ptr + channels, new.to(running_mean_ptr.dtype.element_ty), mask=inside)
        old = tl.load(running_var_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        new = old + share * (spread / (total - 1.0) - old)
        tl.store(running_var_ptr + channels, new.to(running_var_ptr.dtype.element_ty), mask=inside)
