"""Random numbers by counter: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

`fastattn/eager/random.py` computes the same numbers in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def keep(seed, batch, head, rows, columns, threshold):
    """Dropout's choice for elements (batch, head, row, column): True = keep, with probability 1 - threshold / 2³¹.

    The counter is (column // 4, row, head, batch) and the element's word is column % 4, so that the choice depends on the
    element alone, never on tile sizes.

    Args:
        rows, columns: int32 tiles that broadcast against each other.
        threshold: round(p·2³¹).
    """
    zero = rows * 0 + columns * 0
    w0, w1, w2, w3 = tl.philox(seed, (columns >> 2) + zero, rows + zero, head + zero, batch + zero)
    word = (columns & 3) + zero
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def dropout(tile, SEED, offs_m, offs_n, threshold, keep_scale):
    """tile · keep / (1 - p), with the choice of element (row, column) of the whole tensor."""
    if SEED is not None:
        kept = keep(tl.load(SEED), 0, 0, offs_m.to(tl.int32)[:, None], offs_n[None, :], threshold)
        tile = tl.where(kept, tile * keep_scale, 0.0)
    return tile
