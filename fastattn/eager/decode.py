"""Attention over a cache of keys and values in PyTorch: attention.py on views of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.eager import attention
from fastattn.layout import new_output
from fastattn.score_rules import ScoreRules


def append(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, length: int,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Writes key and value behind what the caches hold. Shapes as in `fastattn.ops.decode`."""
    batch, _, num_new, _ = key.shape
    if lengths is None and block_table is None:
        key_cache[:batch, :, length : length + num_new].copy_(key)
        value_cache[:batch, :, length : length + num_new].copy_(value)
        return
    start = torch.full((batch,), length, device=key.device) if lengths is None else lengths.long() + length
    positions = start[:, None] + torch.arange(num_new, device=key.device)
    if block_table is None:
        where = torch.arange(batch, device=key.device)[:, None]
    else:
        where = block_table.long().gather(1, positions // key_cache.shape[2])
        positions = positions % key_cache.shape[2]
    key_cache[where, :, positions] = key.transpose(1, 2)
    value_cache[where, :, positions] = value.transpose(1, 2)


def _of_sequence(cache: Tensor, block_table: Tensor | None, index: int, start: int, end: int) -> Tensor:
    """(1, Hkv, end - start, D): a view, or what the pages of a paged cache hold."""
    if block_table is None:
        return cache[index : index + 1, :, start:end]
    first = start // cache.shape[2]
    pages = cache[block_table[index, first : -(-end // cache.shape[2])].long()]  # (pages, Hkv, page_size, D)
    before = first * cache.shape[2]
    return pages.transpose(0, 1).flatten(1, 2)[None, :, start - before : end - before]


def forward(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor | None, more: int, block_table: Tensor | None,
    leftpad: Tensor | None, rules: ScoreRules, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). A sequence ends at lengths + more (`more` where lengths is None), and begins at `leftpad` or at 0."""
    batch = query.shape[0]
    if query.shape[2] == 1 and rules.window_right is not None:
        rules = rules._replace(window_right=None)  # one query stands at the last key
    slopes = rules.alibi_slopes
    if query.shape[2] == 1 and rules.window_left is rules.window_right is slopes is rules.sinks is None:
        # one query of each head, all at the same place: the heads that share a key head are rows, and read it once
        kv_heads = key_cache.shape[1]
        rows = query.reshape(batch, kv_heads, query.shape[1] // kv_heads, query.shape[3])
        if rows.shape[2] > 1:
            out, lse = forward(rows, key_cache, value_cache, lengths, more, block_table, leftpad, rules, precision)
            return out.reshape(*query.shape[:3], out.shape[3]), lse.reshape(query.shape[:3])
    ends = [more] * batch if lengths is None else [more + n for n in lengths.tolist()]
    places = list(zip([0] * batch if leftpad is None else leftpad.tolist(), ends))
    if len(set(places)) == 1 and block_table is None:
        seen = slice(*places[0])
        return attention.forward(query, key_cache[:batch, :, seen], value_cache[:batch, :, seen], rules, precision)
    out = new_output(query, value_cache.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for i, place in enumerate(places):
        k, v = (_of_sequence(cache, block_table, i, *place) for cache in (key_cache, value_cache))
        own = rules if slopes is None else rules._replace(alibi_slopes=slopes[i : i + 1])
        out[i : i + 1], lse[i : i + 1] = attention.forward(query[i : i + 1], k, v, own, precision)
    return out, lse


def explain(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor | None) -> list[str]:
    """How `forward` does this call, in words."""
    if block_table is not None:
        return ["attention's way, sequence by sequence, on a copy of its pages"]
    return ["attention's way on views of the cache; sequence by sequence where lengths differ"]
