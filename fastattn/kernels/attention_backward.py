"""Attention backward: dQ (and delta), then dK and dV, then dBias where asked for. No atomics: deterministic bit for bit.

With P = exp(S - LSE) recomputed tile by tile, dropout factors Z (1 / (1 - p) or 0) and O = (P ∘ Z) V:

    dV = (P ∘ Z)ᵀ dO        dP = (dO Vᵀ) ∘ Z        delta = rowsum(dO ∘ O) - dLSE
    dS = P ∘ (dP - delta)   dBias = dS              dX = dS ∘ cap'(X)         dQ = scale · dX K     dK = scale · dXᵀ Q

(Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 2; X = scale·Q Kᵀ before the softcap.)
The dQ pass stores -delta and -LSE, in base 2, with a bias in base e, or, where scores are plain, in units of q·k: the products of the
dK and dV pass begin with them instead of 0. Rows that see nothing have LSE = -inf, and it stays -inf, so that P = 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton

from fastattn.dropout import dropout_threshold
from fastattn.kernels.attention_backward_bias import attention_backward_bias
from fastattn.kernels.attention_backward_key import attention_backward_key
from fastattn.kernels.attention_backward_query import attention_backward_query
from fastattn.kernels.attention_config import (
    AttentionConfig,
    attention_backward_bias_config,
    attention_backward_key_config,
    attention_backward_query_config,
)
from fastattn.kernels.launch import current_target, launch
from fastattn.kernels.mask_blocks import by_blocks
from fastattn.kernels.masks import LOG2E
from fastattn.kernels.order import heads_together
from fastattn.kernels.recompute import STATISTICS
from fastattn.kernels.tiles import (
    block_kinds,
    head_block,
    is_ragged,
    launch_lists,
    pair_strides,
    score_class,
    split_mask,
    strides,
    without_loose_cap,
)
from fastattn.layout import Packing, new_gradient
from fastattn.score_rules import ScoreRules

if TYPE_CHECKING:
    from torch import Tensor


def _blocks(config: AttentionConfig) -> dict[str, Any]:
    return dict(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    rules: ScoreRules, need_bias: bool, need_sinks: bool, precision: str, packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_bias, grad_sinks); the last two None where not needed."""
    rules = by_blocks(without_loose_cap(rules, query.dtype) if rules.softcap else rules)
    plain, scores = score_class(rules)
    mask, bias, slopes, sinks, seed, scale, left, right, softcap, dropout_p = rules
    mask, blocks = split_mask(mask)
    batch, heads, rows, head_dim = query.shape
    num_queries, (num_keys, value_dim) = rows, value.shape[2:]
    kv_heads = key.shape[1]
    block_d, block_dv = head_block(head_dim), head_block(value_dim)
    target, width, ragged = current_target(), max(block_d, block_dv), is_ragged(head_dim, value_dim)
    grad_query, grad_key, grad_value = map(new_gradient, (query, key, value))
    if packing is not None:  # rows behind the last sequence belong to no program
        batch, num_queries, num_keys = packing.cu_seqlens_q.numel() - 1, packing.max_seqlen_q, packing.max_seqlen_k
        for gradient in (grad_query, grad_key, grad_value):
            gradient.zero_()
    if heads == 0:
        grad_bias, grad_sinks = (
            None if t is None else t.new_zeros(t.shape)
            for t in (bias if need_bias else None, sinks if need_sinks else None)
        )
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_bias, grad_sinks
    # of packed sequences as many blocks of rows as they have, not as many as the longest has for each of them
    blocks_of_rows = None if packing is None else rows // STATISTICS + batch
    samples, blocks_of_each = (
        (batch, triton.cdiv(num_queries, STATISTICS)) if blocks_of_rows is None else (1, blocks_of_rows)
    )
    statistics = lse.new_empty((samples, heads, 2, blocks_of_each * STATISTICS))
    grad_bias = None if bias is None or not need_bias else bias.new_empty(bias.shape)
    grad_sinks = None

    def inputs(lists: tuple[Any, ...] | None) -> tuple[Any, ...]:
        return (
            query, strides(query), key, strides(key), value, strides(value), mask, pair_strides(mask), lists, bias,
            pair_strides(bias), slopes, strides(slopes), seed,
        )  # fmt: skip

    scalars: tuple[Any, ...] = (
        scale * LOG2E.value if plain else scale, scale, softcap or None, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    sequences: tuple[Any, ...] = (None, None) if packing is None else packing[:2]
    group = heads // kv_heads
    lengths: tuple[Any, ...] = (num_queries, num_keys, left, right)
    constants: dict[str, Any] = dict(
        D=head_dim,
        DV=value_dim,
        PLAIN=plain,
        PRECISION=precision,
        STATISTICS=STATISTICS,
    )

    def chunks(config: AttentionConfig) -> dict[str, int]:
        return dict(CHUNK=min(config.chunk, block_d), CHUNK_V=min(config.chunk, block_dv))

    itemsize, listed = query.element_size(), blocks is not None
    together = heads_together(batch * heads, num_keys * (head_dim + value_dim) * itemsize // group, left, right, listed)
    config = attention_backward_query_config(target, width, itemsize, scores, listed, ragged)
    launch(
        attention_backward_query, (batch * heads * triton.cdiv(num_queries, config.block_m),), *inputs(launch_lists(blocks)), *sequences, out,
        strides(out), grad_out, strides(grad_out), lse, grad_lse, lse.stride(), statistics, blocks_of_rows, grad_query, strides(grad_query),
        *scalars, together, heads, group, *lengths, **chunks(config), HOIST=config.hoist, **constants, **_blocks(config),
    )  # fmt: skip
    if bias is not None and grad_bias is not None:
        config = attention_backward_bias_config(target, width, itemsize, ragged, seed is not None)
        bias_batch, bias_heads, bias_rows, bias_columns = bias.shape
        row_blocks, column_blocks = triton.cdiv(num_queries, config.block_m), triton.cdiv(num_keys, config.block_n)
        sum_rows, sum_columns = bias_rows == 1, bias_columns == 1
        launch(
            attention_backward_bias,
            (bias_batch * bias_heads, 1 if sum_rows else row_blocks, 1 if sum_columns else column_blocks), *inputs(block_kinds(blocks)),
            grad_out, strides(grad_out), statistics, grad_bias, pair_strides(grad_bias), *scalars, heads, group, *lengths,
            bias_heads, batch // bias_batch, heads // bias_heads, row_blocks if sum_rows else 1,
            column_blocks if sum_columns else 1, SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns, BLOCK_D=block_d, BLOCK_DV=block_dv, **constants, **_blocks(config),
        )  # fmt: skip
    together = heads_together(
        batch * kv_heads, num_queries * group * (head_dim + value_dim) * itemsize, left, right, listed
    )
    config = attention_backward_key_config(
        target, width, itemsize, scores, packing is not None, listed, ragged, group > 1
    )
    launch(
        attention_backward_key, (batch * kv_heads * triton.cdiv(num_keys, config.block_n),), *inputs(launch_lists(blocks, by_column=True)), *sequences, grad_out,
        strides(grad_out), statistics, blocks_of_rows, grad_key, strides(grad_key), grad_value, strides(grad_value), *scalars, together,
        kv_heads, *lengths, GROUP=group, **chunks(config), HOIST=config.hoist, **constants, **_blocks(config),
    )  # fmt: skip
    if sinks is not None and need_sinks:
        # the sink's probability exp(sink - LSE), 0 for a row that sees nothing, times -delta
        share = (sinks.float()[:, None] - lse).exp().masked_fill(lse == float("-inf"), 0.0)
        if packing is None:
            delta = -statistics[:, :, 1, :num_queries]
        else:
            delta = (grad_out.float() * out.float()).sum(-1) - (0.0 if grad_lse is None else grad_lse)
        grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_bias, grad_sinks
