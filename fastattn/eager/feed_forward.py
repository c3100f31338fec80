"""Linear layers with activation and gate in plain PyTorch: the differentiable definition, and the CPU backend.

The launchers have the signatures of `fastattn/kernels/feed_forward.py`; the equations stand there.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fastattn.eager.activations import ACTIVATIONS, activate, gradient
from fastattn.eager.products import fuses, in_fp32, onednn_linear, product, product_with_columns, widened
from fastattn.eager.random import drop


def definition(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """act(X Wᵀ + b), or act(X Wgᵀ + bg) · (X Wᵀ + b), for input of any rank."""
    z = F.linear(input, weight, bias)
    if gate_weight is None:
        return ACTIVATIONS[activation](z)
    return ACTIVATIONS[activation](F.linear(input, gate_weight, gate_bias)) * z


# the names of activations that oneDNN computes on the way out of a product, with their variant; its ReLU makes NaN 0
_EPILOGUES = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", None),
    "sigmoid": ("sigmoid", None),
    "tanh": ("tanh", None),
}


def hidden_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """`definition` of (rows, in), by products as `product`, for who does not need z and g."""
    if widened(x, weight):
        return in_fp32(partial(hidden_layer, activation=activation), x, weight, bias, gate_weight, gate_bias)
    if gate_weight is None:
        return _activated(x, weight, bias, activation)
    return _activated(x, gate_weight, gate_bias, activation).mul_(product(x, weight, bias))


def _activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(X Wᵀ + b)"""
    if activation in _EPILOGUES and fuses(x, weight):
        name, variant = _EPILOGUES[activation]
        return onednn_linear(x, weight, bias, name, variant)
    return activate(product(x, weight, bias), activation, overwrite=True)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dropout(act(z) or act(g) · z) + residual, z, g); z and g are empty without `save`, g also without a gate."""
    z, g = input.new_empty(0), input.new_empty(0)
    if save:
        z = product(input, weight, bias)
        g = g if gate_weight is None else product(input, gate_weight, gate_bias)
        out = activate(z if gate_weight is None else g, activation)
        out = out.clone() if out is z or out is g else out
        out = out if gate_weight is None else out.mul_(z)
    else:
        out = hidden_layer(input, weight, bias, gate_weight, gate_bias, activation)
    if seed is not None:
        out = dropout_backward(out, seed, dropout_p)
    return (out if residual is None else out.add_(residual)), z, g


def hidden_backward(
    grad_output: Tensor,
    weight: Tensor,
    z: Tensor,
    g: Tensor,
    gated: bool,
    activation: str,
    need_hidden: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dg, hidden) from dY (rows, out) and the second layer's weight (out, in); dg and hidden may be empty."""
    d_hidden, empty = product_with_columns(grad_output, weight), z.new_empty(0)
    if not gated:
        dz, hidden = gradient(d_hidden, z, activation, overwrite=True, need_value=need_hidden)
        return dz, empty, empty if hidden is None else hidden
    dg, act = gradient(d_hidden * z, g, activation, overwrite=True, need_value=True)
    assert act is not None
    return d_hidden * act, dg, act * z if need_hidden else empty


def input_backward(
    grad_z: Tensor, weight: Tensor, grad_g: Tensor | None, gate_weight: Tensor | None, precision: str
) -> Tensor:
    """dX = dZ W (+ dG Wg)."""
    return product_with_columns(grad_z, weight, grad_g, gate_weight)


def dropout_backward(grad_output: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """dY · keep / (1 - p) of (rows, columns)."""
    rows, columns = grad_output.shape
    return drop(grad_output, seed, dropout_p, range(rows), columns).to(grad_output.dtype)


def activation_backward(grad_output: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz = dY · act'(z)."""
    return gradient(grad_output, z, activation)[0]


def explain(columns: int, depth: int, itemsize: int, gated: bool) -> str:
    """How a product with a (columns, depth) weight is done, in words."""
    return (
        "PyTorch's products, by MKL or oneDNN, in 16 bits or fp32, whichever is faster on this CPU, then the activation"
    )
