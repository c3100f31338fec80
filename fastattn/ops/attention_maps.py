"""`attention_weights` and `attention_column_sums`: looking inside attention without its N × N matrix. In PyTorch everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import BlockMask
from fastattn.checks import is_integer
from fastattn.eager import attention_maps as eager
from fastattn.ops.attention import RULES_SCHEMA, canonical, check_window, rule_arguments, rules_of
from fastattn.ops.distributed import in_shares, is_distributed
from fastattn.ops.library import call, define, differentiate, needs_composite, tensors_only
from fastattn.score_rules import ScoreRules


def _weights(query: Tensor, key: Tensor, rows: Sequence[int] | None, *rules: Any) -> Tensor:
    return eager.weights(query, key, rules_of(*rules), rows)


def _weights_fake(query: Tensor, key: Tensor, rows: Sequence[int] | None, *rules: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], query.shape[2] if rows is None else len(rows), key.shape[2]))


def _weights_backward(
    grad: Tensor, query: Tensor, key: Tensor, rows: Sequence[int] | None, *rest: Any
) -> tuple[Tensor, ...]:
    *rules, need_bias, need_sinks = rest
    return tensors_only(grad, *eager.backward(grad, query, key, rules_of(*rules), rows, need_bias, need_sinks))


def _weights_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, rows: Sequence[int] | None, *rest: Any
) -> tuple[Tensor, ...]:
    *rules, need_bias, need_sinks = rest
    bias, sinks = rules[2] if need_bias else None, rules[4] if need_sinks else None
    given = (query, key, bias, sinks)
    return tensors_only(grad, *(None if t is None else t.new_empty(t.shape) for t in given))


weights_op = define(
    f"attention_weights(Tensor query, Tensor key, int[]? rows, {RULES_SCHEMA}) -> Tensor", _weights, _weights_fake
)
weights_backward_op = define(
    f"attention_weights_backward(Tensor grad, Tensor query, Tensor key, int[]? rows, {RULES_SCHEMA}, bool need_bias, "
    "bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor)",
    _weights_backward,
    _weights_backward_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if grad_outputs[0] is None:  # behind a module's backward hook, weights that nobody used
        return []
    need_bias, need_sinks = needs[5], needs[7]
    dq, dk, dbias, dsinks = call(weights_backward_op, grad_outputs[0], *arguments, need_bias, need_sinks)
    pairs = dbias if need_bias else None, dsinks if need_sinks else None
    return dq if needs[0] else None, dk if needs[1] else None, None, None, None, pairs[0], None, pairs[1]


def _double_gradient(
    needs: Sequence[bool], grad_grads: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad, query, key, rows, *rules, need_bias, need_sinks = arguments
    taken = [True, True, need_bias, need_sinks]
    grads = [g if t else None for g, t in zip(grad_grads, taken)]
    d_grad, dq, dk, dbias, dsinks = eager.double_backward(grads, taken, grad, query, key, rules_of(*rules), rows)
    return d_grad, dq, dk, None, None, None, dbias, None, dsinks


differentiate(weights_op, _gradient)
differentiate(weights_backward_op, _double_gradient)


def weights_of(query: Tensor, key: Tensor, rules: ScoreRules, rows: list[int] | None = None) -> Tensor:
    """The weights of canonical arguments: the op, or its plain definition inside transforms and forward-mode AD."""
    if needs_composite(query, key, rules.bias, rules.sinks):
        if is_distributed(query, key, rules.bias, rules.sinks):
            return in_shares(lambda q, k, _, rules: (weights_of(q, k, rules, rows),), query, key, key, rules)[0]
        return eager.weights(query, key, rules, rows)
    return call(weights_op, query, key, rows, *rule_arguments(rules))


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
        TypeError, ValueError: as `attention`; a row that is no integer or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 8, 10_000, 64)
        >>> fastattn.attention_weights(q, k, rows=[0, 9_999], causal=True).shape
        torch.Size([1, 8, 2, 10000])
    """
    query, key, rules = _rules(
        query, key, causal, window, softcap, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, scale=scale
    )
    return weights_of(query, key, rules, None if rows is None else _chosen(rows, query.shape[2]))


def _chosen(rows: Sequence[int] | Tensor, count: int) -> list[int]:
    """The rows as a list, checked."""
    listed = rows.tolist() if hasattr(rows, "tolist") else rows
    if not isinstance(listed, Iterable):
        raise TypeError(f"rows must be a sequence of integers in [0, {count}), the query's rows, got {rows!r}")
    chosen = list(listed)
    for row in chosen:
        if not is_integer(row):
            raise TypeError(f"rows must be integers, got {type(row).__name__}")
        if not 0 <= row < count:
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
    if is_distributed(query, key, rules.bias, rules.sinks):
        return in_shares(lambda q, k, _, rules: (eager.column_sums(q, k, rules),), query, key, key, rules)[0]
    return eager.column_sums(query, key, rules)


def explain(function: Any, *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    return ["matrix products of PyTorch, a block of rows at a time, on every backend"]
