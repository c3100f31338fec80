"""`attention_with_kv_cache`: a few new queries over cached keys and values, appended in place. For inference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import backend
from fastattn.checks import (
    FLOAT_DTYPES,
    LARGEST_NUMBER,
    check_integer,
    check_rank,
    check_same_device,
    check_scale,
    check_shape,
    check_softcap,
    check_tensor,
    name_of,
)
from fastattn.eager import attention_fused
from fastattn.layout import new_output
from fastattn.ops.attention import MAX_HEAD_DIM, check_sinks, check_slopes, check_window, row_contiguous
from fastattn.ops.library import call, define
from fastattn.ops.rotary import rotary
from fastattn.score_rules import ScoreRules
from fastattn.tracing import listening, readable


def _append(key_cache: Tensor, *rest: Any) -> None:
    with backend.device_guard(key_cache.device):
        backend.implementation("decode", key_cache.device).append(key_cache, *rest)
    for cache in (key_cache, rest[0]):
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)  # a kernel's writes are invisible to autograd


def _attend(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *caches, slopes, sinks, scale, left, right, softcap = rest
    rules = ScoreRules(None, None, slopes, sinks, None, scale, left, right, softcap, 0.0)
    with backend.device_guard(query.device):
        launcher = backend.implementation("decode", query.device).forward
        return launcher(query, *caches, rules, backend.input_precision(query.dtype))


def _attend_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return new_output(query, value_cache.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


append_op = define(
    "kv_cache_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor? lengths, SymInt length, "
    "Tensor? block_table) -> ()",
    _append,
    lambda *arguments: None,
)
attend_op = define(
    "kv_cache_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? lengths, SymInt more, Tensor? block_table, "
    "Tensor? leftpad, Tensor? alibi_slopes, Tensor? sinks, float scale, SymInt? window_left, SymInt? window_right, float softcap) "
    "-> (Tensor, Tensor)",
    _attend,
    _attend_fake,
)


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """What does not depend on paging."""
    for name, tensor, layout in (
        ("query", query, "(batch, heads, length, head_dim)"),
        ("key_cache", key_cache, "(batch or pages, heads, capacity or page size, head_dim)"),
        ("value_cache", value_cache, "(batch or pages, heads, capacity or page size, head_dim)"),
    ):
        check_tensor(name, tensor)
        check_rank(name, tensor, 4, layout)
    if not query.dtype == key_cache.dtype == value_cache.dtype:
        dtypes = ", ".join(name_of(t.dtype) for t in (query, key_cache, value_cache))
        raise TypeError(f"query, key_cache and value_cache must have one dtype, got {dtypes}")
    shapes = f"query {tuple(query.shape)}, key_cache {tuple(key_cache.shape)}, value_cache {tuple(value_cache.shape)}"
    if key_cache.shape[:3] != value_cache.shape[:3] or key_cache.shape[3] != query.shape[3]:
        raise ValueError(f"query, key_cache and value_cache do not fit together: {shapes}")
    if key_cache.shape[1] == 0 or query.shape[1] % key_cache.shape[1]:
        raise ValueError(f"the query's heads must be a multiple of the cache's heads: {shapes}")
    if not 1 <= query.shape[3] <= MAX_HEAD_DIM or not 1 <= value_cache.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in 1..{MAX_HEAD_DIM}: {shapes}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.stride(3) != 1 and cache.shape[3] != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {cache.stride()}")


def _check_new(key: Tensor | None, value: Tensor | None, query: Tensor, value_cache: Tensor) -> int:
    """The number of new keys of each sequence."""
    if key is None and value is None:
        return 0
    if key is None or value is None:
        missing = "key" if key is None else "value"
        raise ValueError(f"key and value must be given together, but {missing} is None")
    for name, tensor, dim in (("key", key, query.shape[3]), ("value", value, value_cache.shape[3])):
        check_tensor(name, tensor, (query.dtype,))
        check_rank(name, tensor, 4, "(batch, heads, new tokens, head_dim)")
        check_shape(name, tensor, (query.shape[0], value_cache.shape[1], key.shape[2], dim), "as key and the caches")
    return key.shape[2]


def _check_lengths(lengths: Tensor | int, batch: int, new: int, capacity: int) -> None:
    if isinstance(lengths, Tensor):
        check_tensor("cache_seqlens", lengths, (torch.int32, torch.int64))
        check_shape("cache_seqlens", lengths, (batch,), "one length per sequence")
        if not readable(lengths) or batch == 0:
            return
        values = lengths.tolist()
        shortest, longest = min(values), max(values)
    else:
        shortest = longest = lengths
    if shortest < 0 or longest + new > capacity:
        room = f"{capacity} fit" + (f" and {new} are new" if new else "")
        raise ValueError(f"cache_seqlens must be at least 0 and fit into the cache ({room}), got {lengths}")


def _check_leftpad(leftpad: Tensor, lengths: Tensor | int, batch: int) -> None:
    check_tensor("cache_leftpad", leftpad, (torch.int32, torch.int64))
    check_shape("cache_leftpad", leftpad, (batch,), "one number of rows per sequence")
    if readable(leftpad) and ((leftpad < 0) | (leftpad > lengths)).any():
        raise ValueError(f"cache_leftpad must be at least 0 and at most cache_seqlens, {lengths}, got {leftpad}")


def check_block_table(table: Tensor, batch: int | None = None) -> None:
    """Errors unless it is int32 (B, pages of a sequence); batch: what B has to be."""
    check_tensor("block_table", table, (torch.int32,))
    check_rank("block_table", table, 2, "(batch, pages of a sequence)")
    if batch is not None and table.shape[0] != batch:
        raise ValueError(f"block_table must have one row for each of the {batch} sequences, got {tuple(table.shape)}")


def _check_pages(table: Tensor, lengths: Tensor | int, new: int, leftpad: Tensor | None, cache: Tensor) -> None:
    """The page numbers of what the sequences hold; in front of and behind them a table may hold anything."""
    if not readable(table) or table.numel() == 0:
        return
    ends = (lengths[:, None] if isinstance(lengths, Tensor) else lengths) + new
    first_rows = torch.arange(table.shape[1], device=table.device) * cache.shape[2]
    read = first_rows < ends
    if leftpad is not None:
        read &= first_rows + cache.shape[2] > leftpad[:, None]
    wrong = table[read & ((table < 0) | (table >= cache.shape[0]))]
    if wrong.numel():
        raise ValueError(f"block_table must hold page numbers in [0, {cache.shape[0]}), got {wrong[0].item()}")


def _check_untracked(**tensors: Tensor | None) -> None:
    """ValueError where a gradient or a tangent, which would silently be lost, is asked for."""
    recorded = torch.is_grad_enabled()
    dual = not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0
    if not (recorded or dual):
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if recorded and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, and attention_with_kv_cache has none: use torch.no_grad()")
        if dual and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name} has a forward-mode tangent, and attention_with_kv_cache has none")


def _turned(
    query: Tensor, key: Tensor | None, new: int, lengths: Tensor | int, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, blind: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """query and key, rotated by their positions: the new keys come behind the cache, the last query is the last key.

    `blind`: rows in front of the first key see nothing, so that any position will do for them.
    """
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"rotary_cos and rotary_sin must be given together, but {missing} is None")
    if query.shape[2] == new:
        return rotary(query, key, cos, sin, offset=lengths, interleaved=interleaved)
    offset, positions = lengths + (new - query.shape[2]), None
    if blind and (isinstance(offset, Tensor) or offset < 0):
        steps = torch.arange(query.shape[2], device=query.device)
        first = offset[:, None] if isinstance(offset, Tensor) else offset
        offset, positions = 0, (first + steps).clamp(min=0)
    query, _ = rotary(query, None, cos, sin, positions=positions, offset=offset, interleaved=interleaved)
    return query, None if key is None else rotary(key, None, cos, sin, offset=lengths, interleaved=interleaved)[0]


def _by_torch(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, length: Tensor | int, key: Tensor | None, value: Tensor | None,
    scale: float | None,
) -> Tensor | None:  # fmt: skip
    """One new token of each sequence on the CPU, where it is two copies and one call of PyTorch's fused kernel; None where it
    is not, or where the arguments are wrong. The query heads that share a key head are rows of it, which reads the cache once.
    """
    if torch.compiler.is_compiling() or type(length) is not int or key is None or value is None:
        return None
    if scale is not None and not (type(scale) is float and -LARGEST_NUMBER <= scale <= LARGEST_NUMBER):
        return None
    tensors = (query, key_cache, value_cache, key, value)
    if any(type(t) is not Tensor for t in tensors):
        return None
    dtype, shape = query.dtype, query.shape
    if dtype not in FLOAT_DTYPES or any(t.dtype is not dtype or t.dim() != 4 or not t.is_cpu for t in tensors):
        return None
    batch, heads, num_queries, dim = shape
    (places, kv_heads, capacity, _), new = key_cache.shape, key.shape[2]
    fits = key_cache.shape == value_cache.shape and key.shape == value.shape == (batch, kv_heads, new, dim)
    if not fits or num_queries != 1 or key_cache.shape[3] != dim or not 0 < dim <= MAX_HEAD_DIM or batch > places:
        return None
    end = length + new
    if not 0 < end <= capacity or length < 0 or batch == 0 or kv_heads == 0 or heads == 0 or heads % kv_heads:
        return None
    if any(t.stride(3) != 1 for t in tensors) or 1 in query.stride()[:3]:  # (see `forward` in eager/attention.py)
        return None
    if listening() or torch._C._is_any_autocast_enabled():
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if torch.autograd.forward_ad._current_level >= 0 or not backend.eager_on_cpu():
        return None
    keys, values = key_cache[:batch, :, :end], value_cache[:batch, :, :end]
    keys[:, :, length:].copy_(key)
    values[:, :, length:].copy_(value)
    rows = query if heads == kv_heads else query.reshape(batch, kv_heads, heads // kv_heads, dim)
    out = attention_fused.forward(rows, keys, values, False, scale)[0]
    return out if heads == kv_heads else out.reshape(shape)


@overload
def attention_with_kv_cache(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | int, *, key: Tensor | None = ...,
    value: Tensor | None = ..., block_table: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., alibi_slopes: Tensor | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., scale: float | None = ..., rotary_cos: Tensor | None = ..., rotary_sin: Tensor | None = ...,
    rotary_interleaved: bool = ..., cache_leftpad: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention_with_kv_cache(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | int, *, key: Tensor | None = ...,
    value: Tensor | None = ..., block_table: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., alibi_slopes: Tensor | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., scale: float | None = ..., rotary_cos: Tensor | None = ..., rotary_sin: Tensor | None = ...,
    rotary_interleaved: bool = ..., cache_leftpad: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache of keys and values, to which new ones are appended in place. For inference.

    With `key` and `value`, they are first written behind the cache_seqlens[b] rows that the caches hold of sequence b.
    Then the queries attend, as in `attention`, to everything that the caches hold: cache_seqlens[b] rows and the new ones.
    `cache_seqlens` itself is left as it is. On a GPU the keys of each sequence are split among many programs, and the host
    never waits for the device.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; paging: Kwon et al. 2023, arXiv:2309.06180.

    Args:
        query: (B, Hq, Nq, D), float32, float16 or bfloat16: the last Nq tokens of each sequence.
        key_cache: (≥ B, Hkv, capacity, D), the same dtype, any strides, the last dimension contiguous; or, with
            `block_table`, (pages, Hkv, page_size, D). Hq must be a multiple of Hkv.
        value_cache: as key_cache, with Dv.
        cache_seqlens: rows of the caches that are in use: int32 or int64 (B,), or one int for all sequences.
        key: (B, Hkv, new tokens, D) to append, or None.
        value: (B, Hkv, new tokens, Dv), with `key`.
        block_table: int32 (B, pages of a sequence): position p of sequence b lies in row p % page_size of page
            block_table[b, p // page_size]. Two sequences may share a page that nothing is appended to.
        causal: default True here: a query sees the keys up to its own position; the last query stands at the last key.
        window, alibi_slopes, softcap, sinks, scale: as in `attention`.
        rotary_cos, rotary_sin: (positions, half), the tables of `fastattn.rotary`: query and `key` are first rotated
            by their positions in the sequence. The keys in the cache must have been rotated when they were appended.
        rotary_interleaved: which numbers are a pair, see `fastattn.rotary`.
        cache_leftpad: int32 or int64 (B,): the first rows of each sequence's cache that hold nothing, as of prompts padded on
            the left. They are never read (nor are pages that hold nothing else), and positions count from the row behind
            them; `cache_seqlens` counts them in.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out (B, Hq, Nq, Dv), and with `return_lse` also lse (B, Hq, Nq), float32.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device; a tensor that requires a gradient while
            gradients are recorded; lengths or page numbers out of range (checked on the CPU; on a GPU, what lies beyond
            the cache's end is neither written nor read).

    Example:
        >>> keys, values = torch.zeros(2, 3, 4, 256, 64).unbind()              # 3 sequences of up to 256 tokens
        >>> lengths = torch.tensor([17, 100, 0], dtype=torch.int32)
        >>> q, k, v = (torch.randn(3, h, 1, 64) for h in (8, 4, 4))
        >>> fastattn.attention_with_kv_cache(q, keys, values, lengths, key=k, value=v).shape
        torch.Size([3, 8, 1, 64])
    """
    unused = (
        block_table is window is alibi_slopes is softcap is sinks is rotary_cos is rotary_sin is cache_leftpad is None
    )
    if unused and not return_lse:
        plain = _by_torch(query, key_cache, value_cache, cache_seqlens, key, value, scale)
        if plain is not None:
            return plain
    _check_caches(query, key_cache, value_cache)
    batch = query.shape[0]
    new = _check_new(key, value, query, value_cache)
    sinks = None if sinks is None else check_sinks(sinks, query.shape[1])
    _check_untracked(query=query, key_cache=key_cache, value_cache=value_cache, key=key, value=value, sinks=sinks)
    capacity = key_cache.shape[2]
    if block_table is not None:
        check_block_table(block_table, batch)
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        capacity = capacity * block_table.shape[1]
    elif key_cache.shape[0] < batch:
        raise ValueError(f"key_cache has room for {key_cache.shape[0]} sequences, but query has {batch}")
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = check_integer("cache_seqlens", cache_seqlens)
    _check_lengths(cache_seqlens, batch, new, capacity)
    if cache_leftpad is not None:
        _check_leftpad(cache_leftpad, cache_seqlens, batch)
        cache_leftpad = cache_leftpad.contiguous()
    # (kernels know no stride of the lengths)
    lengths, length = (cache_seqlens.contiguous(), 0) if isinstance(cache_seqlens, Tensor) else (None, cache_seqlens)
    left, right = check_window(window, causal)
    check_softcap(softcap)
    if scale is not None:
        check_scale(scale)
    slopes = None if alibi_slopes is None else check_slopes(alibi_slopes, batch, query.shape[1])
    check_same_device(
        query=query, key_cache=key_cache, value_cache=value_cache, cache_seqlens=lengths, key=key, value=value,
        block_table=block_table, cache_leftpad=cache_leftpad, alibi_slopes=slopes, sinks=sinks,
    )  # fmt: skip
    if block_table is not None:
        _check_pages(block_table, cache_seqlens, new, cache_leftpad, key_cache)
    if rotary_cos is not None or rotary_sin is not None:
        _check_untracked(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
        blind = right == 0  # rows in front of the first key see none
        held = cache_seqlens if cache_leftpad is None else cache_seqlens - cache_leftpad
        query, key = _turned(query, key, new, held, rotary_cos, rotary_sin, rotary_interleaved, blind)
    if key is not None and value is not None:
        call(
            append_op, key_cache, value_cache, row_contiguous(key), row_contiguous(value), lengths, length, block_table
        )
    if scale is None:
        scale = query.shape[3] ** -0.5
    out, lse = call(
        attend_op, row_contiguous(query), key_cache, value_cache, lengths, length + new, block_table, cache_leftpad, slopes,
        sinks, float(scale), left, right, float(softcap or 0.0),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's function."""
    o = inspect.signature(function).bind(*args, **options).arguments
    caches = o["key_cache"], o["value_cache"]
    return backend.implementation("decode", o["query"].device).explain(o["query"], *caches, o.get("block_table"))
