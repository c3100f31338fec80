"""Memory layout of attention's outputs, the same on every backend (torch.compile relies on it)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def new_heads(like: Tensor, heads: int, rows: int, dim: int) -> Tensor:
    """An uninitialised (B, heads, rows, dim) tensor in the order of `like` (B, H, N, D).

    Where `like` keeps a row's heads together, as a projection's output split into heads does, so does the result: merging
    its heads again is then a view.
    """
    if like.stride(1) < like.stride(2):
        return like.new_empty((like.shape[0], rows, heads, dim)).transpose(1, 2)
    return like.new_empty((like.shape[0], heads, rows, dim))


def as_heads(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` (B, heads, rows, dim), copied into the layout of `new_heads` unless it has it already."""
    expected = new_heads_strides(tensor.shape, like)
    if tensor.stride() == expected:
        return tensor
    return new_heads(like, *tensor.shape[1:]).copy_(tensor)


def new_heads_strides(shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    """The strides of `new_heads(like, *shape[1:])`."""
    _, heads, rows, dim = shape
    if like.stride(1) < like.stride(2):
        return heads * rows * dim, dim, heads * dim, 1
    return heads * rows * dim, rows * dim, dim, 1
