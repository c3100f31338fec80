"""Parts of the matrix of attention weights, a block of rows at a time: the whole is never in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.eager.attention import block_weights, product_rows
from fastattn.eager.row_block import RowBlock, whole_block
from fastattn.score_rules import ScoreRules


def _weights_of(query: Tensor, key: Tensor, block: RowBlock) -> Tensor:
    """fp32 (B, Hq, rows, columns) of one block."""
    p, l, _ = block_weights(block.of_rows(query), block.of_columns(key), block)
    return p / l


def _runs(rows: Sequence[int]) -> Iterator[range]:
    """The rows in their order, neighbours together."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield range(rows[start], rows[end - 1] + 1)
            start = end


def weights_of_rows(query: Tensor, key: Tensor, rows: Sequence[int], rules: ScoreRules) -> Tensor:
    """(B, Hq, len(rows), Nk) in the query's dtype. Differentiable."""
    num_keys = key.shape[2]
    if num_keys == 0 or not rows:
        return query.new_zeros((*query.shape[:2], len(rows), num_keys))
    whole, parts = whole_block(query, key, rules), []
    for run in _runs(rows):
        block = whole.narrow(run)
        seen = _weights_of(query, key, block)
        parts.append(torch.nn.functional.pad(seen, (block.columns.start, num_keys - block.columns.stop)))
    return torch.cat(parts, 2).to(query.dtype)


def column_sums(query: Tensor, key: Tensor, rules: ScoreRules) -> Tensor:
    """fp32 (B, Hq, Nk): the sum of each column."""
    total = query.new_zeros((*query.shape[:2], key.shape[2]), dtype=torch.float32)
    if 0 in (query.shape[2], key.shape[2]):
        return total
    for block in whole_block(query, key, rules).split(product_rows(query, key)):
        total[:, :, block.columns.start : block.columns.stop] += _weights_of(query, key, block).sum(2)
    return total
