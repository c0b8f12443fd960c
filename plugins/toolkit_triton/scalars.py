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
def quarter_turns(x):
    """x as a whole number of quarter turns and a rest in [-pi/4, pi/4], reduced in float64: to 1e-6 up to 1e10.

    The sine of CUDA's own library reduces large arguments through a table in local memory, which every kernel that calls
    it would then have to reserve.
    """
    wide = x.to(tl.float64)
    turns = tl.floor(wide * 0.6366197723675814 + 0.5)
    rest = (wide - turns * 1.5707963267948966) - turns * 6.123233995736766e-17
    quarter = turns - 4.0 * tl.floor(turns * 0.25)
    rest = tl.where(tl.abs(rest) > 0.8, 0.0, rest)
    return quarter.to(tl.int32), rest.to(tl.float32)


@triton.jit
def sine_of_quarter(quarter, r):
    """sin(quarter * pi/2 + r) by the Taylor series of sine and cosine (remainder below 3e-8)."""
    q = r * r
    s = r + r * q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880))))
    c = 1.0 + q * (-0.5 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320))))
    magnitude = tl.where((quarter & 1) == 1, c, s)
    return tl.where((quarter & 2) == 2, -magnitude, magnitude)


@triton.jit
def sin(x):
    quarter, rest = quarter_turns(x)
    return sine_of_quarter(quarter, rest)


@triton.jit
def cos(x):
    quarter, rest = quarter_turns(x)
    return sine_of_quarter(quarter + 1, rest)


@triton.jit
def atan(x):
    """Reduced to [0, tan(pi/8)] by atan(x) = pi/2 - atan(1/x) and atan(x) = pi/4 + atan((x - 1)/(x + 1)), then its series."""
    a = tl.abs(x)
    t = tl.where(a > 1.0, 1.0 / a, a)
    wide = t > 0.41421356
    t = tl.where(wide, (t - 1.0) / (t + 1.0), t)
    q = t * t
    series = 1 / 13 + q * (-1 / 15)
    series = -1 / 11 + q * series
    series = 1 / 9 + q * series
    series = -1 / 7 + q * series
    series = 1 / 5 + q * series
    series = -1 / 3 + q * series
    angle = t + t * q * series
    angle = tl.where(wide, 0.7853981633974483 + angle, angle)
    angle = tl.where(a > 1.0, 1.5707963267948966 - angle, angle)
    return tl.where(x < 0.0, -angle, angle)


@triton.jit
def asinh(x):
    """log(|x| + sqrt(x^2 + 1)) with the sign of x, by log1p near zero and without squaring what is large."""
    a = tl.abs(x)
    near = tl.where(a < 1e9, a, 0.0)
    small = log1p(near + near * near / (1.0 + tl.sqrt(near * near + 1.0)))
    magnitude = tl.where(a < 1e9, small, tl.log(a) + 0.6931471805599453)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def power(x, exponent):
    """x to a real exponent; NaN for negative x, as in PyTorch when the exponent is not whole."""
    positive = tl.exp2(exponent * tl.log2(x))
    zero = tl.where(exponent > 0.0, 0.0, tl.where(exponent < 0.0, float("inf"), 1.0))
    return tl.where(x > 0.0, positive, tl.where(x == 0.0, zero, float("nan")))
