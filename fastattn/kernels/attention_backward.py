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
import triton.language as tl

from fastattn.block_mask import Blocks
from fastattn.dropout import dropout_threshold
from fastattn.kernels.attention_bias import attention_backward_bias
from fastattn.kernels.chunks import (
    dot_add,
    dot_transposed,
    hidden_zero,
    load_chunks,
    row_products,
    store_chunks,
    tile_offsets,
    zero_chunks,
)
from fastattn.kernels.config import (
    AttentionConfig,
    attention_backward_bias_config,
    attention_backward_key_config,
    attention_backward_query_config,
)
from fastattn.kernels.launch import current_target, launch
from fastattn.kernels.mask_blocks import by_blocks
from fastattn.kernels.masks import (
    BLOCK,
    LOG2E,
    block_list,
    is_visible,
    listed,
    load_slope,
    load_tile,
    mixed_tile,
    pair_pointers,
    sequence,
    visible_range,
)
from fastattn.kernels.order import heads_together, key_block, query_block
from fastattn.kernels.random import keep_tile
from fastattn.kernels.recompute import STATISTICS, load_pair, probability, row_statistics, score_gradient
from fastattn.kernels.tiles import (
    block_kinds,
    head_block,
    is_ragged,
    launch_lists,
    pair_strides,
    score_class,
    split_mask,
    strides,
)
from fastattn.layout import Packing, new_gradient

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _walk_keys(
    dq, q, do, minus_lse, minus_delta, k_ptr, k_stride, v_ptr, v_stride, mask_ptr, mask_stride, lists, bias_ptr, bias_stride, slope, seed,
    low, high, batch, head, first_m, offs_m, rows, num_keys, shift, left, right, scale, softcap, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    PLAIN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Adds the keys [low, high), or the blocks at these positions of a block mask's list, to dQ / scale of a block of rows."""
    offs_n = tl.arange(0, BLOCK_N)
    k_offsets = tile_offsets(offs_n, k_stride, CHUNK)
    v_offsets = tile_offsets(offs_n, v_stride, CHUNK_V)
    if lists is not None:
        bits = (offs_m - lists[2])[:, None] * BLOCK + offs_n[None, :]
    for position in tl.range(low, high, BLOCK_N, disable_licm=not HOIST):
        start = position
        mask_ptrs = None
        if lists is not None:
            start, kind = listed(lists, position)
            if EDGE:
                mask_ptrs = mixed_tile(lists, kind) + bits + start % BLOCK
        in_bounds = offs_n < num_keys - start
        if not HOIST:
            again = offs_n + hidden_zero(num_keys - start)
            k_offsets = tile_offsets(again, k_stride, CHUNK)
            v_offsets = tile_offsets(again, v_stride, CHUNK_V)
        visible = None
        columns_ok = None
        keys_ok = None
        if EDGE:
            visible = is_visible((offs_m - start)[:, None], offs_n[None, :], num_keys - start, shift, left, right)
            columns_ok = in_bounds[None, :]
            keys_ok = in_bounds[:, None]
        columns = (start + offs_n)[None, :]
        at = tl.cast(start, tl.int64)
        # [BLOCK_N, D]
        k = load_chunks(k_ptr + at * k_stride + k_offsets, keys_ok, D, CHUNK)
        # [BLOCK_N, DV]
        v = load_chunks(v_ptr + at * v_stride + v_offsets, keys_ok, DV, CHUNK_V)
        # [BLOCK_M, BLOCK_N] each
        if mask_ptr is not None:
            mask_ptrs = pair_pointers(mask_ptr, mask_stride, offs_m[:, None], columns)
        mask = None
        if mask_ptrs is not None:
            mask = load_tile(mask_ptrs, rows, columns_ok)
        bias = None
        if bias_ptr is not None:
            bias = load_pair(bias_ptr, bias_stride, offs_m[:, None], columns, rows, columns_ok).to(tl.float32)
        product = dot_transposed(q, k, None, PRECISION)
        p, capped = probability(
            product, minus_lse[:, None], mask, bias, slope, (offs_m + shift - start)[:, None], offs_n[None, :], visible, scale, softcap, PLAIN,
            q[0].dtype == tl.float32,
        )  # fmt: skip
        kept = None
        if seed is not None:
            kept = keep_tile(seed, batch, head, first_m, start, threshold, rows.shape[0], BLOCK_N)
        dp = dot_transposed(do, v, None, PRECISION)
        _ds, dx = score_gradient(p, dp, minus_delta[:, None], capped, kept, keep_scale, softcap)
        dq = dot_add(dx, k, dq, PRECISION)
    return dq


@triton.jit(
    do_not_specialize=["together", "num_heads", "group", "num_queries", "num_keys", "left", "right", "threshold"]
)
def _attention_backward_query(
    q_ptr, q_strides,  # (B, Hq, Nq, D)
    k_ptr, k_strides,  # (B, Hkv, Nk, D)
    v_ptr, v_strides,  # (B, Hkv, Nk, DV)
    mask_ptr, mask_strides,  # bool (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    mask_blocks,  # a block mask instead, see `launch_lists`; or None
    bias_ptr, bias_strides,  # (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    slopes_ptr, slopes_strides,  # fp32 (B, Hq), or None
    seed_ptr,  # int64 (1,), or None
    cu_q_ptr, cu_k_ptr,  # int32 (sequences + 1,): packed sequences, as in the forward; or None
    out_ptr, out_strides, do_ptr, do_strides,  # (B, Hq, Nq, DV)
    lse_ptr, dlse_ptr, lse_strides,  # fp32 (B, Hq, Nq); dlse may be None
    statistics_ptr,  # fp32 (B, Hq, 2, Nq padded): minus the LSE, -inf where a row sees nothing, and minus delta
    dq_ptr, dq_strides,  # (B, Hq, Nq, D)
    score_scale, scale, softcap, threshold, keep_scale, together, num_heads, group, num_queries, num_keys, left, right,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """dQ of one block of rows; stores the rows' statistics for the other passes."""
    batch, head, start_m = query_block(tl.program_id(0), num_heads, num_queries, together, BLOCK_M)
    batch_head = batch * num_heads + head
    max_queries = num_queries
    b, h, kv_h = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    lse_rows, delta_rows = row_statistics(statistics_ptr, batch_head, num_queries, STATISTICS)
    if slopes_ptr is not None:
        slopes_ptr += b * slopes_strides[0] + h * slopes_strides[1]
    if cu_q_ptr is not None:
        first_q, num_queries = sequence(cu_q_ptr, batch)
        first_k, num_keys = sequence(cu_k_ptr, batch)
        if start_m >= num_queries:
            return
        b = 0
        q_ptr += first_q * q_strides[2]
        k_ptr += first_k * k_strides[2]
        v_ptr += first_k * v_strides[2]
        out_ptr += first_q * out_strides[2]
        do_ptr += first_q * do_strides[2]
        lse_ptr += first_q
        if dlse_ptr is not None:
            dlse_ptr += first_q
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, CHUNK)
    offs_dv = tl.arange(0, CHUNK_V)
    in_bounds = offs_m < num_queries
    rows = in_bounds[:, None]
    shift = num_keys - num_queries
    m = start_m.to(tl.int64)
    local = tl.arange(0, BLOCK_M)[:, None]

    # [BLOCK_M, D]
    q_ptr += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    q = load_chunks(q_ptr + local * q_strides[2] + offs_d[None, :], rows, D, CHUNK)
    # [BLOCK_M, DV]
    out_ptr += b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
    o = load_chunks(out_ptr + local * out_strides[2] + offs_dv[None, :], rows, DV, CHUNK_V)
    do_ptr += b * do_strides[0] + h * do_strides[1] + m * do_strides[2]
    do = load_chunks(do_ptr + local * do_strides[2] + offs_dv[None, :], rows, DV, CHUNK_V)
    row_offsets = b * lse_strides[0] + h * lse_strides[1] + offs_m
    minus_delta = -row_products(o, do)
    if dlse_ptr is not None:
        minus_delta += tl.load(dlse_ptr + row_offsets, mask=in_bounds, other=0.0)
    lse = tl.load(lse_ptr + row_offsets, mask=in_bounds, other=float("-inf"))
    minus_lse = tl.where(lse == float("-inf"), lse, -lse)  # a row that sees nothing: P = 0
    if bias_ptr is None:
        minus_lse *= LOG2E
    tl.store(lse_rows + offs_m, minus_lse / score_scale if PLAIN else minus_lse, mask=in_bounds)
    tl.store(delta_rows + offs_m, minus_delta, mask=in_bounds)

    k_ptr += b * k_strides[0] + kv_h * k_strides[1]
    v_ptr += b * v_strides[0] + kv_h * v_strides[1]
    slope = None
    seed = None
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0] + h * mask_strides[1]
    if bias_ptr is not None:
        bias_ptr += b * bias_strides[0] + h * bias_strides[1]
    if slopes_ptr is not None:
        slope = load_slope(slopes_ptr, None, score_scale, PLAIN)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    EDGE_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 32 else BLOCK_N
    dq = zero_chunks(BLOCK_M, D, CHUNK)
    low, full_low, full_high, high = visible_range(start_m, num_queries, num_keys, shift, left, right, BLOCK_M, BLOCK_N)
    lists = None
    if mask_blocks is not None:  # without a left or right bound, full_low is 0
        full_high, high, lists = block_list(mask_blocks, batch, head, start_m)
    if left is not None:
        dq = _walk_keys(
            dq, q, do, minus_lse, minus_delta, k_ptr, k_strides[2], v_ptr, v_strides[2], mask_ptr, mask_strides, lists, bias_ptr,
            bias_strides, slope, seed, low, tl.minimum(full_low, high), batch, head, start_m, offs_m, rows, num_keys, shift, left,
            right, score_scale, softcap, threshold, keep_scale, D, DV, CHUNK, CHUNK_V, EDGE_N, PLAIN,
            True, PRECISION, HOIST,
        )  # fmt: skip
    dq = _walk_keys(
        dq, q, do, minus_lse, minus_delta, k_ptr, k_strides[2], v_ptr, v_strides[2], mask_ptr, mask_strides, lists, bias_ptr,
        bias_strides, slope, seed, full_low, full_high, batch, head, start_m, offs_m, rows, num_keys, shift, left,
        right, score_scale, softcap, threshold, keep_scale, D, DV, CHUNK, CHUNK_V, BLOCK_N, PLAIN,
        False, PRECISION, HOIST,
    )  # fmt: skip
    dq = _walk_keys(
        dq, q, do, minus_lse, minus_delta, k_ptr, k_strides[2], v_ptr, v_strides[2], mask_ptr, mask_strides, lists, bias_ptr,
        bias_strides, slope, seed, full_high, high, batch, head, start_m, offs_m, rows, num_keys, shift, left,
        right, score_scale, softcap, threshold, keep_scale, D, DV, CHUNK, CHUNK_V, EDGE_N, PLAIN,
        True, PRECISION, HOIST,
    )  # fmt: skip
    number = tl.program_id(0) + hidden_zero(num_heads)
    batch, head, start_m = query_block(number, num_heads, max_queries, together, BLOCK_M)
    b, h, m = batch.to(tl.int64), head.to(tl.int64), start_m.to(tl.int64)
    if cu_q_ptr is not None:
        first_q, num_queries = sequence(cu_q_ptr, batch)
        b = 0
        m += first_q
    dq_ptr += b * dq_strides[0] + h * dq_strides[1] + m * dq_strides[2]
    again = tl.arange(0, BLOCK_M) + hidden_zero(num_heads)
    rows = (again < num_queries - start_m)[:, None]
    store_chunks(dq_ptr + tile_offsets(again, dq_strides[2], CHUNK), dq, scale, rows, D, CHUNK)


