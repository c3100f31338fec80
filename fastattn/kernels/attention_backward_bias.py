"""The gradient of attention's bias, in the bias's own shape: no atomics, a fixed order of summation."""

import triton
import triton.language as tl

from fastattn.kernels.masks import (
    BLOCK,
    EMPTY,
    block_kind,
    is_visible,
    load_slope,
    load_tile,
    mixed_tile,
    visible_range,
)
from fastattn.kernels.random import keep_tile
from fastattn.kernels.recompute import load_pair, probability, row_statistics, score_gradient


@triton.jit(do_not_specialize=[
    "num_heads", "group", "num_queries", "num_keys", "left", "right", "threshold",
    "bias_heads", "batches", "heads", "row_blocks", "column_blocks",
])  # fmt: skip
def attention_backward_bias(
    q_ptr, q_strides,  # (B, Hq, Nq, D)
    k_ptr, k_strides,  # (B, Hkv, Nk, D)
    v_ptr, v_strides,  # (B, Hkv, Nk, DV)
    mask_ptr, mask_strides,  # bool (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    mask_blocks,  # a block mask instead, see `block_kinds`; or None
    bias_ptr, bias_strides,  # (B, Hq, Nq, Nk), stride 0 where broadcast
    slopes_ptr, slopes_strides,  # fp32 (B, Hq), or None
    seed_ptr,  # int64 (1,), or None
    do_ptr, do_strides,  # (B, Hq, Nq, DV)
    statistics_ptr,  # fp32 (B, Hq, 2, Nq padded): minus the LSE, and minus delta
    dbias_ptr, dbias_strides,  # the shape of the bias; stride 0 where it broadcasts
    score_scale, scale, softcap, threshold, keep_scale, num_heads, group, num_queries, num_keys, left, right,
    bias_heads, batches, heads, row_blocks, column_blocks,  # heads of the bias; what one program sums over
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dBias of one tile: dS summed over every batch, head, row and column that the bias is broadcast to."""
    first_m = tl.program_id(1) * BLOCK_M
    first_n = tl.program_id(2) * BLOCK_N
    bias_b = tl.program_id(0) // bias_heads
    bias_h = tl.program_id(0) % bias_heads
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    columns_qk = None if D == BLOCK_D else offs_d < D
    columns_v = None if DV == BLOCK_DV else offs_dv < DV
    shift = num_keys - num_queries
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(batches * heads * row_blocks * column_blocks):
        start_n = first_n + step % column_blocks * BLOCK_N
        start_m = first_m + step // column_blocks % row_blocks * BLOCK_M
        head = bias_h + step // (column_blocks * row_blocks) % heads
        batch = bias_b + step // (column_blocks * row_blocks * heads)
        low, _full_low, _full_high, high = visible_range(
            start_m, num_queries, num_keys, shift, left, right, BLOCK_M, BLOCK_N
        )
        seen = (start_n < high) & (start_n + BLOCK_N > low)
        kind = 0
        if mask_blocks is not None:
            kind = block_kind(mask_blocks, batch, head, start_m, start_n)
            seen &= kind != EMPTY
        if seen:
            b, h, kv_h = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            offs_n = start_n + tl.arange(0, BLOCK_N)
            rows = (offs_m < num_queries)[:, None]
            columns = (offs_n < num_keys)[None, :]
            keys_ok = (offs_n < num_keys)[:, None]
            m64 = offs_m.to(tl.int64)[:, None]
            n64 = offs_n.to(tl.int64)[:, None]
            # [BLOCK_M, D]
            q = load_tile(q_ptr + b * q_strides[0] + h * q_strides[1] + m64 * q_strides[2] + offs_d, rows, columns_qk)
            # [BLOCK_M, DV]
            do = load_tile(
                do_ptr + b * do_strides[0] + h * do_strides[1] + m64 * do_strides[2] + offs_dv, rows, columns_v
            )
            # [BLOCK_N, D]
            k = load_tile(
                k_ptr + b * k_strides[0] + kv_h * k_strides[1] + n64 * k_strides[2] + offs_d, keys_ok, columns_qk
            )
            # [BLOCK_N, DV]
            v = load_tile(
                v_ptr + b * v_strides[0] + kv_h * v_strides[1] + n64 * v_strides[2] + offs_dv, keys_ok, columns_v
            )
            lse_head, delta_head = row_statistics(statistics_ptr, b * num_heads + h, num_queries, STATISTICS)
            minus_lse = tl.load(lse_head + offs_m, mask=offs_m < num_queries, other=float("-inf"))
            minus_delta = tl.load(delta_head + offs_m, mask=offs_m < num_queries, other=0.0)
            mask = None
            slope = None
            kept = None
            if mask_ptr is not None:
                mask_head = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
                mask = load_pair(mask_head, mask_strides, offs_m[:, None], offs_n[None, :], rows, columns)
            if mask_blocks is not None:
                local = (offs_m % BLOCK)[:, None] * BLOCK + (offs_n % BLOCK)[None, :]
                bits = mixed_tile(mask_blocks, tl.maximum(kind, 0)) + local
                mask = tl.load(bits, mask=(kind >= 0) & rows & columns, other=1)
            bias_head = bias_ptr + b * bias_strides[0] + h * bias_strides[1]
            bias = load_pair(bias_head, bias_strides, offs_m[:, None], offs_n[None, :], rows, columns).to(tl.float32)
            if slopes_ptr is not None:
                slope = load_slope(slopes_ptr + b * slopes_strides[0] + h * slopes_strides[1], None, score_scale, PLAIN)
            visible = is_visible(offs_m[:, None], offs_n[None, :], num_keys, shift, left, right)
            product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p, capped = probability(
                product, minus_lse[:, None], mask, bias, slope, (offs_m + shift)[:, None], offs_n[None, :], visible, score_scale, softcap, PLAIN,
                q.dtype == tl.float32,
            )  # fmt: skip
            if seed_ptr is not None:
                kept = keep_tile(seed, batch, head, start_m, start_n, threshold, BLOCK_M, BLOCK_N)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds, _dx = score_gradient(p, dp, minus_delta[:, None], capped, kept, keep_scale, softcap)
            total += ds
    dbias_ptr += bias_b.to(tl.int64) * dbias_strides[0] + bias_h.to(tl.int64) * dbias_strides[1]
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    rows = offs_m < (1 if SUM_ROWS else num_queries)
    columns = offs_n < (1 if SUM_COLUMNS else num_keys)
    if SUM_ROWS:
        total = tl.where((offs_m == 0)[:, None], tl.sum(total, 0)[None, :], 0.0)
    if SUM_COLUMNS:
        total = tl.where((offs_n == 0)[None, :], tl.sum(total, 1)[:, None], 0.0)
    pointers = (
        dbias_ptr + offs_m.to(tl.int64)[:, None] * dbias_strides[2] + offs_n.to(tl.int64)[None, :] * dbias_strides[3]
    )
    tl.store(pointers, total.to(dbias_ptr.dtype.element_ty), mask=rows[:, None] & columns[None, :])
