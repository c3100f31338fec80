"""Attention in PyTorch: the CPU backend, and the definition behind transforms and double backward.

Query rows are independent of each other, so everything here walks over blocks of rows: memory grows with N, not with N².
A block is done in one of two ways:

* PyTorch's fused CPU attention (attention_fused.py), with what it lacks (window, ALiBi, mask, bias) as the additive mask of
  one block, or with no mask where the block needs none;
* matrix products, for what the fused kernel cannot do: softcap, dropout, gradients of the LSE or of the bias, Dv ≠ D.

`_logits` is the one definition of a score. Formulas: fastattn/kernels/attention_backward.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.checks import without_autocast
from fastattn.eager import attention_fused
from fastattn.eager.exponential import exp, exp_
from fastattn.eager.row_block import RowBlock, cut, whole_block
from fastattn.layout import as_gradient, as_output, new_gradient, new_output
from fastattn.replay import replay
from fastattn.score_rules import ScoreRules

_BLOCK_SCORES = 1 << 20  # scores of one block of matrix products: 4 MiB of fp32


def _logits(q: Tensor, k: Tensor, block: RowBlock) -> tuple[Tensor, Tensor | None]:
    """(logits, t), fp32 (B, Hq, rows, columns): softcap·t + bias + ALiBi, -inf where invisible, t = tanh(scale·q kᵀ / softcap).

    Without softcap its part is scale·q kᵀ, and t is None. q (B, Hq, rows, D) and k (B, Hkv, columns, D) are the block's, fp32.
    """
    scaled = q * (block.rules.scale / block.rules.softcap if block.rules.softcap else block.rules.scale)
    s = (_grouped(scaled, k) @ k.transpose(-1, -2)).reshape(*q.shape[:3], k.shape[2])
    additive = block.additive(q.device)
    t = torch.tanh(s) if block.rules.softcap else None
    s = s if t is None else t * block.rules.softcap if additive is None else t
    if additive is None:
        return s, t
    total = torch.add(additive, s, alpha=block.rules.softcap or 1.0)
    # (NaN - inf is NaN: `forward` asks again, not concrete, where it finds one)
    return (total if block.concrete else torch.where(additive == float("-inf"), additive, total)), t


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    """(B, Hq, n, m) → (B, Hkv, Hq / Hkv · n, m): the rows of all query heads that share a key head, one below the other."""
    return x.reshape(x.shape[0], kv.shape[1], x.shape[1] // kv.shape[1] * x.shape[2], x.shape[3])


def block_weights(q: Tensor, k: Tensor, block: RowBlock) -> tuple[Tensor, Tensor, Tensor]:
    """(P·l after dropout, l, lse) of one block, differentiable: P = exp(S - m) / l; l is 1 for a row that sees nothing."""
    s, _ = _logits(q.float(), k.float(), block)
    m = s.detach().amax(-1, keepdim=True)
    if block.rules.sinks is not None:
        sink = block.rules.sinks.float()[:, None, None]
        m = torch.maximum(m, sink.detach())
    m = m.masked_fill(m == float("-inf"), 0.0)
    p = exp(s - m, block.far)
    l = p.sum(-1, keepdim=True)
    if block.rules.sinks is not None:
        l = l + torch.exp(sink - m)
    dead = l == 0
    l = l.masked_fill(dead, 1.0)
    lse = (m + torch.log(l)).masked_fill(dead, float("-inf")).squeeze(-1)
    z = block.dropout_factors(p)
    return p if z is None else p * z, l, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, block: RowBlock) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block, differentiable by any of torch's means. q, k, v are the block's, any dtype."""
    p, l, lse = block_weights(q, k, block)
    out = (_grouped(p, v) @ v.float()).reshape(*q.shape[:3], v.shape[3]) / l
    return out.to(q.dtype), lse


