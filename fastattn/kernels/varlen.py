"""Packed sequences: the kernels of attention.py, each program finding its sequence in cu_seqlens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastattn.kernels import attention
from fastattn.layout import Packing

if TYPE_CHECKING:
    from torch import Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    packing: Packing, scale: float, window_left: int | None, window_right: int | None, softcap: float, dropout_p: float,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). Shapes as in `fastattn.ops.varlen`."""
    return attention.forward(
        query, key, value, None, None, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p,
        precision, packing,
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, packing: Packing, scale: float,
    window_left: int | None, window_right: int | None, softcap: float, dropout_p: float, need_sinks: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_sinks or None)."""
    dq, dk, dv, _, dsinks = attention.backward(
        grad_out, grad_lse, query, key, value, out, lse, None, None, alibi_slopes, sinks, seed, scale, window_left,
        window_right, softcap, dropout_p, False, need_sinks, precision, packing,
    )  # fmt: skip
    return dq, dk, dv, dsinks
