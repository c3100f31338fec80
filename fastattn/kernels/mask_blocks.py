"""The blocks of a dense mask, found on the device: attention then skips the empty ones, and masks in the mixed ones alone.

A mask of N² pairs is read once, which costs next to nothing beside the N²·D products of every head that shares it, and saves
half of them where the mask is causal. Unlike `BlockMask.from_mask`, which keeps the mixed blocks alone and must wait until it
knows how many there are, this never waits: every block has room for its bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fastattn import block_mask
from fastattn.block_mask import Blocks
from fastattn.kernels.launch import launch
from fastattn.kernels.masks import BLOCK, EMPTY, FULL, is_visible, pair_pointers
from fastattn.layout import shared_planes
from fastattn.score_rules import ScoreRules

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 512  # queries and keys: below, the two launches cost as much as they save
_MOST_PAIRS = 1 << 30  # of a mask: the bits take as many bytes again
_ENTRIES = 128  # of a list that are placed at a time


@triton.jit(do_not_specialize=["heads", "rows", "columns", "num_queries", "left", "right"])
def _find_kinds(
    mask_ptr, mask_strides,  # bool (B, H, Nq, Nk)
    tiles_ptr,  # bool (B · H · rows · columns, 128, 128)
    kinds_ptr,  # int32 (B, H, rows, columns)
    heads, rows, columns, num_queries, num_keys, left, right,
):  # fmt: skip
    """The kind of one block, and its bits where it is mixed. What lies beyond the last pair is invisible."""
    number = tl.program_id(0)
    column, row, plane = number % columns, number // columns % rows, number // (columns * rows)
    mask_ptr += (plane // heads).to(tl.int64) * mask_strides[0] + (plane % heads).to(tl.int64) * mask_strides[1]
    local = tl.arange(0, BLOCK)
    i, j = (row * BLOCK + local)[:, None], (column * BLOCK + local)[None, :]
    # [128, 128]
    bits = tl.load(pair_pointers(mask_ptr, mask_strides, i, j), mask=(i < num_queries) & (j < num_keys), other=0) != 0
    if left is not None or right is not None:
        bits &= is_visible(i, j, num_keys, num_keys - num_queries, left, right)
    count = tl.sum(tl.sum(bits.to(tl.int32), 1), 0)
    kind = tl.where(count == 0, EMPTY, tl.where(count == BLOCK * BLOCK, FULL, number))
    tl.store(kinds_ptr + number, kind)
    if kind >= 0:
        tile = tiles_ptr + number.to(tl.int64) * (BLOCK * BLOCK)
        tl.store(tile + local[:, None] * BLOCK + local[None, :], bits)


@triton.jit(do_not_specialize=["rows", "columns"])
def _list_blocks(
    kinds_ptr,  # int32 (planes, rows, columns)
    entries_ptr,  # int32 (planes, rows, columns, 2), then (planes, columns, rows, 2)
    counts_ptr,  # int32 (planes, rows, 2), then (planes, columns, 2)
    rows, columns, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The list of one row of blocks, or of one column: the full ones first, then the mixed, both in their order."""
    line, plane, planes = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    blocks = rows * columns
    length, step, first = columns, 1, line * columns
    entry, counter = line * columns, plane * rows + line
    if line >= rows:
        line -= rows
        length, step, first = rows, columns, line
        entry, counter = planes * blocks + line * rows, planes * rows + plane * columns + line
    kinds_ptr += plane * blocks + first
    entries_ptr += (plane * blocks + entry).to(tl.int64) * 2
    offsets = tl.arange(0, ENTRIES)
    full = 0
    for start in range(0, length, ENTRIES):
        at = start + offsets
        kinds = tl.load(kinds_ptr + at * step, mask=at < length, other=EMPTY)
        full += tl.sum((kinds == FULL).to(tl.int32), 0)
    next_full = 0
    next_mixed = full
    for start in range(0, length, ENTRIES):
        at = start + offsets
        kinds = tl.load(kinds_ptr + at * step, mask=at < length, other=EMPTY)
        is_full, is_mixed = (kinds == FULL).to(tl.int32), (kinds >= 0).to(tl.int32)
        place = tl.where(is_mixed != 0, next_mixed + tl.cumsum(is_mixed, 0), next_full + tl.cumsum(is_full, 0)) - 1
        tl.store(entries_ptr + place * 2, at, mask=kinds != EMPTY)
        tl.store(entries_ptr + place * 2 + 1, kinds, mask=kinds != EMPTY)
        next_full += tl.sum(is_full, 0)
        next_mixed += tl.sum(is_mixed, 0)
    tl.store(counts_ptr + counter * 2, full)
    tl.store(counts_ptr + counter * 2 + 1, next_mixed)


def is_listed(mask: Tensor | Blocks) -> bool:
    """Whether attention goes by this mask's blocks. (Where all rows are alike, one row is all there is to read.)"""
    if isinstance(mask, Blocks):
        return True
    varies = all(size >= _LEAST and stride != 0 for size, stride in zip(mask.shape[2:], mask.stride()[2:]))
    return varies and shared_planes(mask).numel() <= _MOST_PAIRS


def find_blocks(mask: Tensor, left: int | None, right: int | None) -> Blocks:
    """The blocks of `mask` (B or 1, H or 1, Nq, Nk) within a window; a mixed block's number is its place in `kinds`."""
    mask = shared_planes(mask)
    batch, heads, num_queries, num_keys = mask.shape
    rows, columns = triton.cdiv(num_queries, block_mask.BLOCK), triton.cdiv(num_keys, block_mask.BLOCK)
    planes, blocks = batch * heads, batch * heads * rows * columns
    tiles = mask.new_empty(blocks, block_mask.BLOCK, block_mask.BLOCK)
    kinds, entries, counts = (
        mask.new_empty(size, dtype=torch.int32) for size in (blocks, 4 * blocks, 2 * planes * (rows + columns))
    )
    launch(
        _find_kinds, (blocks,), mask, mask.stride(), tiles, kinds, heads, rows, columns, num_queries, num_keys, left, right,
    )  # fmt: skip
    launch(_list_blocks, (rows + columns, planes), kinds, entries, counts, rows, columns, ENTRIES=_ENTRIES)
    by_row, by_column = entries.view(2, batch, heads, rows * columns, 2)
    row_counts, column_counts = counts.split([2 * planes * rows, 2 * planes * columns])
    return Blocks(
        tiles,
        kinds.view(batch, heads, rows, columns),
        by_row.view(batch, heads, rows, columns, 2),
        row_counts.view(batch, heads, rows, 2),
        by_column.view(batch, heads, columns, rows, 2),
        column_counts.view(batch, heads, columns, 2),
    )


def by_blocks(rules: ScoreRules) -> ScoreRules:
    """The rules for a kernel: a large dense mask as its blocks, which have the window in them."""
    mask = rules.mask
    if mask is None or isinstance(mask, Blocks) or not is_listed(mask):
        return rules
    found = find_blocks(mask, rules.window_left, rules.window_right)
    return rules._replace(mask=found, window_left=None, window_right=None)
