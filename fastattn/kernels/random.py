"""Random numbers by counter: Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

Seven rounds are the fewest that pass their tests. Eight attention weights share a counter, and each takes half of one of its four
words: rows r and r + 8, columns c, c + 8, c + 16 and c + 24 of a block of 16 x 32. These are elements of a product's tile that one
thread holds, so that none is computed twice and nothing moves between threads; the choice depends on (seed, batch, head, row,
column) alone, never on tile sizes. `fastattn/eager/random.py` computes the same numbers in PyTorch.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 words of integer counters, which broadcast against each other; what depends on rows or columns alone stays small.

    `tl.philox` takes counters of the whole tile from the first round on, and each half of a product by itself.
    """
    c0, c1, c2, c3 = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32), tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _half(w0, w1, w2, w3, row_part, column_part):
    """An element's half of a word, as the high half of the result: of the first two words for row_part 0, of the others for 1; the
    low half of the first, its high half, and those of the second for column_part 0 to 3."""
    first, second = tl.where(row_part == 0, w0, w2), tl.where(row_part == 0, w1, w3)
    word = tl.where(column_part < 2, first, second)
    return tl.where(column_part & 1 == 0, word << 16, word)


@triton.jit
def _keep_elements(seed, batch, head, rows, columns, threshold):
    """The choice for elements of int32 rows and columns that broadcast against each other, each by itself."""
    zero = rows * 0 + columns * 0
    column, row = (columns >> 5) * 8 + (columns & 7) + zero, (rows >> 4) * 8 + (rows & 7) + zero
    w0, w1, w2, w3 = philox(seed, column, row, head + zero, batch + zero)
    return _half(w0, w1, w2, w3, (rows >> 3 & 1) + zero, (columns >> 3 & 3) + zero) >= threshold.to(tl.uint32) << 16


@triton.jit
def keep_tile(
    seed, batch, head, first_row, first_column, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COLUMNS_FIRST: tl.constexpr = False,
):  # fmt: skip
    """Dropout's choice for a tile of attention weights: True = keep, with probability 1 - threshold / 2¹⁶.

    Args:
        first_row, first_column: of the tile; ROWS and COLUMNS divide them, and 16 divides both.
        threshold: see `fastattn.dropout.dropout_threshold`.

    Returns:
        bool (ROWS, COLUMNS), or (COLUMNS, ROWS) if COLUMNS_FIRST.
    """
    if COLUMNS < 32:  # half of a group's columns, of which sharing costs registers
        rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        if COLUMNS_FIRST:
            kept = _keep_elements(seed, batch, head, rows[None, :], columns[:, None], threshold)
        else:
            kept = _keep_elements(seed, batch, head, rows[:, None], columns[None, :], threshold)
    else:  # [row blocks, 2 parts, 8, column blocks, 4 parts, 8]
        row = (first_row >> 4) * 8 + tl.arange(0, ROWS // 2)
        column = (first_column >> 5) * 8 + tl.arange(0, COLUMNS // 4)
        row_part, column_part = tl.arange(0, 2), tl.arange(0, 4)
        if COLUMNS_FIRST:
            row, row_part = tl.reshape(row, (1, 1, 1, ROWS // 16, 1, 8)), tl.reshape(row_part, (1, 1, 1, 1, 2, 1))
            column = tl.reshape(column, (COLUMNS // 32, 1, 8, 1, 1, 1))
            column_part = tl.reshape(column_part, (1, 4, 1, 1, 1, 1))
        else:
            row, row_part = tl.reshape(row, (ROWS // 16, 1, 8, 1, 1, 1)), tl.reshape(row_part, (1, 2, 1, 1, 1, 1))
            column = tl.reshape(column, (1, 1, 1, COLUMNS // 32, 1, 8))
            column_part = tl.reshape(column_part, (1, 1, 1, 1, 4, 1))
        w0, w1, w2, w3 = philox(seed, column, row, head, batch)
        half = tl.reshape(
            _half(w0, w1, w2, w3, row_part, column_part), (COLUMNS, ROWS) if COLUMNS_FIRST else (ROWS, COLUMNS)
        )
        kept = half >= threshold.to(tl.uint32) << 16
    return kept


@triton.jit
def keep_of_rows(seed, rows, columns, threshold):
    """Dropout's choice for elements (row, column), int32 tiles that broadcast against each other, of a tensor of rows.

    A thread loads neighbours: four columns share the counter (column // 4, row, 0, 0), and each takes a word.
    """
    zero = rows * 0 + columns * 0
    w0, w1, w2, w3 = tl.philox(seed, (columns >> 2) + zero, rows + zero, zero, zero, n_rounds=ROUNDS)
    word = (columns & 3) + zero
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return bits >= threshold.to(tl.uint32) << 16


@triton.jit
def dropout(tile, SEED, offs_m, offs_n, threshold, keep_scale):
    """tile · keep / (1 - p), with the choice of element (row, column) of the whole tensor."""
    if SEED is not None:
        kept = keep_of_rows(tl.load(SEED), offs_m.to(tl.int32)[:, None], offs_n[None, :], threshold)
        tile = tl.where(kept, tile * keep_scale, 0.0)
    return tile