@triton.jit
def _walk_queries(
    dk, dv, k, v, q_ptr, q_stride, do_ptr, do_stride, lse_ptr, delta_ptr, mask_ptr, mask_stride, lists, bias_ptr, bias_stride,
    slope, seed, low, high, batch, head, first_n, offs_n, columns_ok, num_queries, shift, left, right, scale, softcap, threshold,
    keep_scale, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Adds the query rows [low, high), or the blocks at these positions of a block mask's list, to dK / scale and dV of one
    block of keys, as transposed tiles (K Qᵀ)."""
    offs_m = tl.arange(0, BLOCK_M)
    q_offsets = tile_offsets(offs_m, q_stride, CHUNK)
    do_offsets = tile_offsets(offs_m, do_stride, CHUNK_V)
    if lists is not None:
        bits = (offs_n - lists[2])[:, None] + offs_m[None, :] * BLOCK
    for position in tl.range(low, high, BLOCK_M, disable_licm=not HOIST):
        start = position
        mask_ptrs = None
        if lists is not None:
            start, kind = listed(lists, position)
            if EDGE:
                mask_ptrs = mixed_tile(lists, kind) + bits + start % BLOCK * BLOCK
        in_bounds = offs_m < num_queries - start
        if not HOIST:
            again = offs_m + hidden_zero(num_queries - start)
            q_offsets = tile_offsets(again, q_stride, CHUNK)
            do_offsets = tile_offsets(again, do_stride, CHUNK_V)
        visible = None
        rows = None
        queries_ok = None
        if EDGE:
            # a key sees the queries as a query sees the keys, with the sides exchanged
            visible = is_visible((offs_n - start)[:, None], offs_m[None, :], num_queries - start, -shift, right, left)
            rows = in_bounds[None, :]
            queries_ok = in_bounds[:, None]
        queries = (start + offs_m)[None, :]
        at = tl.cast(start, tl.int64)
        # [BLOCK_M, D]
        q = load_chunks(q_ptr + at * q_stride + q_offsets, queries_ok, D, CHUNK)
        # [BLOCK_M, DV]
        do = load_chunks(do_ptr + at * do_stride + do_offsets, queries_ok, DV, CHUNK_V)
        if EDGE:
            minus_lse = tl.load(lse_ptr + at + offs_m, mask=in_bounds, other=float("-inf"))[None, :]
            minus_delta = tl.load(delta_ptr + at + offs_m, mask=in_bounds, other=0.0)[None, :]
        else:
            minus_lse = tl.load(lse_ptr + at + offs_m)[None, :]
            minus_delta = tl.load(delta_ptr + at + offs_m)[None, :]
        # [BLOCK_N, BLOCK_M] each
        if mask_ptr is not None:
            mask_ptrs = pair_pointers(mask_ptr, mask_stride, queries, offs_n[:, None])
        mask = None
        if mask_ptrs is not None:
            mask = load_tile(mask_ptrs, rows, columns_ok)
        bias = None
        if bias_ptr is not None:
            bias = load_pair(bias_ptr, bias_stride, queries, offs_n[:, None], rows, columns_ok).to(tl.float32)
        product = dot_transposed(k, q, minus_lse if PLAIN else None, PRECISION)
        p, capped = probability(
            product, None if PLAIN else minus_lse, mask, bias, slope, (offs_n - shift - start)[:, None], offs_m[None, :], visible, scale, softcap, PLAIN,
            q[0].dtype == tl.float32,
        )  # fmt: skip
        kept = None
        p_kept = p
        if seed is not None:
            kept = keep_tile(
                seed, batch, head, start, first_n, threshold, BLOCK_M, columns_ok.shape[0], COLUMNS_FIRST=True
            )
            p_kept = tl.where(kept, p * keep_scale, 0.0)
        dv = dot_add(p_kept, do, dv, PRECISION)
        dp = dot_transposed(v, do, minus_delta if seed is None else None, PRECISION)
        _ds, dx = score_gradient(p, dp, None if seed is None else minus_delta, capped, kept, keep_scale, softcap)
        dk = dot_add(dx, q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["together", "num_kv_heads", "num_queries", "num_keys", "left", "right", "threshold"])
def _attention_backward_key(
    q_ptr, q_strides,  # (B, Hq, Nq, D)
    k_ptr, k_strides,  # (B, Hkv, Nk, D)
    v_ptr, v_strides,  # (B, Hkv, Nk, DV)
    mask_ptr, mask_strides,  # bool (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    mask_blocks,  # a block mask instead, see `launch_lists`; or None
    bias_ptr, bias_strides,  # (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    slopes_ptr, slopes_strides,  # fp32 (B, Hq), or None
    seed_ptr,  # int64 (1,), or None
    cu_q_ptr, cu_k_ptr,  # int32 (sequences + 1,), or None
    do_ptr, do_strides,  # (B, Hq, Nq, DV)
    statistics_ptr,  # fp32 (B, Hq, 2, Nq padded): minus the LSE, and minus delta
    dk_ptr, dk_strides,  # (B, Hkv, Nk, D)
    dv_ptr, dv_strides,  # (B, Hkv, Nk, DV)
    score_scale, scale, softcap, threshold, keep_scale, together, num_kv_heads, num_queries, num_keys, left, right,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys: the sum over the query heads that share it, in a fixed order."""
    batch, kv_head, start_n = key_block(tl.program_id(0), num_kv_heads, num_keys, together, BLOCK_N)
    b, kv_h = batch.to(tl.int64), kv_head.to(tl.int64)
    num_heads = num_kv_heads * GROUP
    max_queries, max_keys = num_queries, num_keys
    if cu_q_ptr is not None:
        first_q, num_queries = sequence(cu_q_ptr, batch)
        first_k, num_keys = sequence(cu_k_ptr, batch)
        if start_n >= num_keys:
            return
        b = 0
        q_ptr += first_q * q_strides[2]
        do_ptr += first_q * do_strides[2]
        k_ptr += first_k * k_strides[2]
        v_ptr += first_k * v_strides[2]
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, CHUNK)
    offs_dv = tl.arange(0, CHUNK_V)
    columns_ok = (offs_n < num_keys)[:, None]
    shift = num_keys - num_queries
    n = start_n.to(tl.int64)
    local = tl.arange(0, BLOCK_N)[:, None]

    # [BLOCK_N, D]
    k_ptr += b * k_strides[0] + kv_h * k_strides[1] + n * k_strides[2]
    k = load_chunks(k_ptr + local * k_strides[2] + offs_d[None, :], columns_ok, D, CHUNK)
    # [BLOCK_N, DV]
    v_ptr += b * v_strides[0] + kv_h * v_strides[1] + n * v_strides[2]
    v = load_chunks(v_ptr + local * v_strides[2] + offs_dv[None, :], columns_ok, DV, CHUNK_V)
    EDGE_M: tl.constexpr = BLOCK_M // 2 if BLOCK_M > 32 else BLOCK_M
    dk = zero_chunks(BLOCK_N, D, CHUNK)
    dv = zero_chunks(BLOCK_N, DV, CHUNK_V)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        h = head.to(tl.int64)
        first = start_n + hidden_zero(head)
        offs_n = first + tl.arange(0, BLOCK_N)
        low, full_low, full_high, high = visible_range(
            first, num_keys, num_queries, -shift, right, left, BLOCK_N, BLOCK_M
        )
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        do_head = do_ptr + b * do_strides[0] + h * do_strides[1]
        lse_head, delta_head = row_statistics(statistics_ptr, batch * num_heads + head, max_queries, STATISTICS)
        mask_head = None
        bias_head = None
        slope = None
        if mask_ptr is not None:
            mask_head = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
        if bias_ptr is not None:
            bias_head = bias_ptr + b * bias_strides[0] + h * bias_strides[1]
        if slopes_ptr is not None:
            slope = load_slope(
                slopes_ptr + batch.to(tl.int64) * slopes_strides[0] + h * slopes_strides[1], None, score_scale, PLAIN
            )
        lists = None
        if mask_blocks is not None:
            full_high, high, lists = block_list(mask_blocks, batch, head, start_n)
        if right is not None:
            dk, dv = _walk_queries(
                dk, dv, k, v, q_head, q_strides[2], do_head, do_strides[2], lse_head, delta_head,
                mask_head, mask_strides, lists, bias_head, bias_strides, slope, seed, low, tl.minimum(full_low, high), batch, head,
                first, offs_n, columns_ok, num_queries, shift, left, right, score_scale, softcap, threshold, keep_scale,
                D, DV, CHUNK, CHUNK_V, EDGE_M, PLAIN, True, PRECISION, HOIST,
            )  # fmt: skip
        dk, dv = _walk_queries(
            dk, dv, k, v, q_head, q_strides[2], do_head, do_strides[2], lse_head, delta_head,
            mask_head, mask_strides, lists, bias_head, bias_strides, slope, seed, full_low, full_high, batch, head,
            first, offs_n, columns_ok, num_queries, shift, left, right, score_scale, softcap, threshold, keep_scale,
            D, DV, CHUNK, CHUNK_V, BLOCK_M, PLAIN, False, PRECISION, HOIST,
        )  # fmt: skip
        dk, dv = _walk_queries(
            dk, dv, k, v, q_head, q_strides[2], do_head, do_strides[2], lse_head, delta_head,
            mask_head, mask_strides, lists, bias_head, bias_strides, slope, seed, full_high, high, batch, head,
            first, offs_n, columns_ok, num_queries, shift, left, right, score_scale, softcap, threshold, keep_scale,
            D, DV, CHUNK, CHUNK_V, EDGE_M, PLAIN, True, PRECISION, HOIST,
        )  # fmt: skip
    number = tl.program_id(0) + hidden_zero(num_kv_heads)
    batch, kv_head, start_n = key_block(number, num_kv_heads, max_keys, together, BLOCK_N)
    b, kv_h, n = batch.to(tl.int64), kv_head.to(tl.int64), start_n.to(tl.int64)
    if cu_k_ptr is not None:
        first_k, num_keys = sequence(cu_k_ptr, batch)
        b = 0
        n += first_k
    dk_ptr += b * dk_strides[0] + kv_h * dk_strides[1] + n * dk_strides[2]
    dv_ptr += b * dv_strides[0] + kv_h * dv_strides[1] + n * dv_strides[2]
    again = tl.arange(0, BLOCK_N) + hidden_zero(num_kv_heads)
    columns_ok = (again < num_keys - start_n)[:, None]
    store_chunks(dk_ptr + tile_offsets(again, dk_strides[2], CHUNK), dk, scale, columns_ok, D, CHUNK)
    store_chunks(dv_ptr + tile_offsets(again, dv_strides[2], CHUNK_V), dv, 1.0, columns_ok, DV, CHUNK_V)


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
    mask: Tensor | Blocks | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    scale: float, window_left: int | None, window_right: int | None, softcap: float, dropout_p: float,
    need_bias: bool, need_sinks: bool, precision: str, packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_bias, grad_sinks); the last two None where not needed."""
    if mask is not None:
        mask, window_left, window_right = by_blocks(mask, window_left, window_right)
    given_mask, (mask, blocks) = mask, split_mask(mask)
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    kv_heads = key.shape[1]
    block_d, block_dv = head_block(head_dim), head_block(value_dim)
    target, width, ragged = current_target(), max(block_d, block_dv), is_ragged(head_dim, value_dim)
    plain, scores = score_class(given_mask, bias, alibi_slopes, seed, scale, softcap, window_left)
    grad_query, grad_key, grad_value = map(new_gradient, (query, key, value))
    if packing is not None:  # rows behind the last sequence belong to no program
        batch, num_queries, num_keys = packing.cu_seqlens_q.numel() - 1, packing.max_seqlen_q, packing.max_seqlen_k
        for gradient in (grad_query, grad_key, grad_value):
            gradient.zero_()
    statistics = lse.new_empty((batch, heads, 2, triton.cdiv(num_queries, STATISTICS) * STATISTICS))
    grad_bias = None if bias is None or not need_bias else bias.new_empty(bias.shape)
    grad_sinks = None

    def inputs(lists: tuple[Any, ...] | None) -> tuple[Any, ...]:
        return (
            query, strides(query), key, strides(key), value, strides(value), mask, pair_strides(mask), lists, bias,
            pair_strides(bias), alibi_slopes, strides(alibi_slopes), seed,
        )  # fmt: skip

    scalars: tuple[Any, ...] = (
        scale * LOG2E.value if plain else scale, scale, softcap or None, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    sequences: tuple[Any, ...] = (None, None) if packing is None else packing[:2]
    group = heads // kv_heads
    lengths: tuple[Any, ...] = (num_queries, num_keys, window_left, window_right)
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
    together = heads_together(
        batch * heads, num_keys * (head_dim + value_dim) * itemsize // group, window_left, window_right, listed
    )
    config = attention_backward_query_config(target, width, itemsize, scores, listed, ragged)
    launch(
        _attention_backward_query, (batch * heads * triton.cdiv(num_queries, config.block_m),), *inputs(launch_lists(blocks)), *sequences, out,
        strides(out), grad_out, strides(grad_out), lse, grad_lse, lse.stride(), statistics, grad_query, strides(grad_query),
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
        batch * kv_heads, num_queries * group * (head_dim + value_dim) * itemsize, window_left, window_right, listed
    )
    config = attention_backward_key_config(
        target, width, itemsize, scores, packing is not None, listed, ragged, group > 1
    )
    launch(
        _attention_backward_key, (batch * kv_heads * triton.cdiv(num_keys, config.block_n),), *inputs(launch_lists(blocks, by_column=True)), *sequences, grad_out,
        strides(grad_out), statistics, grad_key, strides(grad_key), grad_value, strides(grad_value), *scalars, together,
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
