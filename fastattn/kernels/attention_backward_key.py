"""Attention's dK and dV. The equations stand in attention_backward.py."""

import triton
import triton.language as tl

from fastattn.kernels.chunks import (
    dot_add,
    dot_transposed,
    hidden_zero,
    load_chunks,
    store_chunks,
    tile_offsets,
    zero_chunks,
)
from fastattn.kernels.masks import (
    BLOCK,
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
from fastattn.kernels.order import key_block
from fastattn.kernels.random import keep_tile
from fastattn.kernels.recompute import first_statistic, load_pair, probability, row_statistics, score_gradient


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


@triton.jit(do_not_specialize=[
    "statistics_blocks", "together", "num_kv_heads", "num_queries", "num_keys", "left", "right", "threshold",
])  # fmt: skip
def attention_backward_key(
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
    statistics_ptr, statistics_blocks,  # fp32 (B, Hq, 2, Nq padded): minus the LSE, and minus delta; see `attention_backward_query`
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
    max_keys = num_keys
    if cu_q_ptr is not None:
        first_q, num_queries = sequence(cu_q_ptr, batch)
        first_k, num_keys = sequence(cu_k_ptr, batch)
        if start_n >= num_keys:
            return
        b = 0
        statistics_ptr += first_statistic(first_q, batch, STATISTICS)
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
        if cu_q_ptr is not None:
            lse_head, delta_head = row_statistics(statistics_ptr, head, statistics_blocks * STATISTICS, STATISTICS)
        else:
            lse_head, delta_head = row_statistics(statistics_ptr, batch * num_heads + head, num_queries, STATISTICS)
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