def _nothing(query: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) where there are no queries or no keys."""
    zero = query[..., :0].sum(-1)  # of no number: `* 0` would be NaN where the sum is not finite
    lse = zero.float() + (float("-inf") if sinks is None else sinks.float()[:, None])
    return zero[..., None].expand(*query.shape[:3], value.shape[3]), lse


def product_rows(query: Tensor, key: Tensor) -> int:
    """Rows of a block of matrix products."""
    return max(16, _BLOCK_SCORES // max(1, query.shape[0] * query.shape[1] * key.shape[2]) // 16 * 16)


@without_autocast
def definition(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, first_batch: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) by plain differentiable PyTorch: what transforms and forward-mode AD run through."""
    if 0 in (query.shape[2], key.shape[2]):
        return _nothing(query, value, rules.sinks)
    whole = whole_block(query, key, rules, first_batch)
    parts = [
        _attend(b.of_rows(query), b.of_columns(key), b.of_columns(value), b)
        for b in whole.split(product_rows(query, key))
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _slide(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether rows start one number apart, as those of windows that slide, where PyTorch's fused kernel may be called: what PyTorch
    makes like these, a copy in fp32 or its output, keeps no row's numbers together."""
    return query.shape[3] == value.shape[3] > 1 and 1 in query.stride()[:3] + key.stride()[:3] + value.stride()[:3]


def _in_rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of such tensors, row by row. (`contiguous` would leave a dimension of size 1 its stride.)"""
    rows = torch.contiguous_format
    return query.clone(memory_format=rows), key.clone(memory_format=rows), value.clone(memory_format=rows)


def forward(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, precision: str, first_batch: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse). Shapes as in `fastattn.ops.attention`; `precision` is torch's own setting here."""
    if 0 in (query.shape[2], key.shape[2]) or query.numel() == 0:
        out, lse = _nothing(query, value, rules.sinks)
        return as_output(out, query), lse.contiguous()
    if _slide(query, key, value):
        out, lse = forward(*_in_rows(query, key, value), rules, precision, first_batch)
        return as_output(out, query), lse
    if attention_fused.better_in_fp32(query):
        out, lse = forward(query.float(), key.float(), value.float(), rules, precision, first_batch)
        return as_output(out.to(query.dtype), query), lse
    whole = attention_fused.concrete(whole_block(query, key, rules, first_batch), query.is_cpu)
    fused = attention_fused.blocks_of(query, key, value, whole)
    if fused:
        key, value = attention_fused.as_stored(fused, key, value)
    blocks = fused or list(whole.split(product_rows(query, key)))
    parts = []
    for block in blocks:
        q, k, v = block.of_rows(query), block.of_columns(key), block.of_columns(value)
        if not fused:
            found = _attend(q, k, v, block)
            again = block.concrete and bool(found[1].isnan().any())
            parts.append(_attend(q, k, v, replace(block, concrete=False)) if again else found)
            continue
        out, lse = attention_fused.block_forward(q, k, v, block)
        if rules.sinks is not None:
            with_sink = torch.logaddexp(lse, rules.sinks.float()[:, None])
            out = (out * torch.exp(lse - with_sink)[..., None].nan_to_num(0.0)).to(out.dtype)
            lse = with_sink
        parts.append((out, lse))
    if len(parts) == 1:
        return as_output(parts[0][0], query), parts[0][1].contiguous()
    out = new_output(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for block, (part, part_lse) in zip(blocks, parts):
        block.of_rows(out).copy_(part)
        block.of_rows(lse).copy_(part_lse)
    return out, lse


def reduce_like(x: Tensor, pair: Tensor) -> Tensor:
    """x (B, Hq, n, m), summed over the dimensions in which `pair` has size 1."""
    over = [d for d in range(4) if pair.shape[d] == 1 and x.shape[d] != 1]
    return x.sum(over, keepdim=True) if over else x


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """fp32 (Hq,): a sink's probability, 0 for a row that sees nothing, times -delta. lse, delta: (B, Hq, rows)"""
    probability = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
    return -(probability * delta).sum((0, 2))


def _add_bias_gradient(grad_bias: Tensor, ds: Tensor, block: RowBlock) -> None:
    """Writes a block's rows of the bias's gradient, or adds them where all rows share one. ds: (B, Hq, rows, columns)"""
    part = cut(grad_bias, block.rows, block.columns)
    assert part is not None
    if grad_bias.shape[2] == 1:
        part += reduce_like(ds, part)
        return
    part.copy_(reduce_like(ds, part))
    if grad_bias.shape[3] != 1:
        block.of_rows(grad_bias)[..., : block.columns.start].zero_()
        block.of_rows(grad_bias)[..., block.columns.stop :].zero_()


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    rules: ScoreRules, need_bias: bool, need_sinks: bool, precision: str, first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_bias, grad_sinks); the last two None where not needed."""
    if _slide(query, key, value):
        rows = _in_rows(query, key, value)
        return backward(grad_out, grad_lse, *rows, out, lse, rules, need_bias, need_sinks, precision, first_batch)
    if attention_fused.better_in_fp32(query):
        *grads, grad_bias, grad_sinks = backward(
            grad_out.float(), grad_lse, query.float(), key.float(), value.float(), out.float(), lse, rules, need_bias,
            need_sinks, precision, first_batch,
        )  # fmt: skip
        dq, dk, dv = (as_gradient(grad.to(query.dtype)) for grad in grads)
        return dq, dk, dv, grad_bias, grad_sinks
    delta = (grad_out.float() * out.float()).sum(-1) if grad_lse is not None or need_sinks or rules.softcap else None
    if delta is not None and grad_lse is not None:
        delta = delta - grad_lse
    bias, sinks, grad_sinks = rules.bias, rules.sinks, None
    if need_sinks:
        assert sinks is not None
        assert delta is not None
        grad_sinks = sink_gradient(sinks, lse, delta).to(sinks.dtype)
    grad_bias = None if not need_bias or bias is None else bias.new_empty(bias.shape, dtype=torch.float32)
    if grad_bias is not None and (grad_bias.shape[2] == 1 or 0 in (query.numel(), key.numel())):
        grad_bias.zero_()
    if 0 in (query.shape[2], key.shape[2]) or query.numel() == 0:
        dq, dk, dv = (as_gradient(torch.zeros_like(t)) for t in (query, key, value))
        return dq, dk, dv, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype), grad_sinks
    whole = attention_fused.concrete(whole_block(query, key, rules, first_batch), query.is_cpu)
    fused = (
        None
        if grad_lse is not None or need_bias
        else attention_fused.blocks_of(query, key, value, whole, backward=True)
    )
    if fused:
        key, value = attention_fused.as_stored(fused, key, value)
    elif delta is None:
        delta = (grad_out.float() * out.float()).sum(-1)
    blocks = fused or list(whole.split(product_rows(query, key)))
    blind = lse == float("-inf")
    if blind.any():  # their queries, which may be NaN, stay out of the products
        query = query.masked_fill(blind[..., None], 0.0)
        lse = lse.masked_fill(blind, 0.0 if fused else float("inf"))
    if fused and len(blocks) == 1 and len(blocks[0].columns) == key.shape[2]:
        dq, dk, dv = attention_fused.block_backward(grad_out, query, key, value, out, lse, blocks[0])
        dk, dv = attention_fused.as_stored(blocks, dk, dv)
        return as_gradient(dq), as_gradient(dk), as_gradient(dv), None, grad_sinks
    dq = new_gradient(query)
    dk, dv = (new_gradient(t, torch.float32).zero_() for t in (key, value))
    for block in blocks:
        q, k, v = block.of_rows(query), block.of_columns(key), block.of_columns(value)
        do, o, row_lse = block.of_rows(grad_out), block.of_rows(out), block.of_rows(lse)
        if fused:
            dq_part, dk_part, dv_part = attention_fused.block_backward(do, q, k, v, o, row_lse, block)
        else:
            assert delta is not None
            dq_part, dk_part, dv_part, ds = _block_backward(
                do.float(), q.float(), k.float(), v.float(), row_lse, block.of_rows(delta), block
            )
            if grad_bias is not None:
                _add_bias_gradient(grad_bias, ds, block)
        block.of_rows(dq).copy_(dq_part)
        block.of_columns(dk).add_(dk_part)
        block.of_columns(dv).add_(dv_part)
    dk, dv = map(as_gradient, attention_fused.as_stored(blocks, dk.to(key.dtype), dv.to(value.dtype)))
    return dq, dk, dv, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype), grad_sinks


def _block_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, block: RowBlock
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dS) of one block, everything fp32; lse is +inf for rows that see nothing."""
    dp = (_grouped(do, v) @ v.transpose(-1, -2)).view(*q.shape[:3], k.shape[2])
    dq, dk, ds, p_kept = score_gradients(dp, q, k, lse, delta, block)
    return dq, dk, _grouped(p_kept, v).transpose(-1, -2) @ _grouped(do, v), ds


def score_gradients(
    dp: Tensor, q: Tensor, k: Tensor, lse: Tensor, delta: Tensor, block: RowBlock
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dS, P after dropout) of one block from the gradient of P after dropout, which is overwritten. As above."""
    s, t = _logits(q, k, block)
    p = exp_(s - lse[..., None], block.far)
    z = block.dropout_factors(p)
    p_kept = p if z is None else p * z
    ds = (dp if z is None else dp.mul_(z)).sub_(delta[..., None]).mul_(p)
    dx = ds if t is None else torch.addcmul(ds, ds * t, t, value=-1.0)  # ds · (1 - t²)
    dx = _grouped(dx, k)
    dq = (dx @ k).view(q.shape).mul_(block.rules.scale)
    dk = (dx.transpose(-1, -2) @ _grouped(q, k)).mul_(block.rules.scale)
    return dq, dk, ds, p_kept


@without_autocast
def double_backward(
    grad_grads: Sequence[Tensor | None], needs: Sequence[bool], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor,
    key: Tensor, value: Tensor, rules: ScoreRules, first_batch: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (grad_out, grad_lse, query, key, value, bias, sinks), block by block.

    Args:
        grad_grads: the incoming gradients of the gradients of query, key, value, bias and sinks, or None.
        needs: which of those five the first gradient was taken for.
    """
    inputs = (grad_out, grad_lse, query, key, value, rules.bias, rules.sinks)
    total = zeros_like_all(inputs)
    if 0 in (query.shape[2], key.shape[2]) or query.numel() == 0:
        if total[1] is not None and grad_grads[4] is not None:  # without keys the LSE is the sink itself
            total[1] += grad_grads[4].float()[:, None]
        return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(total, inputs))
    whole = whole_block(query, key, rules, first_batch)
    for block in whole.split(product_rows(query, key)):
        dys, of_dys = ([None if t is None else block.of_rows(t) for t in pair] for pair in (inputs[:2], total[:2]))
        add_replayed(_attend, block, needs, dys, inputs[2:], grad_grads, of_dys, total[2:])
    return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(total, inputs))


