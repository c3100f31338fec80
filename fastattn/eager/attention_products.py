"""The backward of plain attention by matrix products, for 16-bit numbers on CPUs with tiles for them (AMX).

PyTorch's fused backward takes 64 query rows at a time below a length of 768, too few for those tiles. Here the scores of some
heads at a time exist as a whole, and what it rounds is rounded: P and dS to 16 bits before the three products that they are in,
nothing else. Two sums cost no pass of their own, since they ride on the products as one more column of the factors:

    S - LSE  = [scale·q, -lse, 1] [k, 1, b]ᵀ          b: what is added to all scores of a key
    scale·(dP - delta) = scale·[do, -delta] [v, 1]ᵀ   delta = Σ do·o
    P = exp(S - LSE),  dS = P · scale · (dP - delta),  dv = Pᵀ do,  dq = dS k,  dk = dSᵀ q

`python -m bench.report attention` compares the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.eager.exponential import LEAST_EXPONENT
from fastattn.eager.products import has_tiles
from fastattn.layout import new_gradient

_LARGEST = 1 << 14  # largest length x head_dim for which this is faster than PyTorch's backward
_LARGEST_GROUP = 1 << 21  # most scores of the query heads that share a key head for which it is
_SCORES = 1 << 22  # of the heads that are done together: 16 MB of fp32
_HALVED = 128  # rows from which on the half of the rows that sees half of the keys is done by itself


def is_small(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's fused backward in bf16 takes blocks too small for the CPU's products of 16-bit numbers."""
    return max(query.shape[2], key.shape[2]) * query.shape[3] <= _LARGEST


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `backward` can do it, and faster."""
    if query.dtype != torch.bfloat16:
        return False
    (_, heads, rows, dim), (_, kv_heads, columns, _) = query.shape, key.shape
    small = is_small(query, key) and heads // kv_heads * rows * columns <= _LARGEST_GROUP
    return dim == value.shape[3] and small and has_tiles()


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the layouts of query, key and value.

    query, grad_out, out: (B, Hq, Nq, D); key, value: (B, Hkv, Nk, D); lse: fp32 (B, Hq, Nq), finite; key_bias: (B or 1, 1, 1, Nk)
    added to the scores, or None; is_causal: row i sees the keys up to i.
    """
    dq, dk, dv = map(new_gradient, (query, key, value))
    (batch, heads, rows, _), kv_heads = query.shape, key.shape[1]
    group = heads // kv_heads
    head_scores = group * rows * key.shape[2]
    some_heads = max(1, min(kv_heads, _SCORES // head_scores))
    samples = max(1, min(batch, _SCORES // (kv_heads * head_scores)))
    room = query.new_empty(2, samples * some_heads * head_scores, dtype=torch.float32)
    low_room = room.new_empty(room.shape, dtype=query.dtype)
    for first in range(0, batch, samples):
        for head in range(0, kv_heads, some_heads):
            part = slice(first, first + samples)
            kv = part, slice(head, head + some_heads)
            q = part, slice(head * group, (head + some_heads) * group)
            bias = key_bias if key_bias is None or len(key_bias) == 1 else key_bias[part]
            _of_heads(
                grad_out[q], query[q], key[kv], value[kv], out[q], lse[q], dq[q], dk[kv], dv[kv],
                room, low_room, is_causal, scale, bias,
            )  # fmt: skip
    return dq, dk, dv


def _of_heads(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    room: Tensor, low_room: Tensor, is_causal: bool, scale: float, key_bias: Tensor | None,
) -> None:  # fmt: skip
    """Writes dq, dk and dv of some heads of some samples."""
    (batch, heads, rows, dim), (_, kv_heads, columns, _) = query.shape, key.shape
    # the query heads of a key head stand one below the other
    products, stacked = batch * kv_heads, heads // kv_heads * rows
    k, v, q, do = (t.new_empty(*t.shape[:3], dim + 1, dtype=torch.float32) for t in (key, value, query, grad_out))
    k[..., :dim], v[..., :dim], q[..., :dim], do[..., :dim] = key, value, query, grad_out
    k[..., dim] = v[..., dim] = 1.0
    if key_bias is not None:
        visible = (key_bias > -math.inf).float()
        added = key_bias.float().masked_fill(visible == 0.0, 0.0).mT.expand(batch, kv_heads, columns, 1)
        k = torch.cat([k, added], 3)
    k, v = (t.view(products, columns, -1).mT for t in (k, v))

    torch.neg((do[..., :dim] * out).sum(-1), out=do[..., dim])
    do *= scale
    q[..., :dim] *= scale
    q = q if key_bias is None else torch.cat([q, q.new_ones(*q.shape[:3], 1)], 3)
    torch.neg(lse, out=q[..., dim])

    size = products * stacked * columns
    p_low, ds_low = (part[:size].view(batch, heads, rows, columns) for part in low_room)
    half = rows // 2 if is_causal and rows >= _HALVED else 0
    for block in (slice(0, half), slice(half, rows)) if half else (slice(0, rows),):
        seen = min(block.stop, columns) if is_causal else columns
        shape = products, (block.stop - block.start) * heads // kv_heads, seen
        p, ds = (part[: math.prod(shape)].view(shape) for part in room)
        torch.bmm(q[:, :, block].reshape(*shape[:2], -1), k[..., :seen], out=p)
        p.clamp_(LEAST_EXPONENT, 1.0).exp_()  # (a hidden key may have any score)
        of_rows = batch, heads, -1, seen
        if key_bias is not None:
            p.view(of_rows).mul_(visible[..., :seen])
        if is_causal:
            p.view(of_rows).tril_(block.start)
        torch.bmm(do[:, :, block].reshape(*shape[:2], -1), v[..., :seen], out=ds).mul_(p)
        for low, part in ((p_low, p), (ds_low, ds)):
            low[:, :, block, :seen] = part.view(of_rows)
            low[:, :, block, seen:] = 0.0

    p, ds = (low.view(products, stacked, columns) for low in (p_low, ds_low))
    q, do = (t.reshape(products, stacked, dim) for t in (query, grad_out))
    dq.copy_(torch.bmm(ds, key.reshape(products, columns, dim)).view(query.shape))
    dk.copy_(torch.bmm(ds.mT, q).view(key.shape))
    dv.copy_(torch.bmm(p.mT, do).view(value.shape))
