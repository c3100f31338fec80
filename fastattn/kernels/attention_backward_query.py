"""Attention's dQ, and the statistics of the rows that the other passes read. The equations stand in attention_backward.py."""

import triton
import triton.language as tl

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
from fastattn.kernels.order import query_block
from fastattn.kernels.random import keep_tile
from fastattn.kernels.recompute import first_statistic, load_pair, probability, row_statistics, score_gradient


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


@triton.jit(do_not_specialize=[
    "statistics_blocks", "together", "num_heads", "group", "num_queries", "num_keys", "left", "right", "threshold",
])  # fmt: skip
def attention_backward_query(
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
    statistics_blocks,  # None; of packed sequences the blocks of rows that a head has
    dq_ptr, dq_strides,  # (B, Hq, Nq, D)
    score_scale, scale, softcap, threshold, keep_scale, together, num_heads, group, num_queries, num_keys, left, right,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """dQ of one block of rows; stores the rows' statistics for the other passes."""
    batch, head, start_m = query_block(tl.program_id(0), num_heads, num_queries, together, BLOCK_M)
    max_queries = num_queries
    b, h, kv_h = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
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
        statistics_ptr += first_statistic(first_q, batch, STATISTICS)
        lse_rows, delta_rows = row_statistics(statistics_ptr, head, statistics_blocks * STATISTICS, STATISTICS)
    else:
        lse_rows, delta_rows = row_statistics(statistics_ptr, batch * num_heads + head, num_queries, STATISTICS)
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
