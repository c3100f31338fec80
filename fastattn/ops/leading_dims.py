"""The leading dimensions of `torch.nn.functional.scaled_dot_product_attention` as (batch, heads)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.checks import FLOAT_DTYPES, check_same_device, check_tensor


def four_dims(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """query (B, Hq, Nq, D), key, value, the mask, broadcastable to (B, Hq, Nq, Nk), and the result's leading dimensions."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions (length, head_dim), got shape {tuple(tensor.shape)}"
            )
    leading: tuple[int, ...] = tuple(query.shape[:-2])
    same = len(leading) == 2 and query.shape[0] == key.shape[0] and key.shape[:-2] == value.shape[:-2]
    if not (same and key.dim() == 4 and (enable_gqa or query.shape[1] == key.shape[1])):
        query, key, value, leading = _broadcast(query, key, value, enable_gqa)
    if attn_mask is None:
        return query, key, value, None, leading
    check_tensor("attn_mask", attn_mask, (torch.bool, *FLOAT_DTYPES))
    check_same_device(query=query, attn_mask=attn_mask)
    full = (*leading, query.shape[2], key.shape[2])
    if attn_mask.dim() > len(full) or any(s not in (1, f) for s, f in zip(attn_mask.shape[::-1], full[::-1])):
        raise ValueError(f"attn_mask must broadcast to (..., Nq, Nk) = {full}, got shape {tuple(attn_mask.shape)}")
    if len(leading) > 2 and attn_mask.dim() > 3:
        attn_mask = attn_mask.expand(full).reshape(*query.shape[:2], *full[-2:])
    return query, key, value, attn_mask, leading


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    shapes = [tuple(t.shape) for t in (query, key, value)]
    got = "query {}, key {}, value {}".format(*shapes)
    try:
        batches = torch.broadcast_shapes(*(shape[:-3] for shape in shapes))
    except RuntimeError:
        raise ValueError(f"the batch dimensions of query, key and value must broadcast, got {got}") from None
    heads, *kv_heads = (shape[-3] if len(shape) > 2 else 1 for shape in shapes)
    if enable_gqa:
        if 0 in kv_heads or any(heads % n for n in kv_heads):
            raise ValueError(f"the query's heads must be a multiple of the key's and of the value's, got {got}")
    else:
        given = (heads, *kv_heads)
        heads = 0 if 0 in given else max(given)
        if any(n not in (1, heads) for n in given):
            raise ValueError(f"query, key and value must have the same heads, or 1, without enable_gqa=True, got {got}")
    kept = kv_heads[0] if kv_heads[0] == kv_heads[1] else heads  # heads that several share are read once
    batch = math.prod(batches)
    spread = [
        _with_heads(t, n).expand(*batches, n, -1, -1).reshape(batch, n, *t.shape[-2:])
        for t, n in zip((query, key, value), (heads, kept, kept))
    ]
    return spread[0], spread[1], spread[2], () if max(map(len, shapes)) == 2 else (*batches, heads)


def _with_heads(x: Tensor, heads: int) -> Tensor:
    """x (..., H, N, D) or (N, D) with this many heads, each repeated, or one that stays to be expanded."""
    if x.dim() == 2 or x.shape[-3] in (1, heads):
        return x
    return x.repeat_interleave(heads // x.shape[-3], -3)
