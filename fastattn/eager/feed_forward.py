"""Linear layers with activation and gate in plain PyTorch: the differentiable definition, and the CPU backend.

The launchers have the signatures of `fastattn/kernels/feed_forward.py`; the equations stand there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.eager.activations import ACTIVATIONS, activate, gradient, onednn_takes
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


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b of (rows, in).

    A few rows are done in an order of loops for which PyTorch has faster CPU kernels: in bf16 as (W Xᵀ)ᵀ + b; in fp32 as
    a batch of products with 64 rows of W each. With many rows in bf16, oneDNN adds the bias where PyTorch copies it first.
    """
    rows, dtype = x.shape[0], x.dtype
    if dtype == torch.bfloat16 and x.is_cpu:
        if rows == 1:
            return (torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0]))[None]
        if 2 <= rows <= 8:
            y = torch.mm(weight, x.t()).t().contiguous()
            return y if bias is None else y.add_(bias)
        if rows > 16 and _fuses(x, weight):
            return _fused(x, weight, bias, "none", [], None)
    few = 3 <= rows <= 8 and dtype == torch.float32 and x.is_cpu and weight.is_contiguous()
    whole = weight.shape[0] // 64 * 64 if few else 0
    if not whole:
        return F.linear(x, weight, bias)
    parts = weight[:whole].view(whole // 64, 64, weight.shape[1]).transpose(1, 2)
    y = torch.bmm(x.expand(whole // 64, -1, -1), parts).transpose(0, 1).reshape(rows, whole)
    if whole < weight.shape[0]:
        y = torch.cat([y, F.linear(x, weight[whole:])], 1)
    return y if bias is None else y.add_(bias)


# the names of activations that oneDNN computes on the way out of a product, with their variant
_EPILOGUES = {
    "relu": ("relu", None),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", None),
    "sigmoid": ("sigmoid", None),
    "tanh": ("tanh", None),
}
_fused: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product with bias and activation does the job, faster than PyTorch's calls one after the other."""
    plain = x.dtype == torch.bfloat16 and x.is_cpu and x.is_contiguous() and weight.is_contiguous()
    return plain and 0 not in weight.shape and _fused is not None and onednn_takes(torch.bfloat16)


def _activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(X Wᵀ + b), for who does not need X Wᵀ + b."""
    if activation in _EPILOGUES and x.shape[0] > 16 and _fuses(x, weight):
        name, variant = _EPILOGUES[activation]
        return _fused(x, weight, bias, name, [], variant)
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
    elif gate_weight is None:
        out = _activated(input, weight, bias, activation)
    else:
        out = _activated(input, gate_weight, gate_bias, activation).mul_(product(input, weight, bias))
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
    d_hidden, empty = grad_output @ weight, z.new_empty(0)
    if not gated:
        dz, hidden = gradient(d_hidden, z, activation, overwrite=True, need_value=need_hidden)
        return dz, empty, empty if hidden is None else hidden
    dg, activated = gradient(d_hidden * z, g, activation, overwrite=True, need_value=True)
    assert activated is not None
    return d_hidden * activated, dg, activated * z if need_hidden else empty


def input_backward(
    grad_z: Tensor, weight: Tensor, grad_g: Tensor | None, gate_weight: Tensor | None, precision: str
) -> Tensor:
    """dX = dZ W (+ dG Wg)."""
    dx = grad_z @ weight
    return dx if grad_g is None or gate_weight is None else dx.addmm_(grad_g, gate_weight)


def dropout_backward(grad_output: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """dY · keep / (1 - p) of (rows, columns)."""
    rows, columns = grad_output.shape
    return drop(grad_output, seed, dropout_p, range(rows), columns).to(grad_output.dtype)


def activation_backward(grad_output: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz = dY · act'(z)."""
    return gradient(grad_output, z, activation)[0]


def explain(columns: int, depth: int, itemsize: int, gated: bool) -> str:
    """How a product with a (columns, depth) weight is done, in words."""
    return "PyTorch's linear and activation, one after the other"
