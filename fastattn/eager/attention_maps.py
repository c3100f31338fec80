"""Parts of the matrix of attention weights, a block of rows at a time. In PyTorch on every device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.checks import without_autocast
from fastattn.eager.attention import (
    add_replayed,
    block_weights,
    product_rows,
    reduce_like,
    score_gradients,
    sink_gradient,
    zeros_like_all,
)
from fastattn.eager.row_block import RowBlock, cut, whole_block
from fastattn.score_rules import ScoreRules


def _blocks(
    query: Tensor, key: Tensor, rules: ScoreRules, rows: Sequence[int] | None
) -> Iterator[tuple[slice, RowBlock]]:
    """(their places among the rows, block) of neighbours among the rows, in their order; None = all rows."""
    if 0 in (query.shape[2], key.shape[2]):
        return
    whole, most = whole_block(query, key, rules), product_rows(query, key)
    if rows is None:
        yield from ((slice(block.rows.start, block.rows.stop), block) for block in whole.split(most))
        return
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or end - start == most or rows[end] != rows[end - 1] + 1:
            yield slice(start, end), whole.narrow(range(rows[start], rows[end - 1] + 1))
            start = end


def _weights_of(q: Tensor, k: Tensor, block: RowBlock) -> Tensor:
    """fp32 (B, Hq, rows, columns) of one block, whose q and k these are. Differentiable."""
    p, l, _ = block_weights(q, k, block)
    return p / l


@without_autocast
def weights(query: Tensor, key: Tensor, rules: ScoreRules, rows: Sequence[int] | None) -> Tensor:
    """(B, Hq, len(rows), Nk) in the query's dtype. Differentiable by any of torch's means."""
    num_keys, parts = key.shape[2], []
    for _, block in _blocks(query, key, rules, rows):
        part = _weights_of(block.of_rows(query), block.of_columns(key), block)
        parts.append(torch.nn.functional.pad(part, (block.columns.start, num_keys - block.columns.stop)))
    if not parts:
        return query.new_zeros((*query.shape[:2], query.shape[2] if rows is None else len(rows), num_keys))
    return torch.cat(parts, 2).to(query.dtype)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, rules: ScoreRules, rows: Sequence[int] | None, need_bias: bool, need_sinks: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_bias, grad_sinks); the last two None where not needed."""
    given = (query, key, rules.bias if need_bias else None, rules.sinks if need_sinks else None)
    dq, dk, dbias, dsinks = total = zeros_like_all(given)
    assert dq is not None
    assert dk is not None
    for places, block in _blocks(query, key, rules, rows):
        q, k = block.of_rows(query).float(), block.of_columns(key).float()
        dp = grad[:, :, places, block.columns.start : block.columns.stop].to(torch.float32, copy=True)
        p, l, lse = block_weights(q, k, block)
        delta = (dp * (p / l)).sum(-1)
        seen = lse.masked_fill(lse == float("-inf"), float("inf"))
        dq_part, dk_part, ds, _ = score_gradients(dp, q, k, seen, delta, block)
        block.of_rows(dq).add_(dq_part)
        block.of_columns(dk).add_(dk_part)
        bias_part = cut(dbias, block.rows, block.columns)
        if bias_part is not None:
            bias_part += reduce_like(ds, bias_part)
        if dsinks is not None and rules.sinks is not None:
            dsinks += sink_gradient(rules.sinks, lse, delta)
    return tuple(None if t is None or like is None else t.to(like.dtype) for t, like in zip(total, given))  # type: ignore[return-value]


@without_autocast
def double_backward(
    grad_grads: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor, query: Tensor, key: Tensor, rules: ScoreRules,
    rows: Sequence[int] | None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (grad, query, key, bias, sinks); grad_grads and needs are those of the last four."""
    inputs = (query, key, None, rules.bias, rules.sinks)
    of_grad, *total = zeros_like_all((grad, *inputs))
    gq, gk, *rest = grad_grads
    need_query, need_key, *need_rest = needs
    assert of_grad is not None

    def definition(q: Tensor, k: Tensor, _: None, block: RowBlock) -> tuple[Tensor]:
        return (_weights_of(q, k, block),)

    for places, block in _blocks(query, key, rules, rows):
        part = slice(None), slice(None), places, slice(block.columns.start, block.columns.stop)
        add_replayed(
            definition, block, (need_query, need_key, False, *need_rest), [grad[part].float()], inputs,
            (gq, gk, None, *rest), [of_grad[part]], total,
        )  # fmt: skip
    found = zip((of_grad, *total), (grad, *inputs))
    dy, dq, dk, _, *pairs = (None if t is None or like is None else t.to(like.dtype) for t, like in found)
    return [dy, dq, dk, *pairs]


@without_autocast
def column_sums(query: Tensor, key: Tensor, rules: ScoreRules) -> Tensor:
    """fp32 (B, Hq, Nk): the sum of each column."""
    total = query.new_zeros((*query.shape[:2], key.shape[2]), dtype=torch.float32)
    for _, block in _blocks(query, key, rules, None):
        part = _weights_of(block.of_rows(query), block.of_columns(key), block)
        total[:, :, block.columns.start : block.columns.stop] += part.sum(2)
    return total
