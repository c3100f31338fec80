"""Memory layout of attention's results, the same on every backend (torch.compile relies on it).

It is that of PyTorch's fused CPU attention, so that nothing has to be copied where that is what runs: the output lies like the
query, and a row's heads lie together in the gradients, as the projections before attention want them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


MOST_BETWEEN_ROWS = 1 << 24  # elements: the offsets inside one tile of a kernel are 32-bit, to save registers


class Packing(NamedTuple):
    """How sequences lie one after the other along the length dimension of (1, H, T, D) tensors.

    cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where each sequence starts and the last one ends.
    max_seqlen_q, max_seqlen_k: at least the longest sequence's length.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def new_output(query: Tensor, value_dim: int) -> Tensor:
    """An uninitialised (B, Hq, Nq, value_dim) tensor in the order of `query` (B, Hq, Nq, D).

    Where `query` keeps a row's heads together, as a projection's output split into heads does, so does the result: merging
    its heads again is then a view. (Not where that would put rows too far apart for a kernel.)
    """
    batch, heads, rows, _ = query.shape
    if query.stride(1) < query.stride(2) and heads * value_dim <= MOST_BETWEEN_ROWS:
        return query.new_empty((batch, rows, heads, value_dim)).transpose(1, 2)
    return query.new_empty((batch, heads, rows, value_dim))


def as_output(tensor: Tensor, query: Tensor) -> Tensor:
    """`tensor` (B, Hq, Nq, value_dim), copied into the layout of `new_output` unless it has it already."""
    if query.stride(1) < query.stride(2):
        return as_gradient(tensor)
    return tensor.contiguous()


def new_gradient(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised gradient of a query, key or value (B, H, N, D), in its dtype or another."""
    batch, heads, rows, dim = tensor.shape
    if heads * dim > MOST_BETWEEN_ROWS:
        return tensor.new_empty(tensor.shape, dtype=dtype)
    return tensor.new_empty((batch, rows, heads, dim), dtype=dtype).transpose(1, 2)


def as_gradient(tensor: Tensor) -> Tensor:
    """`tensor` (B, H, N, D), copied into the layout of `new_gradient` unless it has it already."""
    if tensor.shape[1] * tensor.shape[3] > MOST_BETWEEN_ROWS:
        return tensor.contiguous()
    together = tensor.transpose(1, 2)
    return tensor if together.is_contiguous() else together.contiguous().transpose(1, 2)


def shared_planes(pair: Tensor) -> Tensor:
    """A mask (B or 1, H or 1, Nq, Nk) without the batches and heads that are only expanded."""
    for dim in (0, 1):
        pair = pair.narrow(dim, 0, 1) if pair.shape[dim] > 1 and pair.stride(dim) == 0 else pair
    return pair
