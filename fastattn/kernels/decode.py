"""Attention of a few new queries over a cache of keys and values: split over the keys, then merged.

A decoding step has too few query rows to fill a GPU, so the keys of each sequence are divided among several programs
("Flash-Decoding", Dao et al. 2023, https://pytorch.org/blog/flash-decoding/). Split s gives an output O_s and a
log-sum-exp L_s, and with L = log Σ exp(L_s) the result is Σ exp(L_s - L) O_s. The query heads that share a key head are
rows of one tile, so that the cache is read once. What a score becomes and the online softmax are those of attention.py.

Lengths are read on the device: the host never waits for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention import add_keys, finish
from fastattn.kernels.attention_config import MERGE_SPLITS, decode_config, decode_splits
from fastattn.kernels.launch import current_target, launch
from fastattn.kernels.masks import LN2, LOG2E, LOWEST, load_slope, load_tile, visible_range
from fastattn.kernels.tiles import head_block, score_class, strides, without_loose_cap
from fastattn.layout import new_output
from fastattn.score_rules import ScoreRules

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _length(lengths_ptr, batch, more, capacity):
    """Keys of a sequence: those that were in its cache and `more`, never beyond the cache's end."""
    length = more
    if lengths_ptr is not None:
        length += tl.load(lengths_ptr + batch).to(tl.int32)
    return tl.minimum(length, capacity)


