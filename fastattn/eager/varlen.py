"""Packed sequences in PyTorch: attention.py, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.checks import without_autocast
from fastattn.eager import attention
from fastattn.layout import Packing, new_gradient, new_output
from fastattn.score_rules import ScoreRules


def _sequences(packing: Packing, rules: ScoreRules) -> Iterator[tuple[int, slice, slice, ScoreRules]]:
    """(index, its queries, its keys, its rules) of each sequence."""
    slopes = rules.alibi_slopes
    starts = zip(packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist())
    q, k = next(starts)
    for index, (next_q, next_k) in enumerate(starts):
        own = rules if slopes is None else rules._replace(alibi_slopes=slopes[index : index + 1])
        yield index, slice(q, next_q), slice(k, next_k), own
        q, k = next_q, next_k


def forward(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, packing: Packing, precision: str
) -> tuple[Tensor, Tensor]:
    """(out, lse). Shapes as in `fastattn.ops.varlen`."""
    out, end = new_output(query, value.shape[3]), 0
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for index, q, k, own in _sequences(packing, rules):
        end = q.stop
        out[:, :, q], lse[:, :, q] = attention.forward(
            query[:, :, q], key[:, :, k], value[:, :, k], own, precision, index
        )
    out[:, :, end:], lse[:, :, end:] = 0.0, float("-inf")
    return out, lse


@without_autocast
def definition(query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, packing: Packing) -> tuple[Tensor, Tensor]:
    """(out, lse) by plain differentiable PyTorch."""
    parts, end = [], 0
    for index, q, k, own in _sequences(packing, rules):
        parts.append(attention.definition(query[:, :, q], key[:, :, k], value[:, :, k], own, index))
        end = q.stop
    rest = query[:, :, end:, :0].sum(-1)
    out = torch.cat([*(part[0] for part in parts), rest[..., None].expand(*rest.shape, value.shape[3])], 2)
    return out, torch.cat([*(part[1] for part in parts), rest.float() - torch.inf], 2)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    rules: ScoreRules, packing: Packing, need_sinks: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_sinks or None)."""
    dq, dk, dv = map(new_gradient, (query, key, value))
    dsinks = torch.zeros_like(rules.sinks) if rules.sinks is not None and need_sinks else None
    ends = 0, 0
    for index, q, k, own in _sequences(packing, rules):
        ends = q.stop, k.stop
        dq[:, :, q], dk[:, :, k], dv[:, :, k], _, part = attention.backward(
            grad_out[:, :, q], None if grad_lse is None else grad_lse[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k],
            out[:, :, q], lse[:, :, q], own, False, need_sinks, precision, index,
        )  # fmt: skip
        if dsinks is not None and part is not None:
            dsinks += part
    dq[:, :, ends[0] :], dk[:, :, ends[1] :], dv[:, :, ends[1] :] = 0.0, 0.0, 0.0
    return dq, dk, dv, dsinks


@without_autocast
def double_backward(
    grad_grads: Sequence[Tensor | None], needs: Sequence[bool], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor,
    key: Tensor, value: Tensor, rules: ScoreRules, packing: Packing,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (grad_out, grad_lse, query, key, value, sinks); grad_grads and needs are those of the last four."""
    inputs = (grad_out, grad_lse, query, key, value, rules.sinks)
    total = [None if t is None else torch.zeros_like(t) for t in inputs]
    gq, gk, gv, gsinks = grad_grads
    need = (*needs[:3], False, needs[3])
    for index, q, k, own in _sequences(packing, rules):
        grads = attention.double_backward(
            (*(None if g is None else g[:, :, s] for g, s in ((gq, q), (gk, k), (gv, k))), None, gsinks), need,
            grad_out[:, :, q], None if grad_lse is None else grad_lse[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k],
            own, index,
        )  # fmt: skip
        for target, grad, part in zip(total, (*grads[:5], grads[6]), (q, q, q, k, k, None)):
            if target is not None and grad is not None:
                (target if part is None else target[:, :, part]).add_(grad)
    return total
