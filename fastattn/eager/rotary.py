"""Rotary position embedding in plain PyTorch: the differentiable definition, and the CPU backend.

The launchers have the signatures of `fastattn/kernels/rotary.py`; the equations stand there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.layout import new_output


def definition(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool) -> Tensor:
    """`x` (B, H, N, D) rotated; cos and sin (B or 1, rows, half), positions (B or 1, N)."""
    c, s = (_of_tokens(table, positions, offset, x.shape[2]) for table in (cos, sin))
    if x.stride(1) < x.stride(2):  # a token's heads lie together: so they do in the result, without a copy
        return _turned(x.transpose(1, 2), c.transpose(1, 2), s.transpose(1, 2), interleaved).transpose(1, 2)
    return _turned(x, c, s, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`x` (..., D) rotated, with all the temporaries that automatic differentiation needs; cos and sin (..., half), fp32."""
    half = cos.shape[-1]
    a, b = (part.float() for part in _pairs(x, half, interleaved))
    rotated = (a * cos - b * sin, b * cos + a * sin)
    joined = (torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)).to(x.dtype)
    return joined if joined.shape == x.shape else torch.cat([joined, x[..., 2 * half :]], -1)


def rotate(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """(query, key) rotated, as `fastattn.ops.rotary` describes them."""
    c, s = (_of_tokens(table, positions, offset, query.shape[2]) for table in (cos, sin))
    s = -s if conjugate else s
    found = [None if x is None else rotated(x, c, s, interleaved, inplace) for x in (query, key)]
    assert found[0] is not None
    return found[0], found[1]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool) -> Tensor:
    """`x` (B, H, N, D) rotated; cos and sin: fp32, what (B, H, N, half) broadcasts with."""
    half = cos.shape[-1]
    out = x if inplace else new_output(x, x.shape[3])
    if not inplace and x.shape[3] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    a, b = _pairs(x, half, interleaved)
    out_a, out_b = _pairs(out, half, interleaved)
    if x.dtype == torch.float32 and not inplace:
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1.0)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    else:
        a, b = a.float(), b.float()
        new_a = torch.mul(a, cos).addcmul_(b, sin, value=-1.0)
        out_b.copy_(torch.mul(b, cos).addcmul_(a, sin))
        out_a.copy_(new_a)
    return out


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second numbers of the pairs."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _of_tokens(table: Tensor, positions: Tensor | None, offset: int, tokens: int) -> Tensor:
    """The rows of `table` for every token in fp32, (B or 1, 1, N, half)."""
    rows = table[:, offset : offset + tokens] if positions is None else table[0, positions]
    return rows.float()[:, None]


def explain(query: Tensor, cos: Tensor) -> list[str]:
    """How the halves are rotated, in words."""
    return [f"PyTorch, {2 * cos.shape[-1]} of {query.shape[3]} numbers of each head"]
