"""`attention_weights` and `attention_column_sums`: looking inside attention without its N × N matrix. In PyTorch everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import BlockMask
from fastattn.checks import is_integer
from fastattn.eager import attention_maps
from fastattn.ops.attention import canonical, check_window


def _rules(query: Tensor, key: Tensor, causal: bool, window: Any, softcap: float | None, **options: Any) -> Any:
    left, right = check_window(window, causal)
    tensors = (options["mask"], options["bias"], options["alibi_slopes"], options["sinks"], options["scale"])
    query, key, _, rules = canonical(query, key, key, *tensors, left, right, softcap, 0.0)
    return query, key, rules


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    rows: Sequence[int] | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention weights P of chosen query rows: what `attention` multiplies the values with.

    Args:
        query: (B, Hq, Nq, D).
        key: (B, Hkv, Nk, D).
        rows: integers in [0, Nq), which rows to compute; None = all of them, an Nq × Nk matrix for each head.
        causal, window, mask, bias, alibi_slopes, softcap, sinks, scale: as in `attention`.

    Returns:
        (B, Hq, len(rows), Nk) in the query's dtype, differentiable. A row sums to 1, less what a sink takes; a row that sees
        nothing is 0.

    Raises:
        TypeError, ValueError: as `attention`; a row out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 8, 10_000, 64)
        >>> fastattn.attention_weights(q, k, rows=[0, 9_999], causal=True).shape
        torch.Size([1, 8, 2, 10000])
    """
    query, key, rules = _rules(
        query, key, causal, window, softcap, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, scale=scale
    )
    wanted = range(query.shape[2]) if rows is None else _chosen(rows, query.shape[2])
    return attention_maps.weights_of_rows(query, key, wanted, rules)


def _chosen(rows: Sequence[int] | Tensor, count: int) -> list[int]:
    """The rows as a list, checked."""
    listed = rows.tolist() if hasattr(rows, "tolist") else rows
    if not isinstance(listed, Iterable):
        raise ValueError(f"rows must be a sequence of integers in [0, {count}), the query's rows, got {rows!r}")
    chosen = list(listed)
    for row in chosen:
        if not is_integer(row) or not 0 <= row < count:
            raise ValueError(f"rows must be integers in [0, {count}), the query's rows, got {row!r}")
    return [int(row) for row in chosen]


@torch.no_grad()
def attention_column_sums(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """How much attention each key receives, Σ_i P_ij, in memory that grows with Nq + Nk. Not differentiable.

    Args: as `attention_weights`.

    Returns:
        (B, Hq, Nk), float32.

    Example:
        >>> q, k = torch.randn(2, 1, 8, 1_000, 64)
        >>> fastattn.attention_column_sums(q, k).sum(-1)[0, 0].round()       # each of the 1,000 rows gives 1
        tensor(1000.)
    """
    query, key, rules = _rules(
        query, key, causal, window, softcap, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, scale=scale
    )
    return attention_maps.column_sums(query, key, rules)


def explain(function: Any, *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    return ["matrix products of PyTorch, a block of rows at a time, on every backend"]
