"""The sigmoid, its logarithms and the focal factor in Triton, as csrc/focal.h has them for C++."""

import triton
import triton.language as tl


@triton.jit
def _exp_nonpositive(x):
    """exp(x) for x <= 0; in float32 smaller x than -87 count as -87, where exp is about 1e-38."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # A GPU computes 2^(x * log2(e)), which is as wrong as that product is rounded: here what was lost comes back.
        x = tl.where(x < -87.0, -87.0, x)
        scaled = x * 1.44269504
        lost = tl.fma(x, 1.44269504, -scaled) + x * 1.92596299e-8
        power = tl.exp2(scaled)
        result = power + power * (lost * 0.693147181)
    return result


@triton.jit
def _log1p_unit(t):
    """log(1 + t) for t in [0, 1]."""
    if t.dtype == tl.float64:
        u = 1 + t  # rounded; the quotient takes its error out again (Kahan)
        result = tl.where(u == 1, t, tl.log(u) * (t / (u - 1)))
    else:
        s = t / (2 + t)
        z = s * s
        poly = 0.140122324
        poly = poly * z + 0.139995694
        poly = poly * z + 0.200108498
        poly = poly * z + 0.333332062
        result = poly * z * (2 * s) + 2 * s
    return result


@triton.jit
def class_probability(logit):
    """The probabilities that the class is present and absent, and minus the logarithm of each."""
    t = _exp_nonpositive(-tl.abs(logit))
    rest = _log1p_unit(t)
    larger = 1 / (1 + t)
    smaller = t * larger
    negative = logit < 0
    present = tl.where(negative, smaller, larger)
    absent = tl.where(negative, larger, smaller)
    minus_log_present = rest + tl.where(negative, -logit, 0)
    minus_log_absent = rest + tl.where(negative, 0, logit)
    return present, absent, minus_log_present, minus_log_absent


@triton.jit
def focal_factor(probability, minus_log_probability, GAMMA: tl.constexpr):
    """probability^GAMMA"""
    return probability * probability if GAMMA == 2 else _exp_nonpositive(-GAMMA * minus_log_probability)
