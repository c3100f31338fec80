"""Attention forward: softmax(scale·Q Kᵀ + ...) V in one pass over the keys, with an online softmax.

Method: Dao, "FlashAttention-2" (2023), https://arxiv.org/abs/2307.08691. Each program holds BLOCK_M query rows and walks
over the keys that they see: first the blocks at the left edge of the window, then the blocks that every row sees whole (no
comparison, no bounds check), then those at the right edge. The backward pass is in attention_backward.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from fastattn.block_mask import Blocks
from fastattn.dropout import dropout_threshold
from fastattn.kernels.attention_backward import backward
from fastattn.kernels.attention_config import (
    attention_backward_key_config,
    attention_backward_query_config,
    attention_forward_config,
)
from fastattn.kernels.chunks import hidden_zero, tile_offsets
from fastattn.kernels.launch import current_target, launch
from fastattn.kernels.mask_blocks import by_blocks, is_listed
from fastattn.kernels.masks import (
    BASE_2,
    BLOCK,
    LN2,
    LOG2E,
    LOWEST,
    block_list,
    capped_score,
    is_visible,
    listed,
    load_slope,
    load_tile,
    mixed_tile,
    pair_pointers,
    sequence,
    visible_range,
    with_alibi,
)
from fastattn.kernels.order import heads_together, query_block
from fastattn.kernels.random import keep_tile
from fastattn.kernels.tiles import (
    head_block,
    is_ragged,
    launch_lists,
    pair_strides,
    score_class,
    split_mask,
    strides,
    without_loose_cap,
)
from fastattn.layout import Packing, new_output
from fastattn.score_rules import ScoreRules

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["backward", "forward"]


@triton.jit
def add_keys(
    acc, l, m, q, k_ptrs, v_ptrs, mask_ptrs, bias_ptrs, slope, seed, start, in_bounds,
    batch, head, first_m, offs_m, num_keys, shift, left, right, scale, softcap, threshold, columns_qk, columns_v,
    BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys [start, start + BLOCK_N) to the running (acc, l, m). EDGE: some may be invisible to some row.

    `slope` is a number, or one per row as (BLOCK_M, 1).
    """
    offs_n = tl.arange(0, BLOCK_N)
    # [BLOCK_D, BLOCK_N]
    k = load_tile(k_ptrs, in_bounds[None, :] if EDGE else None, columns_qk)
    s = tl.dot(q, k, input_precision=PRECISION)
    if not PLAIN:
        s = capped_score(s, scale, softcap, q.dtype == tl.float32)
    if slope is not None:
        s = with_alibi(s, slope, (offs_m + shift - start)[:, None], offs_n[None, :])
    if bias_ptrs is not None:
        # [BLOCK_M, BLOCK_N]
        bias = load_tile(bias_ptrs, None, in_bounds[None, :] if EDGE else None)
        s += bias.to(tl.float32)
    if EDGE:
        x, y = (offs_m - start)[:, None], offs_n[None, :]
        s = tl.where(is_visible(x, y, num_keys - start, shift, left, right), s, float("-inf"))
    if mask_ptrs is not None:
        # [BLOCK_M, BLOCK_N]
        attend = load_tile(mask_ptrs, None, in_bounds[None, :] if EDGE else None)
        s = tl.where(attend != 0, s, float("-inf"))
    if bias_ptrs is None:  # m is in base 2, and the factor into it part of one fused multiply-add per element
        factor = scale if PLAIN else LOG2E
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        p = tl.exp2(tl.fma(s, factor, -m_new[:, None]))
        rescale = tl.exp2(m - m_new)
    else:  # m is in base e: a bias may be float32's lowest number, which in base 2 is -inf
        m_new = tl.maximum(m, tl.max(s, 1))
        if EDGE:
            p = tl.exp2((s - m_new[:, None]) * LOG2E)
        else:  # one fused multiply-add, with a product that is finite; around maxima this large p is 0 or 1 in any base
            factor = tl.where(tl.abs(m_new) < BASE_2, LOG2E, 0.5)
            p = tl.exp2(tl.fma(s, factor[:, None], (-m_new * factor)[:, None]))
        rescale = tl.exp2((m - m_new) * LOG2E)
    l = l * rescale + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(keep_tile(seed, batch, head, first_m, start, threshold, acc.shape[0], BLOCK_N), p, 0.0)
    # [BLOCK_N, BLOCK_DV]
    v = load_tile(v_ptrs, in_bounds[:, None] if EDGE else None, columns_v)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, l, m_new


