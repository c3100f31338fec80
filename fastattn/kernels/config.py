"""Tile sizes, warps and stages, as pure functions of the target and the problem's class (never of batch or length).

Attention's are in attention_config.py. Answers are kept: a training step asks the same few questions hundreds of times, and the
host's time is the GPU's on small inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from fastattn.kernels.launch import Target


def power_of_2(number: int) -> int:
    """The least power of two that is at least `number` and 1."""
    return 1 << max(number - 1, 0).bit_length()


# Normalisation. A program keeps 16 numbers of a tile per thread in the forward, and 8 in the backward, where five such
# tiles are alive. Wider rows than MAX_COLUMNS, which would spill, are taken in blocks of WIDE_COLUMNS.
MAX_COLUMNS = 8_192
WIDE_COLUMNS = 4_096
PARTIAL_TILE = (16, 128)
REDUCE_ROWS, REDUCE_COLUMNS = 32, 64


@dataclass(frozen=True)
class NormConfig:
    """How a normalisation kernel walks over the rows.

    Attributes:
        wide: rows are read in blocks of `columns`; else a program holds whole rows.
        rows: rows of a tile.
        columns: columns of a tile.
        num_warps: warps of a program.
        programs: partial sums of the weight gradient (backward only).
        partial_columns: columns of a tile of the separate partial-sum kernel (backward of wide rows only).
        max_registers: of a thread, on NVIDIA; None leaves it to ptxas.
    """

    wide: bool
    rows: int
    columns: int
    num_warps: int
    programs: int = 1
    partial_columns: int = 0
    max_registers: int | None = None


@cache
def norm_forward_config(columns: int) -> NormConfig:
    """The forward of rows of `columns` numbers."""
    if columns > MAX_COLUMNS:
        return NormConfig(wide=True, rows=1, columns=WIDE_COLUMNS, num_warps=8)
    block = power_of_2(columns)
    rows = max(1, min(16, 4_096 // block))
    return NormConfig(wide=False, rows=rows, columns=block, num_warps=max(4, rows * block // 512))


@cache
def norm_backward_config(
    target: Target, columns: int, itemsize: int, mixed_residual: bool, heavy: bool, alone: bool
) -> NormConfig:
    """The backward: as many programs as run at once, fewer for wider rows, since each writes two rows of partials.

    itemsize: of the input and its gradient. mixed_residual: the stream has a dtype of its own. heavy: there is dropout or
    adaptive scaling. alone: a layer norm without those and without a residual; from 513 columns on, where 16 divides them, 64
    registers hold it without spills, so that 32 warps are resident.

    With a mixed residual and heavy, a program holds six tiles of two kinds, which from 4,097 columns on spill 16 to 88 bytes
    a thread, whatever the number of warps (so they do without the second on sm_120, and at widths that 16 does not divide).
    Such rows are taken as wide ones: 22 bytes move for a number of bf16 input and fp32 stream, since the sums over rows
    read two tensors once more, of at least 16.
    """
    spills = mixed_residual and (heavy or columns % 16 != 0 or (target.backend == "cuda" and target.family == "small"))
    if columns > (MAX_COLUMNS // 2 if spills else MAX_COLUMNS):
        rows, partial_columns = PARTIAL_TILE
        programs = max(1, 4 * target.processors * partial_columns // columns)
        return NormConfig(True, rows, WIDE_COLUMNS, 16 if itemsize == 4 else 8, programs, partial_columns)
    block = power_of_2(columns)
    aligned = columns % 16 == 0
    # with newer Triton 64 registers spill 16 to 24 bytes of 16 bits a number
    short = target.has_newer_triton and itemsize == 2 and target.backend == "cuda" and target.family != "sm_80"
    narrow = alone and aligned and columns > 512 and not short  # in registers
    rows = max(1, min(16, (1_024 if narrow else 2_048) // block))
    per_processor = {256: 16, 1_024: 8, 2_048: 4, 4_096: 2, 8_192: 1}
    programs = target.processors * next(n for limit, n in per_processor.items() if columns <= limit)
    # fp32 rows of 8,192 with dropout and a residual spill 96 bytes with 16 warps, and none with 32; AMD's are twice as wide
    most = 32 if (itemsize == 4 or narrow) and target.backend == "cuda" else 16
    num_warps = min(most, max(4, rows * block // 256))
    # with 8 warps ptxas may take 64 registers for 32 resident warps where that spills 8 bytes
    registers = 64 if narrow else 80 if aligned and heavy and not mixed_residual and num_warps == 8 else None
    return NormConfig(False, rows, block, num_warps, programs, max_registers=registers)


# Feed-forward: numbers per program of an elementwise kernel (8 per thread of 4 warps).
ELEMENTWISE_BLOCK = 1_024


@dataclass(frozen=True)
class MatmulConfig:
    """A program computes block_m × block_n of the product, block_k of the depth at a time.

    Attributes:
        group_m: block rows that programs walk over together, so that they share operands in the L2 cache.
        parts: pieces in which the block's columns are finished, so that an activation fits in registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    parts: int = 1


