"""Activations and their derivatives, each pair defined once."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x) = ±(1 - e^{-2|x|}) / (1 + e^{-2|x|}); near 0, where that cancels, its Taylor series to x⁹."""
    e = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    return tl.where(x2 < 0.0625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def relu(x):
    """max(x, 0), which keeps NaN: the maximum of a GPU alone would make it 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    """(σ(x), σ'(x)): 1 / (1 + e^{-x}) and σ (1 - σ), from e^{-|x|}, so that nothing overflows or cancels."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e, 1.0) * inverse, e * inverse * inverse


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z)) of an fp32 tile; what is not used costs nothing in compiled code."""
    if ACTIVATION == "relu":
        value, derivative = relu(z), tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        value, derivative = relu(z) * relu(z), 2.0 * relu(z)
    elif ACTIVATION == "gelu":  # z Φ(z), with Φ the normal distribution function and φ its density
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        value, derivative = z * cdf, cdf + z * density
    elif ACTIVATION == "gelu_tanh":  # z σ(2u), which is z (1 + tanh u) / 2, with u = √(2/π) (z + 0.044715 z³)
        s, slope = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        value, derivative = z * s, s + z * slope * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s, slope = sigmoid(z)
        value, derivative = z * s, s + z * slope
    elif ACTIVATION == "sigmoid":
        value, derivative = sigmoid(z)
    elif ACTIVATION == "tanh":
        t = tanh(z)
        value, derivative = t, 1.0 - t * t
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        value, derivative = z, tl.full(z.shape, 1.0, tl.float32)
    return value, derivative
