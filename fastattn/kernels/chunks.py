"""Tiles as wide as a head, held as a tuple of chunks of their columns.

A head is one chunk, unless registers are short. Products of fp32 at IEEE precision run on the FMA units, and Triton keeps
what one dot contracts over in the registers of each thread: over 256 columns that does not fit, over 64 at a time it does.
In 16 bits, dK and dV of wide heads with every feature on need it, too.
"""

import triton
import triton.language as tl

from fastattn.kernels.masks import load_tile


@triton.jit
def hidden_zero(positive):
    """0, which the compiler takes for unknown: what is added to it is computed again here, not held in registers from before."""
    return positive >> 31


@triton.jit
def tile_offsets(rows, stride, COLUMNS: tl.constexpr):
    """Of a tile of the first COLUMNS columns. Unsigned, so that the high half of each in an address is no register of its own."""
    return (rows[:, None] * stride + tl.arange(0, COLUMNS)[None, :]).to(tl.uint32)


@triton.jit
def load_chunks(pointers, rows, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The first WIDTH columns of a tile, as [rows, CHUNK] each; `pointers` are those of the first. The rest of the last is 0."""
    tiles = ()
    for first in tl.static_range(0, WIDTH, CHUNK):
        columns = None if first + CHUNK <= WIDTH else (first + tl.arange(0, CHUNK) < WIDTH)[None, :]
        tiles += (load_tile(pointers + first, rows, columns),)  # type: ignore[assignment]
    return tiles


@triton.jit
def zero_chunks(ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Accumulators of a tile."""
    tiles = ()
    for _ in tl.static_range(0, WIDTH, CHUNK):
        tiles += (tl.zeros([ROWS, CHUNK], tl.float32),)  # type: ignore[assignment]
    return tiles


@triton.jit
def store_chunks(pointers, tiles, scale, rows, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Stores the tile times `scale`."""
    for index in tl.static_range(len(tiles)):
        inside = rows & (index * CHUNK + tl.arange(0, CHUNK) < WIDTH)[None, :]
        tl.store(pointers + index * CHUNK, (tiles[index] * scale).to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def row_products(a, b):
    """rowsum(A ∘ B) in fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for index in tl.static_range(1, len(a)):
        total += tl.sum(a[index].to(tl.float32) * b[index].to(tl.float32), 1)
    return total


@triton.jit
def dot_transposed(a, b, start, PRECISION: tl.constexpr):
    """start + A Bᵀ, the sum over the chunks of both; `start` broadcasts, or is None for 0."""
    if start is None:
        product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    else:
        product = tl.broadcast_to(start, [a[0].shape[0], b[0].shape[0]])
        product = tl.dot(a[0], tl.trans(b[0]), product, input_precision=PRECISION)
    for index in tl.static_range(1, len(a)):
        product = tl.dot(a[index], tl.trans(b[index]), product, input_precision=PRECISION)
    return product


@triton.jit
def dot_add(a, b, total, PRECISION: tl.constexpr):
    """total + A B, chunk by chunk of B."""
    tiles = ()
    for index in tl.static_range(len(b)):
        tiles += (tl.dot(a.to(b[index].dtype), b[index], total[index], input_precision=PRECISION),)  # type: ignore[assignment]
    return tiles
