"""Which pairs of a query row and a key column are visible, and what a score becomes.

Every attention kernel (forward, dQ, dK/dV, dBias) calls these functions and none of them has a copy. Positions are
bottom-right aligned: with shift = Nk - Nq, row i sees column j where

    i + shift - left <= j <= i + shift + right,    0 <= j < Nk,    mask[i, j]

and an unbounded side is None. Causal attention is right = 0. Seen from a column, row i is visible where
j - shift - right <= i <= j - shift + left: the same rule with the sign of shift and the two sides exchanged, so the same
functions serve the kernels that walk along rows.
"""

import triton
import triton.language as tl

from fastattn import block_mask
from fastattn.kernels.activations import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum, and fp32's lowest number: finite, so that exp2(-inf - LOWEST) is 0 and never NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Numbers smaller than this stay finite times LOG2E
BASE_2 = tl.constexpr(2e38)


@triton.jit
def visible_range(start, length, other_length, shift, behind, ahead, block, OTHER: tl.constexpr):
    """What the block [start, start + block) of one axis sees of the other axis, in steps of OTHER.

    Position x sees [x + shift - behind, x + shift + ahead]. Returns (low, full_low, full_high, high): nothing outside
    [low, high) is visible to any position of the block, and all of [full_low, full_high) is visible to every one of them;
    all but `high` are multiples of OTHER, and low <= full_low <= full_high.
    """
    last = tl.minimum(start + block, length) - 1
    low = 0
    full_low = 0
    high = other_length
    full_high = other_length
    if behind is not None:
        low = tl.minimum(tl.maximum(start + shift - behind, 0), other_length)
        full_low = tl.minimum(tl.maximum(last + shift - behind, 0), other_length)
    if ahead is not None:
        high = tl.minimum(tl.maximum(last + shift + ahead + 1, 0), other_length)
        full_high = tl.minimum(tl.maximum(start + shift + ahead + 1, 0), other_length)
    low = low // OTHER * OTHER
    full_low = (full_low + OTHER - 1) // OTHER * OTHER
    full_high = tl.maximum(full_high // OTHER * OTHER, full_low)
    return low, full_low, full_high, high


@triton.jit
def is_visible(x, y, other_length, shift, behind, ahead):
    """Whether x (a column of positions) sees y (a row of positions), element by element: y <= x + shift + ahead and so on.

    The rule depends on y - x and y - other_length alone. Callers in a loop subtract the block's start from x and
    other_length, so that y is a compile-time arange and each bound costs one comparison per element.
    """
    if ahead is not None:
        visible = y <= tl.minimum(x + (shift + ahead), other_length - 1)
    else:
        visible = y < other_length
    if behind is not None:
        visible &= y >= x + (shift - behind)
    return visible


@triton.jit
def sequence(cu_seqlens_ptr, index):
    """(first row in int64, number of rows) of a packed sequence."""
    first = tl.load(cu_seqlens_ptr + index)
    return first.to(tl.int64), tl.load(cu_seqlens_ptr + index + 1) - first


BLOCK = tl.constexpr(block_mask.BLOCK)
EMPTY, FULL = tl.constexpr(block_mask.EMPTY), tl.constexpr(block_mask.FULL)


@triton.jit
def block_list(blocks, batch, head, start):
    """What a block mask says of the row (or column) of blocks that `start` lies in: (end of the full blocks, end, list).

    blocks: (tiles, lists, counts, stride of a batch, stride of a head, blocks in a row), see `launch_lists`. The ends count
    positions in the list: 128 for each of its blocks.
    """
    row = batch * blocks[3] + head * blocks[4] + start // BLOCK
    full = tl.load(blocks[2] + row * 2)
    end = tl.load(blocks[2] + row * 2 + 1)
    return full * BLOCK, end * BLOCK, (blocks[0], blocks[1] + row * blocks[5] * 2, start // BLOCK * BLOCK)


@triton.jit
def listed(block_list, position):
    """(where the block at a position of the list starts, plus the position in it; its kind)"""
    position = tl.cast(position, tl.int32)
    entry = block_list[1] + position // BLOCK * 2
    return tl.load(entry) * BLOCK + position % BLOCK, tl.load(entry + 1)


@triton.jit
def mixed_tile(block_list, kind):
    """Where the bits of a mixed block start: pair (i, j) of the block lies i · 128 + j behind."""
    return block_list[0] + kind.to(tl.int64) * (BLOCK * BLOCK)


@triton.jit
def pair_pointers(ptr, stride, rows, columns):
    """Pointers to a tile of a mask or bias."""
    return ptr + rows.to(tl.int64) * stride[2] + columns.to(tl.int64) * stride[3]


@triton.jit
def block_kind(blocks, batch, head, row, column):
    """The kind of the block around (row, column). blocks: (tiles, kinds, -, stride of a batch, of a head, blocks in a row)."""
    return tl.load(blocks[1] + (batch * blocks[3] + head * blocks[4] + row // BLOCK) * blocks[5] + column // BLOCK)


@triton.jit
def load_tile(pointers, rows, columns):
    """Loads a tile; `rows` and `columns` are masks that broadcast over it, or None where all is in bounds."""
    if rows is None:
        if columns is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=columns, other=0.0)
    else:
        if columns is None:
            return tl.load(pointers, mask=rows, other=0.0)
        else:
            return tl.load(pointers, mask=rows & columns, other=0.0)


@triton.jit
def load_slope(ptr, valid, scale, PLAIN: tl.constexpr):
    """The ALiBi slope of a head, or of several, in the unit of the scores."""
    slope = tl.load(ptr, mask=valid)
    return slope * (LOG2E / scale) if PLAIN else slope


@triton.jit
def with_alibi(score, slope, x, y):
    """score - slope·|x - y|; x and y: positions, as a column and a row."""
    return score - slope * tl.abs(x.to(tl.float32) - y.to(tl.float32))


@triton.jit
def capped_score(product, scale, softcap, EXACT: tl.constexpr):
    """c·tanh(q·k·scale / c), or q·k·scale without a cap.

    tanh x = 1 - 2 / (1 + e^{2x}) takes half the instructions of `tanh` and is off by about 2⁻²² wherever x lies: nothing next to the
    rounding of 16-bit factors. EXACT: small scores keep all the digits of fp32.
    """
    score = product * scale
    if softcap is not None:
        if EXACT:
            score = softcap * tanh(score * (1.0 / softcap))
        else:
            score = softcap - (2.0 * softcap) / (1.0 + tl.exp2(score * (2.0 * LOG2E / softcap)))
    return score


@triton.jit
def capped_score_derivative(capped, softcap):
    """d capped_score / d (q·k·scale), from the capped score: 1 - tanh²."""
    ratio = capped * (1.0 / softcap)
    return 1.0 - ratio * ratio
