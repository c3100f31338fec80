"""Packed sequences: the kernels of attention.py, each program finding its sequence in cu_seqlens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastattn.kernels import attention
from fastattn.layout import Packing
from fastattn.score_rules import ScoreRules

if TYPE_CHECKING:
    from torch import Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, packing: Packing, precision: str
) -> tuple[Tensor, Tensor]:
    """(out, lse). Shapes as in `fastattn.ops.varlen`."""
    return attention.forward(query, key, value, rules, precision, packing)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    rules: ScoreRules, packing: Packing, need_sinks: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_sinks or None)."""
    dq, dk, dv, _, dsinks = attention.backward(
        grad_out, grad_lse, query, key, value, out, lse, rules, False, need_sinks, precision, packing
    )
    return dq, dk, dv, dsinks