@triton.jit
def finish(acc, l, m, unit, keep_scale):
    """(out, natural log-sum-exp) of the running sums. A row that sees nothing has l = 0: out 0, log-sum-exp -inf.

    unit: a 1 of m in base e.
    """
    l_safe = tl.where(l == 0, 1.0, l)  # (NaN stays NaN in both)
    return acc * (keep_scale / l_safe)[:, None], tl.where(l == 0, float("-inf"), m * unit + tl.log2(l_safe) * LN2)


@triton.jit
def _walk_keys(
    acc, l, m, q, k_ptr, k_stride, v_ptr, v_stride, mask_ptr, mask_stride, lists, bias_ptr, bias_stride, slope, seed,
    low, high, batch, head, first_m, offs_m, read_rows, num_keys, shift, left, right, scale, softcap, threshold,
    columns_qk, columns_v, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PLAIN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Adds the keys [low, high), or the blocks at these positions of a block mask's list, to the running (acc, l, m)."""
    offs_n = tl.arange(0, BLOCK_N)
    k_offsets = (offs_n[None, :] * k_stride + tl.arange(0, BLOCK_D)[:, None]).to(tl.uint32)
    v_offsets = tile_offsets(offs_n, v_stride, BLOCK_DV)
    if bias_ptr is not None:
        bias_tile = read_rows[:, None].to(tl.int64) * bias_stride[2] + offs_n[None, :].to(tl.int64) * bias_stride[3]
    if lists is not None:
        bits = (offs_m - lists[2])[:, None] * BLOCK + offs_n[None, :]
    for position in tl.range(low, high, BLOCK_N, disable_licm=not HOIST):
        start = position
        mask_ptrs = None
        if lists is not None:
            start, kind = listed(lists, position)
            if EDGE:
                mask_ptrs = mixed_tile(lists, kind) + bits + start % BLOCK
        at = tl.cast(start, tl.int64)
        if mask_ptr is not None:
            mask_ptrs = pair_pointers(mask_ptr, mask_stride, read_rows[:, None], (start + offs_n)[None, :])
        bias_ptrs = None
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + at * bias_stride[3] + bias_tile
        acc, l, m = add_keys(
            acc, l, m, q, k_ptr + at * k_stride + k_offsets, v_ptr + at * v_stride + v_offsets, mask_ptrs, bias_ptrs,
            slope, seed, start, offs_n < num_keys - start, batch, head, first_m, offs_m, num_keys,
            shift, left, right, scale, softcap, threshold, columns_qk, columns_v, BLOCK_N, PLAIN, EDGE, PRECISION,
        )  # fmt: skip
    return acc, l, m


@triton.jit(
    do_not_specialize=["together", "num_heads", "group", "num_queries", "num_keys", "left", "right", "threshold"]
)
def attention_forward(
    q_ptr, q_strides,  # (B, Hq, Nq, D)
    k_ptr, k_strides,  # (B, Hkv, Nk, D)
    v_ptr, v_strides,  # (B, Hkv, Nk, DV)
    mask_ptr, mask_strides,  # bool (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    mask_blocks,  # a block mask instead, see `launch_lists`; or None
    bias_ptr, bias_strides,  # (B, Hq, Nq, Nk), stride 0 where broadcast, or None
    slopes_ptr, slopes_strides,  # fp32 (B, Hq), or None
    sinks_ptr,  # (Hq,), or None
    seed_ptr,  # int64 (1,), or None: no dropout
    cu_q_ptr, cu_k_ptr,  # int32 (sequences + 1,): packed sequences, B is 1 and Nq and Nk their largest lengths; or None
    out_ptr, out_strides,  # (B, Hq, Nq, DV)
    lse_ptr, lse_strides,  # fp32 (B, Hq, Nq)
    scale, softcap, threshold, keep_scale, together, num_heads, group, num_queries, num_keys, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
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
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = (offs_m < num_queries)[:, None]
    read_rows = tl.minimum(offs_m, num_queries - 1)  # of a mask or bias: no comparison for rows behind the last
    shift = num_keys - num_queries

    # [BLOCK_M, BLOCK_D]
    q_ptr += b * q_strides[0] + h * q_strides[1] + start_m.to(tl.int64) * q_strides[2]
    local = tl.arange(0, BLOCK_M)[:, None]
    q = load_tile(q_ptr + local * q_strides[2] + offs_d[None, :], rows, None if D == BLOCK_D else (offs_d < D)[None, :])
    k_ptr += b * k_strides[0] + kv_h * k_strides[1]
    v_ptr += b * v_strides[0] + kv_h * v_strides[1]
    slope = None
    seed = None
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0] + h * mask_strides[1]
    if bias_ptr is not None:
        bias_ptr += b * bias_strides[0] + h * bias_strides[1]
    if slopes_ptr is not None:
        slope = load_slope(slopes_ptr, None, scale, PLAIN)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    unit = LN2 if bias_ptr is None else 1.0  # a 1 of m in base e
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks_ptr is not None:  # a sink is a first key with value 0
        sink = tl.load(sinks_ptr + head).to(tl.float32) / unit
        m = tl.maximum(m, sink)
        l = tl.exp2((sink - m) * (unit * LOG2E))

    columns_qk = None if D == BLOCK_D else (offs_d < D)[:, None]
    columns_v = None if DV == BLOCK_DV else (offs_dv < DV)[None, :]
    low, full_low, full_high, high = visible_range(start_m, num_queries, num_keys, shift, left, right, BLOCK_M, BLOCK_N)
    lists = None
    # the addresses of a mixed block's bits take as many registers as its scores, those of a mask or bias element by element half as many
    READ_N: tl.constexpr = (
        BLOCK_N if (bias_ptr is None and mask_ptr is None) or BLOCK_M * BLOCK_N <= 4096 else BLOCK_N // 2
    )
    EDGE_N: tl.constexpr = 32 if mask_blocks is not None and BLOCK_N > 32 else READ_N
    if mask_blocks is not None:  # without a left or right bound, full_low is 0
        full_high, high, lists = block_list(mask_blocks, batch, head, start_m)
    if left is not None:
        acc, l, m = _walk_keys(
            acc, l, m, q, k_ptr, k_strides[2], v_ptr, v_strides[2], mask_ptr, mask_strides, lists, bias_ptr, bias_strides, slope,
            seed, low, tl.minimum(full_low, high), batch, head, start_m, offs_m, read_rows, num_keys, shift, left, right, scale, softcap,
            threshold, columns_qk, columns_v, BLOCK_D, BLOCK_DV, BLOCK_N, PLAIN, True, PRECISION, HOIST,
        )  # fmt: skip
    acc, l, m = _walk_keys(
        acc, l, m, q, k_ptr, k_strides[2], v_ptr, v_strides[2], mask_ptr, mask_strides, lists, bias_ptr, bias_strides, slope,
        seed, full_low, full_high, batch, head, start_m, offs_m, read_rows, num_keys, shift, left, right, scale, softcap,
        threshold, columns_qk, columns_v, BLOCK_D, BLOCK_DV, BLOCK_N, PLAIN, False, PRECISION, HOIST,
    )  # fmt: skip
    acc, l, m = _walk_keys(
        acc, l, m, q, k_ptr, k_strides[2], v_ptr, v_strides[2], mask_ptr, mask_strides, lists, bias_ptr, bias_strides, slope,
        seed, full_high, high, batch, head, start_m, offs_m, read_rows, num_keys, shift, left, right, scale, softcap,
        threshold, columns_qk, columns_v, BLOCK_D, BLOCK_DV, EDGE_N, PLAIN, True, PRECISION, HOIST,
    )  # fmt: skip

    out, lse = finish(acc, l, m, unit, keep_scale)
    number = tl.program_id(0) + hidden_zero(num_heads)
    batch, head, start_m = query_block(number, num_heads, max_queries, together, BLOCK_M)
    b, h, first = batch.to(tl.int64), head.to(tl.int64), start_m.to(tl.int64)
    if cu_q_ptr is not None:
        first_q, num_queries = sequence(cu_q_ptr, batch)
        b = 0
        first += first_q
    out_ptr += b * out_strides[0] + h * out_strides[1] + first * out_strides[2]
    lse_ptr += b * lse_strides[0] + h * lse_strides[1] + first
    again = tl.arange(0, BLOCK_M) + hidden_zero(num_heads)
    in_rows = again < num_queries - start_m
    out_ptrs = out_ptr + tile_offsets(again, out_strides[2], BLOCK_DV)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (offs_dv < DV)[None, :])
    tl.store(lse_ptr + again, lse, mask=in_rows)