def zeros_like_all(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """fp32, to add up gradients in."""
    return [None if t is None else torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in tensors]


def add_replayed(
    definition: Callable[..., Sequence[Tensor]], block: RowBlock, needs: Sequence[bool], dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None], grad_grads: Sequence[Tensor | None], of_dys: Sequence[Tensor | None],
    of_inputs: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Adds what `replay` finds for one block to `of_dys`, which are the block's, and to `of_inputs`, which are whole.

    Args:
        definition: of the block's (query, key, value) and of a block.
        inputs: (query, key, value, bias, sinks), whole; value may be None. needs, grad_grads and of_inputs are theirs.
        dys: the gradients of what `definition` returns.
    """

    def of_block(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        q, k, v, pair, sink = tensors
        return [
            None if q is None else block.of_rows(q), *(None if t is None else block.of_columns(t) for t in (k, v)),
            cut(pair, block.rows, block.columns), sink,
        ]  # fmt: skip

    def again(q: Tensor, k: Tensor, v: Tensor | None, pair: Tensor | None, sink: Tensor | None) -> Sequence[Tensor]:
        return definition(q, k, v, replace(block, rules=block.rules._replace(bias=pair, sinks=sink)))

    grads_dy, grads_x = replay(again, needs, dys, of_block(inputs), of_block(grad_grads))
    for target, grad in zip((*of_dys, *of_block(of_inputs)), (*grads_dy, *grads_x)):
        if target is not None and grad is not None:
            target += grad


def explain(query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules) -> list[str]:
    """How `forward` does this call, in words."""
    whole = attention_fused.concrete(whole_block(query, key, rules), query.is_cpu)
    blocks = attention_fused.blocks_of(query, key, value, whole)
    if blocks is None:
        rows = min(product_rows(query, key), query.shape[2])
        return [f"matrix products on blocks of {rows} rows: PyTorch's fused CPU attention lacks this combination"]
    kernel = f"PyTorch's fused CPU attention{', in fp32' if attention_fused.better_in_fp32(query) else ''}"
    if len(blocks) == 1:
        return [f"{kernel}, one call{' (is_causal)' if blocks[0].is_causal else ''}"]
    return [f"{kernel}, {len(blocks)} blocks of {len(blocks[0].rows)} rows with the keys that each sees"]
