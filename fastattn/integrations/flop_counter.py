"""FLOPs of our ops for `torch.utils.flop_counter.FlopCounterMode`, which counts ops that it does not know as 0.

    from fastattn.integrations import flop_counter
    flop_counter.register()                          # before the mode is made
    with FlopCounterMode() as counter:
        model(x).sum().backward()

Counted is what PyTorch counts of its own: two operations for each multiplication of a matrix product, and in attention all pairs of
queries and keys, whatever is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The formulas have the names and take the arguments of the ops; of tensors, PyTorch gives the shapes.
Shape = tuple[int, ...]


def register() -> None:
    """Teach the counter our ops. May be called again."""
    from torch.utils import flop_counter

    ops = torch.ops.fastattn
    if ops.linear in flop_counter.flop_registry:
        return
    formulas: list[Callable[..., int]] = [
        *(linear, linear_backward, feed_forward, feed_forward_backward, linear_cross_entropy),
        *(attention, attention_backward, attention_weights, attention_weights_backward),
    ]
    of_numbers: list[Callable[..., int]] = [varlen_attention, varlen_attention_backward, kv_cache_attention]
    for formula in (*formulas, *of_numbers):
        operator = getattr(ops, formula.__name__)
        flop_counter.register_flop_formula(operator, get_raw=formula in of_numbers)(formula)


def _product(input: Shape, weight: Shape) -> int:
    """X Wᵀ of (..., in) and (out, in), rows · in · out multiplications; and as many for each of dX and dW."""
    return 2 * math.prod(input[:-1]) * math.prod(weight)


def _is_empty(shape: Shape) -> bool:
    """Whether an op returned "nothing": one dimension without numbers."""
    return len(shape) == 1


def linear(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(input, weight)


def linear_backward(
    grad: Shape, input: Shape, weight: Shape, bias: Any, z: Shape, activation: str, needs: Sequence[bool], **_: Any
) -> int:
    repeated = activation != "identity" and _is_empty(z)
    return _product(input, weight) * (needs[0] + needs[1] + repeated)


def feed_forward(
    input: Shape, weight1: Shape, bias1: Any, gate: Shape | None, gate_bias: Any, weight2: Shape, *_: Any, **__: Any
) -> int:
    return _product(input, weight1) * (1 if gate is None else 2) + _product(input, weight2)


def feed_forward_backward(
    grad: Shape, input: Shape, weight1: Shape, bias1: Any, gate: Shape | None, gate_bias: Any, weight2: Shape, bias2: Any,
    seed: Any, z: Shape, g: Shape, hidden: Shape, activation: str, dropout_p: float, needs: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    of_first, of_second = _product(input, weight1), _product(grad, weight2)
    layers = 1 if gate is None else 2
    inner = any(needs[:5])
    repeated = _is_empty(z) or (not inner and needs[5] and _is_empty(hidden))
    return of_first * (layers * (needs[0] + repeated) + needs[1] + needs[3]) + of_second * (inner + needs[5])


def linear_cross_entropy(input: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    needs = rest[-3:]
    return _product(input, weight) * (1 + needs[0] + needs[1])


def _pairs(query: Shape, key: Shape) -> int:
    """2 · B · Hq · Nq · Nk"""
    return 2 * math.prod(query[:3]) * key[2]


def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return _pairs(query, key) * (query[3] + value[3])


def attention_backward(grad: Shape, grad_lse: Any, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Q Kᵀ, dQ and dK; dP and dV."""
    return _pairs(query, key) * (3 * query[3] + 2 * value[3])


def _of_rows(query: Shape, rows: Sequence[int] | None) -> Shape:
    return query if rows is None else (*query[:2], len(rows), query[3])


def attention_weights(query: Shape, key: Shape, rows: Sequence[int] | None, *_: Any, **__: Any) -> int:
    return _pairs(_of_rows(query, rows), key) * query[3]


def attention_weights_backward(
    grad: Shape, query: Shape, key: Shape, rows: Sequence[int] | None, *_: Any, **__: Any
) -> int:
    return 3 * _pairs(_of_rows(query, rows), key) * query[3]


def _packed_pairs(query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """2 · Hq · Σ Nq · Nk of packed sequences, (1, H, T, D), whose offsets are read."""
    return 2 * query.shape[1] * int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: Any, sinks: Any, seed: Any, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _packed_pairs(query, cu_seqlens_q, cu_seqlens_k) * (query.shape[3] + value.shape[3])


def varlen_attention_backward(
    grad: Tensor, grad_lse: Any, query: Tensor, key: Tensor, value: Tensor, out: Any, lse: Any, slopes: Any, sinks: Any,
    seed: Any, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _packed_pairs(query, cu_seqlens_q, cu_seqlens_k) * (3 * query.shape[3] + 2 * value.shape[3])


def kv_cache_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor | None, more: int, *_: Any, **__: Any
) -> int:
    """The lengths, where they are a tensor, are read."""
    batch, heads, rows, dim = query.shape
    keys = batch * more + (0 if lengths is None else int(lengths.sum()))
    return 2 * heads * rows * keys * (dim + value_cache.shape[-1])