def forward(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, precision: str, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse). Shapes as in `fastattn.ops.attention`; with `packing` as in `fastattn.ops.varlen`."""
    rules = by_blocks(without_loose_cap(rules, query.dtype) if rules.softcap else rules)
    plain, scores = score_class(rules)
    mask, bias, slopes, sinks, seed, scale, left, right, softcap, dropout_p = rules
    mask, blocks = split_mask(mask)
    batch, heads, num_queries, head_dim = query.shape
    num_keys, value_dim = value.shape[2:]
    block_d, block_dv = head_block(head_dim), head_block(value_dim)
    out = new_output(query, value_dim)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if packing is not None:  # rows behind the last sequence belong to no program
        batch, num_queries, num_keys = packing.cu_seqlens_q.numel() - 1, packing.max_seqlen_q, packing.max_seqlen_k
        out.zero_()
        lse.fill_(float("-inf"))
    if heads == 0:
        return out, lse
    itemsize = query.element_size()
    head_bytes = num_keys * (head_dim + value_dim) * itemsize // (heads // key.shape[1])
    together = heads_together(batch * heads, head_bytes, left, right, blocks is not None)
    config = attention_forward_config(
        current_target(), max(block_d, block_dv), itemsize, scores, blocks is not None,
        is_ragged(head_dim, value_dim), packing is not None,
    )  # fmt: skip
    arguments: tuple[Any, ...] = (
        query, strides(query), key, strides(key), value, strides(value), mask, pair_strides(mask),
        launch_lists(blocks), bias, pair_strides(bias),
        slopes, strides(slopes), sinks, seed, *((None, None) if packing is None else packing[:2]),
        out, strides(out), lse, lse.stride(),
        scale * LOG2E.value if plain else scale, softcap or None, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        together, heads, heads // key.shape[1], num_queries, num_keys, left, right,
    )  # fmt: skip
    launch(
        attention_forward, (batch * heads * triton.cdiv(num_queries, config.block_m),), *arguments,
        D=head_dim, DV=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PLAIN=plain, PRECISION=precision, HOIST=config.hoist, num_warps=config.num_warps, num_stages=config.num_stages, max_registers=config.max_registers,
    )  # fmt: skip
    return out, lse


def explain(query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules) -> list[str]:
    """The tiles that the kernels of this call would use."""
    blocks = rules.mask is not None and is_listed(rules.mask)
    _, scores = score_class(rules)
    target, width = current_target(), max(head_block(query.shape[3]), head_block(value.shape[3]))
    configs: dict[str, Any] = {
        "forward": attention_forward_config,
        "backward, dQ": attention_backward_query_config,
        "backward, dK and dV": partial(attention_backward_key_config, grouped=query.shape[1] > key.shape[1]),
    }
    lines = [f"target {target.backend}" + (f" sm_{target.arch}" if target.arch else "")]
    if blocks and not isinstance(rules.mask, Blocks):
        lines.append(
            "mask: read once for its blocks of 128 x 128 pairs; empty ones are skipped, full ones need no mask"
        )
    for name, choose in configs.items():
        ragged = is_ragged(query.shape[3], value.shape[3])
        config = choose(target, width, query.element_size(), scores, blocks=blocks, ragged=ragged)
        tile = f"{config.block_m} rows x {config.block_n} keys"
        lines.append(f"{name}: {tile} a step, {config.num_warps} warps, {config.num_stages} stages")
    return lines
