"""`varlen_attention`: attention over packed sequences, without padding.

Inside, packed tensors (T, H, D) are (1, H, T, D) views, so that kernels and launchers are those of `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import backend
from fastattn.checks import check_integer, check_rank, check_same_device, check_tensor
from fastattn.eager import varlen as eager
from fastattn.layout import Packing, new_gradient, new_output
from fastattn.ops.attention import canonical, check_slopes, check_window, row_contiguous
from fastattn.ops.library import call, define, differentiate, needs_composite, tensors_only
from fastattn.score_rules import ScoreRules
from fastattn.tracing import readable

_SCHEMA = (
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, SymInt? window_left, SymInt? window_right, float softcap, float dropout_p"
)


def _rules(arguments: Sequence[Any]) -> tuple[ScoreRules, Packing]:
    """The rules and the packing of an op's arguments."""
    return ScoreRules(None, None, *arguments[:3], *arguments[7:]), Packing(*arguments[3:7])


def _varlen(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    with backend.device_guard(query.device):
        launcher = backend.implementation("varlen", query.device).forward
        return launcher(query, key, value, *_rules(rules), backend.input_precision(query.dtype))


def _varlen_fake(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    return new_output(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def _varlen_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tensors, need_sinks = rest
    with backend.device_guard(grad_out.device):
        launcher = backend.implementation("varlen", grad_out.device).backward
        dq, dk, dv, dsinks = launcher(
            grad_out, *tensors[:6], *_rules(tensors[6:]), need_sinks, backend.input_precision(grad_out.dtype)
        )
    return tensors_only(grad_out, dq, dk, dv, dsinks)


def _varlen_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    slopes: Tensor | None, sinks: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = map(new_gradient, (query, key, value))
    return dq, dk, dv, sinks.new_empty(sinks.shape) if sinks is not None and rest[-1] else grad_out.new_empty(0)


varlen_op = define(
    f"varlen_attention(Tensor query, Tensor key, Tensor value, {_SCHEMA}) -> (Tensor, Tensor)", _varlen, _varlen_fake
)
varlen_backward_op = define(
    "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_SCHEMA}, bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor)",
    _varlen_backward,
    _varlen_backward_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    out, lse = outputs
    grad_out, grad_lse = grad_outputs
    grad_out = torch.zeros_like(out) if grad_out is None else row_contiguous(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    *grads, dsinks = call(
        varlen_backward_op, grad_out, grad_lse, *arguments[:3], out, lse, *arguments[3:], needs[4]
    )  # fmt: skip
    qkv = [g if need else None for g, need in zip(grads, needs)]
    return *qkv, None, dsinks if needs[4] else None


def _double_gradient(
    needs: Sequence[bool], grad_grads: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad_out, grad_lse, query, key, value, _, _, *rules, need_sinks = arguments
    taken = [True, True, True, need_sinks]
    d_out, d_lse, dq, dk, dv, dsinks = eager.double_backward(
        [g if t else None for g, t in zip(grad_grads, taken)], taken, grad_out, grad_lse, query, key, value, *_rules(rules)
    )  # fmt: skip
    return d_out, d_lse, dq, dk, dv, None, None, None, dsinks


differentiate(varlen_op, _gradient, keep_outputs=(0, 1))
differentiate(varlen_backward_op, _double_gradient)


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    check_tensor(name, cu_seqlens, (torch.int32,))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if not readable(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > total:
        raise ValueError(f"{name} must rise from 0 to at most the packed length {total}, got {offsets}")


@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = ..., window: tuple[int | None, int | None] | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool = ..., window: tuple[int | None, int | None] | None = ...,
    alibi_slopes: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences that lie one after the other, each seeing only itself; no padding is computed.

    Args:
        query: (Tq, Hq, D); sequence i is rows cu_seqlens_q[i] to cu_seqlens_q[i + 1].
        key: (Tk, Hkv, D).
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: int32 (sequences + 1,), rising from 0; on the tensors' device. Sequences may be empty.
        cu_seqlens_k: int32 (sequences + 1,).
        max_seqlen_q: at least the longest sequence of queries; an int, so that the host need not wait for the device.
        max_seqlen_k: at least the longest sequence of keys.
        causal, window, softcap, sinks, dropout_p, scale: as in `attention`; alignment is per sequence.
        alibi_slopes: (Hq,) or (sequences, Hq).
        return_lse: also return the log-sum-exp.

    Returns:
        out (Tq, Hq, Dv), and with `return_lse` also lse (Hq, Tq), float32. Rows behind the last sequence are 0 (lse -inf),
        and so are their gradients.

    Raises:
        TypeError, ValueError: as `attention`; offsets that do not fit the packed tensors (checked on the CPU only).

    Example:
        >>> x = torch.randn(30, 8, 64)                                # sequences of 10 and 20 tokens
        >>> cu = torch.tensor([0, 10, 30], dtype=torch.int32)
        >>> fastattn.varlen_attention(x, x, x, cu, cu, 20, 20, causal=True).shape
        torch.Size([30, 8, 64])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_rank(name, tensor, 3, "(packed length, heads, head_dim)")
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        lengths = f"{cu_seqlens_q.numel()} and {cu_seqlens_k.numel()}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have the same length, got {lengths}")
    max_seqlen_q = check_integer("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check_integer("max_seqlen_k", max_seqlen_k)
    for name, longest, cu in (
        ("max_seqlen_q", max_seqlen_q, cu_seqlens_q),
        ("max_seqlen_k", max_seqlen_k, cu_seqlens_k),
    ):
        if readable(cu) and cu.numel() > 1 and (most := cu.diff().max().item()) > longest:
            raise ValueError(f"{name} is {longest}, but a sequence has {most} rows")
    max_seqlen_q = torch.sym_min(max_seqlen_q, query.shape[0])  # kernels count to it in 32 bits, program by program
    max_seqlen_k = torch.sym_min(max_seqlen_k, key.shape[0])
    slopes = check_slopes(alibi_slopes, cu_seqlens_q.numel() - 1, query.shape[1])
    check_same_device(query=query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=slopes)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()  # (kernels know no stride)
    left, right = check_window(window, causal)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    q, k, v, rules = canonical(q, k, v, None, None, None, sinks, scale, left, right, softcap, dropout_p)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if needs_composite(q, k, v, rules.sinks):
        out, lse = eager.definition(q, k, v, rules._replace(alibi_slopes=slopes), packing)
    else:
        out, lse = call(varlen_op, q, k, v, slopes, rules.sinks, rules.seed, *packing, *rules[5:])
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def explain(function: Any, query: Tensor, *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's function."""
    chosen, _ = backend.choose(query.device)
    if chosen == "eager":
        return ["attention's way, sequence by sequence"]
    return ["attention's kernels; each program finds its sequence in cu_seqlens"]
