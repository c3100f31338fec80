"""Memory layout of attention's outputs, the same on every backend (torch.compile relies on it)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def new_heads(like: Tensor, heads: int, rows: int, dim: int) -> Tensor:
    """An uninitialised (B, heads, rows, dim) tensor of the batch, dtype and device of `like`.

    A row's heads lie together, as a transformer's projections write them and read them: to merge them again is a view.
    PyTorch's own fused attention does the same, so that nothing has to be copied where it is what runs.
    """
    return like.new_empty((like.shape[0], rows, heads, dim)).transpose(1, 2)


def as_heads(tensor: Tensor) -> Tensor:
    """`tensor` (B, heads, rows, dim), copied into the layout of `new_heads` unless it has it already."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
