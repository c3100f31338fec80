"""The functions of the package flash-attn, in their layouts and with their defaults, over fastattn.

    from fastattn.integrations.flash_attn import flash_attn_func      # instead of: from flash_attn import flash_attn_func

Tensors are (batch, length, heads, head_dim). A window side of -1 is unbounded; causal attention is aligned at the bottom
right; `deterministic` is accepted and always true here; where `return_attn_probs` is set the result is (out, lse, None):
the matrix of probabilities is never kept. Interface: https://github.com/Dao-AILab/flash-attention (README).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.checks import check_integer, check_pair, check_rank, check_shape, check_tensor
from fastattn.ops.attention import attention
from fastattn.ops.decode import attention_with_kv_cache, check_block_table
from fastattn.ops.rotary import rotary
from fastattn.ops.varlen import varlen_attention
from fastattn.tracing import readable

Result = Tensor | tuple[Tensor, Tensor, None]


def _window(window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    check_pair("window_size", window_size, "must be (left, right), -1 where unbounded")
    left, right = window_size
    return None if left == -1 else left, None if right == -1 else right


def _unpack(name: str, packed: Tensor, *layout: str | int) -> tuple[Tensor, ...]:
    """The parts of `packed` (*layout, heads, head_dim), as views; their number is the layout's last."""
    check_tensor(name, packed)
    axis, parts = len(layout) - 1, layout[-1]
    if packed.dim() != axis + 3 or packed.shape[axis] != parts:
        shape = ", ".join(map(str, (*layout, "heads", "head_dim")))
        raise ValueError(f"{name} must have shape ({shape}), got {tuple(packed.shape)}")
    return packed.unbind(axis)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (B, Nq, Hq, D) over k (B, Nk, Hkv, D) and v (B, Nk, Hkv, Dv).

    Returns:
        (B, Nq, Hq, Dv), or with `return_attn_probs` (that, lse (B, Hq, Nq), None).

    Example:
        >>> q, k, v = (torch.randn(2, 128, 8, 64) for _ in range(3))
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        check_rank(name, tensor, 4, "(batch, length, heads, head_dim)")
    out, lse = attention(
        *(t.transpose(1, 2) for t in (q, k, v)), causal=causal, window=_window(window_size), alibi_slopes=alibi_slopes,
        softcap=softcap or None, dropout_p=dropout_p, scale=softmax_scale, return_lse=True,
    )  # fmt: skip
    return (out.transpose(1, 2), lse, None) if return_attn_probs else out.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (B, N, 3, H, D); nothing is copied."""
    q, k, v = _unpack("qkv", qkv, "batch", "length", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q (B, Nq, Hq, D) and kv (B, Nk, 2, Hkv, D); nothing is copied."""
    k, v = _unpack("kv", kv, "batch", "length", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention over packed sequences q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv); see `fastattn.varlen_attention`.

    With `block_table`, int32 (B, pages of a sequence), k and v are (pages, page_size, Hkv, D): position p of sequence b lies in
    row p % page_size of page block_table[b, p // page_size]. They are copied into one packed tensor, which has gradients too.

    Returns:
        (Tq, Hq, Dv), or with `return_attn_probs` (that, lse (Hq, Tq), None).
    """
    if block_table is not None:
        k, v = _from_pages(k, v, cu_seqlens_k, max_seqlen_k, block_table)
    out, lse = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, window=_window(window_size),
        alibi_slopes=alibi_slopes, softcap=softcap or None, dropout_p=dropout_p, scale=softmax_scale, return_lse=True,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def _from_pages(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows of k and v (pages, page_size, Hkv, D) that the sequences own, packed: (Tk, Hkv, D).

    On a GPU, whose lengths the host does not wait for, B · max_seqlen_k rows; behind the last sequence's end they are anything.
    """
    for name, pages in (("k", k), ("v", v)):
        check_tensor(name, pages)
        check_rank(name, pages, 4, "(pages, page size, heads, head_dim) with a block_table")
    check_shape("v", v, (*k.shape[:3], v.shape[3]), "as k")
    check_tensor("cu_seqlens_k", cu_seqlens_k, (torch.int32, torch.int64))
    check_rank("cu_seqlens_k", cu_seqlens_k, 1, "(batch + 1,)")
    check_block_table(block_table)
    batch, size = len(cu_seqlens_k) - 1, k.shape[1]
    max_seqlen_k = check_integer("max_seqlen_k", max_seqlen_k)
    if block_table.shape[0] != batch or not 0 <= max_seqlen_k <= block_table.shape[1] * size:
        raise ValueError(
            f"block_table must have a row for each of the {batch} sequences and pages for max_seqlen_k {max_seqlen_k} rows, "
            f"got {tuple(block_table.shape)} pages of {size} rows"
        )
    starts, most = cu_seqlens_k.long(), batch * max_seqlen_k
    rows = torch.arange(min(most, int(starts[-1])) if readable(starts) else most, device=k.device)
    sequence = (torch.searchsorted(starts, rows, right=True) - 1).clamp(0, batch - 1)
    position = (rows - starts[sequence]).clamp(0, max_seqlen_k - 1)
    page = block_table[sequence, position // size].long()
    if readable(page) and (wrong := page[(page < 0) | (page >= len(k))]).numel():
        raise ValueError(f"block_table must hold page numbers in [0, {len(k)}), got {wrong[0].item()}")
    page = torch.where(rows < starts[-1], page, 0)  # (behind a sequence's end a table may hold anything)
    return k[page, position % size], v[page, position % size]


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D); nothing is copied."""
    q, k, v = _unpack("qkv", qkv, "length", 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q (Tq, Hq, D) and kv (Tk, 2, Hkv, D); nothing is copied."""
    k, v = _unpack("kv", kv, "length", 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, Nq, Hq, D) over caches (≥ B, capacity, Hkv, D), to which k and v (B, new, Hkv, D) are appended.

    See `fastattn.attention_with_kv_cache`. `cache_seqlens` None means that the caches are full; `cache_batch_idx` (B,)
    gives the number of each sequence's cache; with `block_table` the caches are (pages, page_size, Hkv, D). `cache_leftpad`,
    int32 (B,): rows in front of a sequence's first key; unlike in flash-attn, also of paged caches.
    With rotary tables, k is turned by its positions, and q by its own or, where attention is neither causal nor local, by
    the position `cache_seqlens` alone. `num_splits` is accepted: the number of splits follows from the shapes here.

    Returns:
        (B, Nq, Hq, Dv), or with `return_softmax_lse` (that, lse (B, Hq, Nq)).

    Raises:
        ValueError: `cache_batch_idx` with `block_table`; k without `cache_seqlens`; rotary tables without k.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if tensor is not None:
            check_tensor(name, tensor)
            check_rank(name, tensor, 4, "(batch or pages, length, heads, head_dim)")
    window = _window(window_size)
    if cache_leftpad is not None:
        check_tensor("cache_leftpad", cache_leftpad, (torch.int32, torch.int64))
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must say where k and v are appended, got None")
        if block_table is not None:
            check_block_table(block_table)
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(
                "cache_batch_idx must be None with a block_table, which says where each sequence's keys lie"
            )
        check_tensor("cache_batch_idx", cache_batch_idx, (torch.int32,))
        check_shape("cache_batch_idx", cache_batch_idx, (q.shape[0],), "one cache per sequence")
        _check_places(cache_batch_idx, k_cache.shape[0])
        block_table = cache_batch_idx[:, None]  # each sequence has one page, as long as the cache
    query, key_cache, value_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    key, value = (None if t is None else t.transpose(1, 2) for t in (k, v))
    if rotary_cos is not None or rotary_sin is not None:
        if key is None or rotary_cos is None or rotary_sin is None:
            raise ValueError("rotary_cos and rotary_sin must be given together, and with k and v")
        by_position = causal or window != (None, None)
        held = cache_seqlens if cache_leftpad is None else cache_seqlens - cache_leftpad
        query, key = _rotated(query, key, rotary_cos, rotary_sin, held, rotary_interleaved, by_position)
    out, lse = attention_with_kv_cache(
        query, key_cache, value_cache, cache_seqlens, key=key, value=value, block_table=block_table, causal=causal,
        window=window, alibi_slopes=alibi_slopes, softcap=softcap or None, scale=softmax_scale, cache_leftpad=cache_leftpad,
        return_lse=True,
    )  # fmt: skip
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


def _check_places(cache_batch_idx: Tensor, caches: int) -> None:
    if not readable(cache_batch_idx):
        return
    wrong = cache_batch_idx[(cache_batch_idx < 0) | (cache_batch_idx >= caches)]
    if wrong.numel():
        raise ValueError(f"cache_batch_idx must be in [0, {caches}), the caches, got {wrong[0].item()}")


def _rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | int, interleaved: bool, by_position: bool
) -> tuple[Tensor, Tensor]:
    """query (B, Hq, Nq, D) and key (B, Hkv, new, D), rotated as flash-attn does."""
    key, _ = rotary(key, None, cos, sin, offset=lengths, interleaved=interleaved)
    if by_position:
        return rotary(query, None, cos, sin, offset=lengths, interleaved=interleaved)[0], key
    positions = lengths if isinstance(lengths, Tensor) else torch.full((query.shape[0],), lengths, device=query.device)
    positions = positions[:, None].expand(-1, query.shape[2])
    return rotary(query, None, cos, sin, positions=positions, interleaved=interleaved)[0], key
