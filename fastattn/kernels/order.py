"""Which rows or keys a program of attention takes: the order in which a GPU starts the programs.

Under a causal mask some blocks cost many times as much as others. A GPU starts programs by their number, as others end, so that
the longest must come first, or a few of them run alone at the end. The longest of each head first, one head after the other, does
not suffice: 32 heads of 2048 tokens would take an H100 1.25 times as long as with even shares, and 1.03 times where the
longest blocks of all heads come first (`python -m bench.codegen.schedule`). How many heads are mixed is limited by the L2
cache, which has to hold what their programs read again and again.

Sources: R. L. Graham, "Bounds on multiprocessing timing anomalies" (1969), for the longest first; Shah et al., "FlashAttention-3"
(2024), https://arxiv.org/abs/2407.08608, whose code schedules in the same way.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

L2_SHARE = 16 << 20  # bytes, of 40 MB on an A100, 50 on an H100 and 126 on a B200


@lru_cache(maxsize=4096)
def heads_together(heads: int, head_bytes: int, left: int | None, right: int | None, listed: bool) -> int | None:
    """How many heads' blocks are mixed, longest first; None where all blocks but those at the ends cost the same.

    Args:
        heads: in all samples.
        head_bytes: what the blocks of a head read again and again.
        left, right: the sides of the window.
        listed: whether a block mask says what each block sees.
    """
    if not listed and (left is not None or right is None):
        return None
    return max(1, min(heads, L2_SHARE // max(1, head_bytes)))


@triton.jit
def side_by_side(number, rows, columns, together):
    """(row, column) of a program: column after column, `together` rows at a time (fewer where they end)."""
    first = number // (together * columns) * together
    mixed = tl.minimum(together, rows - first)
    among = number - first * columns
    return first + among % mixed, among // mixed


@triton.jit
def head_and_block(number, blocks, together):
    """(head among all samples', place in the order of its blocks) of a program.

    together: heads whose first blocks come before the second of any of them; None: head after head.
    """
    if together is None:
        head, place = number // blocks, number % blocks
    else:
        head, place = side_by_side(number, tl.num_programs(0) // blocks, blocks, together)
    return head, place


@triton.jit
def query_block(number, num_heads, num_queries, together, BLOCK_M: tl.constexpr):
    """(batch, head, first row) of a program; under a causal mask the last rows see most: longest first."""
    blocks = tl.cdiv(num_queries, BLOCK_M)
    batch_head, place = head_and_block(number, blocks, together)
    return batch_head // num_heads, batch_head % num_heads, (blocks - 1 - place) * BLOCK_M


@triton.jit
def key_block(number, num_kv_heads, num_keys, together, BLOCK_N: tl.constexpr):
    """(batch, key head, first key) of a program; under a causal mask the first keys are seen most: longest first."""
    batch_head, place = head_and_block(number, tl.cdiv(num_keys, BLOCK_N), together)
    return batch_head // num_kv_heads, batch_head % num_kv_heads, place * BLOCK_N