@triton.jit
def _cache_rows(ptr, cache_strides, table_ptr, positions, in_bounds, page_size):
    """Pointers to the rows of a sequence's cache at `positions`; a paged cache's pages are found in `table_ptr`."""
    if table_ptr is None:
        return ptr + positions.to(tl.int64) * cache_strides[2]
    else:
        page = tl.load(table_ptr + positions // page_size, mask=in_bounds, other=0).to(tl.int64)
        return ptr + page * cache_strides[0] + (positions % page_size).to(tl.int64) * cache_strides[2]


@triton.jit(
    do_not_specialize=["kv_heads", "group", "num_queries", "more", "capacity", "page_size", "splits", "left", "right"]
)
def _decode(
    q_ptr, q_strides,  # (B, Hq, Nq, D)
    k_ptr, k_strides,  # (B, Hkv, capacity, D), or (pages, Hkv, page_size, D)
    v_ptr, v_strides,  # the same with DV
    lengths_ptr,  # int32 or int64 (B,), or None: every sequence has `more` keys
    table_ptr, table_stride,  # int32 (B, pages of a sequence), or None: not paged
    leftpad_ptr,  # int32 or int64 (B,), the rows in front of each sequence's first key, or None: 0
    slopes_ptr, slopes_strides,  # fp32 (B, Hq), or None
    sinks_ptr,  # (Hq,), or None
    out_ptr, out_strides,  # (B, Hq, Nq, DV) of each split
    lse_ptr, lse_strides,  # fp32 (B, Hq, Nq) of each split
    out_split, lse_split,  # strides from one split's result to the next one's
    scale, softcap, kv_heads, group, num_queries, more, capacity, page_size, splits, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split's share of the keys, for a block of the rows that share a key head: row r is query r // group."""
    blocks = tl.cdiv(num_queries * group, BLOCK_M)
    batch = tl.program_id(0) // blocks // kv_heads
    kv_head = tl.program_id(0) // blocks % kv_heads
    first_row = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(1)
    offs_r = first_row + tl.arange(0, BLOCK_M)
    offs_m = offs_r // group
    in_rows = offs_m < num_queries
    rows = in_rows[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    b, kv_h = batch.to(tl.int64), kv_head.to(tl.int64)
    heads = kv_h * group + offs_r % group
    num_keys = _length(lengths_ptr, batch, more, capacity)
    first_place = 0
    if leftpad_ptr is not None:
        first_place = tl.load(leftpad_ptr + batch).to(tl.int32)
        num_keys = tl.maximum(num_keys - first_place, 0)
    shift = num_keys - num_queries

    # [BLOCK_M, BLOCK_D]
    q_rows = q_ptr + b * q_strides[0] + heads * q_strides[1] + offs_m.to(tl.int64) * q_strides[2]
    q = load_tile(q_rows[:, None] + offs_d[None, :], rows, None if D == BLOCK_D else (offs_d < D)[None, :])
    k_ptr += kv_h * k_strides[1]
    v_ptr += kv_h * v_strides[1]
    if table_ptr is None:
        k_ptr += b * k_strides[0]
        v_ptr += b * v_strides[0]
    else:
        table_ptr += b * table_stride
    slope = None
    if slopes_ptr is not None:
        slopes_ptr += b * slopes_strides[0] + heads * slopes_strides[1]
        slope = load_slope(slopes_ptr, in_rows, scale, PLAIN)[:, None]

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks_ptr is not None:  # a sink is a first key with value 0, and the first split has it
        sink = tl.load(sinks_ptr + heads, mask=in_rows & (split == 0), other=float("-inf")).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
        l = tl.exp2(sink - m)

    # the blocks that the rows see, divided evenly among the splits
    low, _full_low, _full_high, high = visible_range(
        first_row // group, num_queries, num_keys, shift, left, right, (BLOCK_M - 1) // group + 2, BLOCK_N
    )
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), splits) * BLOCK_N
    low += split * share
    columns_qk = None if D == BLOCK_D else (offs_d < D)[:, None]
    columns_v = None if DV == BLOCK_DV else (offs_dv < DV)[None, :]
    offs_n = tl.arange(0, BLOCK_N)
    for start in tl.range(low, tl.minimum(low + share, high), BLOCK_N):
        in_bounds = offs_n < num_keys - start
        places = first_place + start + offs_n
        k_rows = _cache_rows(k_ptr, k_strides, table_ptr, places, in_bounds, page_size)
        v_rows = _cache_rows(v_ptr, v_strides, table_ptr, places, in_bounds, page_size)
        acc, l, m = add_keys(
            acc, l, m, q, k_rows[None, :] + offs_d[:, None], v_rows[:, None] + offs_dv[None, :], None, None,
            slope, None, start, in_bounds, batch, 0, 0, offs_m, num_keys, shift, left, right, scale, softcap, 0,
            columns_qk, columns_v, BLOCK_N, PLAIN, True, PRECISION,
        )  # fmt: skip
    out, lse = finish(acc, l, m, LN2, 1.0)
    out_rows = out_ptr + b * out_strides[0] + heads * out_strides[1] + offs_m.to(tl.int64) * out_strides[2]
    out_ptrs = out_rows[:, None] + split.to(tl.int64) * out_split + offs_dv[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=rows & (offs_dv < DV)[None, :])
    lse_rows = lse_ptr + b * lse_strides[0] + heads * lse_strides[1] + offs_m * lse_strides[2]
    tl.store(lse_rows + split.to(tl.int64) * lse_split, lse, mask=in_rows)


@triton.jit(do_not_specialize=["heads", "num_queries", "splits"])
def _merge(
    partial_ptr, partial_lse_ptr,  # fp32 (splits, B, Hq, Nq, DV) and (splits, B, Hq, Nq)
    out_ptr, out_strides,  # (B, Hq, Nq, DV)
    lse_ptr,  # fp32 (B, Hq, Nq)
    heads, num_queries, splits, partial_split, partial_lse_split,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row: Σ exp(L_s - L) O_s over the splits, in steps of BLOCK_S."""
    row = tl.program_id(0).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    columns = (offs_dv < DV)[None, :]
    m = tl.full([1], LOWEST, tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        lse = tl.load(
            partial_lse_ptr + offs_s * partial_lse_split + row, mask=offs_s < splits, other=float("-inf")
        )  # fmt: skip
        # [BLOCK_S, BLOCK_DV]
        pointers = partial_ptr + (offs_s * partial_split + row * DV)[:, None] + offs_dv[None, :]
        part = load_tile(pointers, (offs_s < splits)[:, None], columns)
        m_new = tl.maximum(m, tl.max(lse, 0) * LOG2E)
        weight = tl.exp2(lse * LOG2E - m_new)
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(weight, 0)
        acc = acc * rescale[:, None] + tl.sum(part * weight[:, None], 0)[None, :]
        m = m_new
    out, lse = finish(acc, l, m, LN2, 1.0)
    batch_head = row // num_queries
    out_ptr += batch_head // heads * out_strides[0] + batch_head % heads * out_strides[1]
    out_ptr += row % num_queries * out_strides[2]
    tl.store(out_ptr + offs_dv[None, :], out.to(out_ptr.dtype.element_ty), mask=columns)
    tl.store(lse_ptr + row + tl.arange(0, 1), lse)


@triton.jit(do_not_specialize=["heads", "num_new", "position", "capacity", "page_size"])
def _append(
    new_ptr, new_strides,  # (B, Hkv, new, D)
    cache_ptr, cache_strides,  # (B, Hkv, capacity, D), or (pages, Hkv, page_size, D)
    lengths_ptr,  # int32 or int64 (B,), or None: all sequences have `position` keys
    table_ptr, table_stride,  # int32 (B, pages of a sequence), or None
    heads, num_new, position, capacity, page_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copies a block of one head's new rows behind its cache's last; rows beyond the cache's end are left out."""
    blocks = tl.cdiv(num_new, BLOCK_N)
    batch = tl.program_id(0) // blocks // heads
    head = tl.program_id(0) // blocks % heads
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    b, h = batch.to(tl.int64), head.to(tl.int64)
    if lengths_ptr is not None:
        position += tl.load(lengths_ptr + batch).to(tl.int32)
    in_bounds = (offs_n < num_new) & (position + offs_n < capacity)
    tile = in_bounds[:, None] & (offs_d < D)
    cache_ptr += h * cache_strides[1]
    if table_ptr is None:
        cache_ptr += b * cache_strides[0]
    else:
        table_ptr += b * table_stride
    # [BLOCK_N, BLOCK_D]
    new_rows = new_ptr + b * new_strides[0] + h * new_strides[1] + offs_n.to(tl.int64) * new_strides[2]
    new = tl.load(new_rows[:, None] + offs_d, mask=tile)
    rows = _cache_rows(cache_ptr, cache_strides, table_ptr, position + offs_n, in_bounds, page_size)
    tl.store(rows[:, None] + offs_d, new, mask=tile)


def append(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, length: int,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Writes key and value behind what the caches hold. Shapes as in `fastattn.ops.decode`."""
    batch, heads, num_new = key.shape[:3]
    for new, cache in ((key, key_cache), (value, value_cache)):
        block_d = head_block(new.shape[3])
        block_n = max(1, min(16, 2048 // block_d))
        launch(
            _append, (batch * heads * triton.cdiv(num_new, block_n),), new, strides(new), cache, strides(cache), lengths,
            block_table, None if block_table is None else block_table.stride(0), heads, num_new, length,
            capacity(cache, block_table), cache.shape[2], D=new.shape[3], BLOCK_D=block_d, BLOCK_N=block_n,
        )  # fmt: skip


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence's cache can hold."""
    return cache.shape[2] * (1 if block_table is None else block_table.shape[1])


def forward(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor | None, more: int, block_table: Tensor | None,
    leftpad: Tensor | None, rules: ScoreRules, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). A sequence ends at lengths + more (`more` where lengths is None), and begins at `leftpad` or at 0."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, value_dim = value_cache.shape[1], value_cache.shape[3]
    group, keys = heads // kv_heads, capacity(key_cache, block_table)
    block_d, block_dv = head_block(head_dim), head_block(value_dim)
    target = current_target()
    rules = without_loose_cap(rules, query.dtype) if rules.softcap else rules
    plain, _ = score_class(rules)
    config = decode_config(target, max(block_d, block_dv), query.element_size(), num_queries * group, plain)
    programs = batch * kv_heads * triton.cdiv(num_queries * group, config.block_m)
    longest = min(more, keys) if lengths is None else keys
    splits = decode_splits(target, programs, triton.cdiv(longest, config.block_n))
    out = new_output(query, value_dim)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    part, part_lse = out, lse
    if splits > 1:
        part = lse.new_empty((splits, batch, heads, num_queries, value_dim))
        part_lse = lse.new_empty((splits, batch, heads, num_queries))
    slopes, scale = rules.alibi_slopes, rules.scale
    launch(
        _decode, (programs, splits), query, strides(query), key_cache, strides(key_cache), value_cache, strides(value_cache),
        lengths, block_table, None if block_table is None else block_table.stride(0), leftpad, slopes, strides(slopes),
        rules.sinks, part, part.stride()[-4:-1], part_lse, part_lse.stride()[-3:], part.stride(0), part_lse.stride(0),
        scale * LOG2E.value if plain else scale, rules.softcap or None, kv_heads, group, num_queries, more, keys,
        key_cache.shape[2], splits, rules.window_left, rules.window_right, D=head_dim, DV=value_dim, BLOCK_D=block_d,
        BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PLAIN=plain, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages, max_registers=config.max_registers,
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge, (batch * heads * num_queries,), part, part_lse, out, strides(out), lse, heads, num_queries, splits,
            part.stride(0), part_lse.stride(0), DV=value_dim, BLOCK_DV=block_dv, BLOCK_S=MERGE_SPLITS,
        )  # fmt: skip
    return out, lse


def explain(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor | None) -> list[str]:
    """The tiles and splits that the kernels of this call would use."""
    target, width = current_target(), max(head_block(query.shape[3]), head_block(value_cache.shape[3]))
    kv_heads = key_cache.shape[1]
    rows = query.shape[2] * (query.shape[1] // kv_heads)
    config = decode_config(target, width, query.element_size(), rows)
    keys = capacity(key_cache, block_table)
    programs = query.shape[0] * kv_heads * triton.cdiv(rows, config.block_m)
    splits = decode_splits(target, programs, triton.cdiv(keys, config.block_n))
    tile = f"{config.block_m} rows x {config.block_n} keys a step, {config.num_warps} warps, {config.num_stages} stages"
    return [f"{tile}; keys of up to {keys} tokens in {splits} splits on {programs} programs each"]
