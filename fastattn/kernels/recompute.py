"""What every backward kernel of attention computes again: the probabilities, and the gradient of the scores."""

import triton
import triton.language as tl

from fastattn.kernels.masks import (
    LOG2E,
    capped_score,
    capped_score_derivative,
    load_tile,
    pair_pointers,
    with_alibi,
)

STATISTICS = 128  # the rows of a head's statistics are padded to a multiple of this


@triton.jit
def row_statistics(ptr, batch_head, num_queries, STATISTICS: tl.constexpr):
    """Where a head's rows of minus LSE and minus delta start: padded, so that aligned loads of a whole block are possible."""
    padded = tl.cdiv(num_queries, STATISTICS) * STATISTICS
    lse_ptr = ptr + batch_head.to(tl.int64) * (2 * padded)
    return lse_ptr, lse_ptr + padded


@triton.jit
def first_statistic(first_q, index, STATISTICS: tl.constexpr):
    """Where in a head's statistics those of a packed sequence start: at a multiple of STATISTICS, too. With one block of them more for
    each sequence before it than its first row needs, none reach into the next one's."""
    return (first_q // STATISTICS + index) * STATISTICS


@triton.jit
def probability(
    product, minus_lse, mask, bias, slope, x, y, visible, scale, softcap, PLAIN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """-> (P, the capped score). `minus_lse` broadcasts over the tile, and is None where `product` began with it: in base 2, or with a
    bias in base e; `mask` and `visible` may be None, too. x, y: see `with_alibi`. EXACT: see `capped_score`."""
    capped = product if PLAIN else capped_score(product, scale, softcap, EXACT)
    score = capped
    if slope is not None:
        score = with_alibi(score, slope, x, y)
    if bias is not None:
        score += bias
    if visible is not None:
        score = tl.where(visible, score, float("-inf"))
    if mask is not None:
        score = tl.where(mask != 0, score, float("-inf"))
    factor = scale if PLAIN else LOG2E
    if minus_lse is None:
        return tl.exp2(score * factor), capped
    elif bias is None:
        return tl.exp2(tl.fma(score, factor, minus_lse)), capped
    else:
        return tl.exp2((score + minus_lse) * LOG2E), capped


@triton.jit
def load_pair(ptr, stride, rows, columns, rows_ok, columns_ok):
    """A tile of a mask or bias; None stays None."""
    if ptr is None:
        return None
    else:
        return load_tile(pair_pointers(ptr, stride, rows, columns), rows_ok, columns_ok)


@triton.jit
def score_gradient(p, dp, minus_delta, capped, kept, keep_scale, softcap):
    """-> (dS, dX): with respect to the logit, and to scale·q·k. `kept` is dropout's choice, or None. `minus_delta` is None
    where `dp` began with it."""
    if kept is not None:
        dp = tl.where(kept, dp * keep_scale, 0.0)
    if minus_delta is not None:
        dp += minus_delta
    ds = p * dp
    if softcap is not None:
        return ds, ds * capped_score_derivative(capped, softcap)
    else:
        return ds, ds