@cache
def matmul_config(
    target: Target, columns: int, depth: int, itemsize: int, products: int = 1, accumulators: int = 1
) -> MatmulConfig:
    """columns, depth: of the right operand; products: that a program computes, into so many accumulators.

    The 16-bit configurations are the largest that compile without spills for every activation on their architecture:
    blocks of 128 x 256, as large as those of a matrix product alone; two accumulators of that size fit sm_100's tensor
    memory only (in registers they spill 1,024 bytes a thread on sm_90, and 2,720 on sm_80).
    """
    if target.backend == "interpreter":
        block = MatmulConfig(32, 64, 32, 4, 1, parts=2)
    elif itemsize == 4:
        ragged = columns % 16 or depth % 16
        blackwell = target.family == "sm_100"
        few = blackwell and not ragged  # 32 deep, Triton 3.9.0 spills 8 bytes there
        block = MatmulConfig(64, 32 if ragged else 64, 16 if few else 32, 4 if blackwell else 8, 2)
    elif columns % 16 or depth % 16:  # element by element: the addresses need registers
        block = MatmulConfig(64, 64, 32, 4, 2, parts=2)
    elif target.family == "sm_100":
        block = MatmulConfig(128, 256, 64, 8, 3, parts=8)
    elif target.family == "sm_90":
        two = accumulators == 2
        block = MatmulConfig(128, 128 if two else 256, 64, 8, 3, parts=2 if two else 8)
    elif target.family == "sm_80":
        two = products == 2  # into one accumulator they spill 8 bytes
        block = MatmulConfig(128, 128 if two else 256, 32, 8, 4, parts=2 if two else 8)
    else:
        block = MatmulConfig(128, 128, 64, 8, 2, parts=2)
    block_n = min(block.block_n, max(16, power_of_2(columns)))
    block_k = min(block.block_k, max(16, power_of_2(depth)))
    return replace(
        block, block_n=block_n, block_k=block_k, parts=min(block.parts, block_n // 32) if block_n >= 64 else 1
    )


# Loss: logits that exist at a time (256 MB in 16 bits), at least a few thousand rows of any common vocabulary.
CHUNK_LOGITS = 1 << 27


@cache
def cross_entropy_config(target: Target, classes: int, itemsize: int) -> tuple[int, int, int, int]:
    """(groups, lanes, classes of a lane, warps): a lane of a group is 16 bytes of one thread, which has 16 numbers."""
    block = min(4_096, max(512, power_of_2(classes)))
    threads = block // 16
    return itemsize, threads, 16 // itemsize, max(1, threads // (64 if target.backend == "hip" else 32))


@cache
def rotary_config(half: int, tail: int) -> tuple[int, int, int, int]:
    """(columns, columns of the tail, tokens, warps) of a program over tables of `half` columns and `tail` numbers that stay.

    8 pairs per thread: 16 bytes of each half in 16 bits.
    """
    columns, tail_columns = max(8, power_of_2(half)), power_of_2(tail)
    return columns, tail_columns, max(1, 2_048 // max(2 * columns, tail_columns)), 4


def head_splits(target: Target, tiles: int, heads: int) -> int:
    """Programs that share the heads of a block of tokens: as few as give every processor four programs."""
    return max(1, min(heads, -(-4 * target.processors // max(tiles, 1))))
