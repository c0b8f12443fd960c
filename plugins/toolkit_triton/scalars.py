"""Scalar functions for generated kernels: in float32, accurate near zero, and without overflow on the way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to inf for very negative x, whose inverse is the 0 that is meant."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """exp(x) - 1: its Taylor series to the tenth power below 1/2 (remainder below 1e-9 of it), the difference beyond."""
    small = x * (1 / 3628800)
    small = x * (1 / 362880 + small)
    small = x * (1 / 40320 + small)
    small = x * (1 / 5040 + small)
    small = x * (1 / 720 + small)
    small = x * (1 / 120 + small)
    small = x * (1 / 24 + small)
    small = x * (1 / 6 + small)
    small = x * (0.5 + small)
    small = x * (1.0 + small)
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): 2 artanh(x / (2 + x)) by its series below 1/2 (remainder below 1e-8 of it), the logarithm beyond."""
    s = x / (2.0 + x)
    q = s * s
    series = 1 / 13 + q * (1 / 15)
    series = 1 / 11 + q * series
    series = 1 / 9 + q * series
    series = 1 / 7 + q * series
    series = 1 / 5 + q * series
    series = 1 / 3 + q * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * (s + s * q * series), tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """-expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x: no overflow, and no cancellation near zero."""
    t = expm1(-2.0 * tl.abs(x))
    magnitude = -t / (2.0 + t)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def power(x, exponent):
    """x to a real exponent; NaN for negative x, as in PyTorch when the exponent is not whole."""
    positive = tl.exp2(exponent * tl.log2(x))
    zero = tl.where(exponent > 0.0, 0.0, tl.where(exponent < 0.0, float("inf"), 1.0))
    return tl.where(x > 0.0, positive, tl.where(x == 0.0, zero, float("nan")))
