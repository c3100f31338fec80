"""`attention` and `scaled_dot_product_attention`: argument checks, the custom ops, and their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import backend
from fastattn.block_mask import BlockMask, Blocks
from fastattn.checks import (
    LARGEST_NUMBER,
    as_int,
    autocast,
    check_pair,
    check_probability,
    check_rank,
    check_same_device,
    check_scale,
    check_shape,
    check_softcap,
    check_tensor,
    is_integer,
    name_of,
)
from fastattn.dropout import draw_seed
from fastattn.eager import attention as eager
from fastattn.eager import attention_fused
from fastattn.layout import MOST_BETWEEN_ROWS, new_gradient, new_output
from fastattn.ops.distributed import in_shares, is_distributed
from fastattn.ops.leading_dims import four_dims
from fastattn.ops.library import call, define, differentiate, needs_composite, tensors_only
from fastattn.score_rules import ScoreRules
from fastattn.tracing import listening

MAX_HEAD_DIM = 256
FARTHEST = 1 << 30  # of a window's side: kernels add positions to it in 32 bits, and no sequence is longer

RULES_SCHEMA = (
    "Tensor? mask, Tensor[]? blocks, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, float scale, "
    "SymInt? window_left, SymInt? window_right, float softcap, float dropout_p"
)


def rule_arguments(rules: ScoreRules) -> tuple[Any, ...]:
    """The rules as an op's arguments, where a mask and the blocks of one are two."""
    mask, *rest = rules
    return (None, list(mask), *rest) if isinstance(mask, Blocks) else (mask, None, *rest)


def rules_of(mask: Tensor | None, blocks: Sequence[Tensor] | None, *rest: Any) -> ScoreRules:
    """The rules of an op's arguments."""
    return ScoreRules(mask if blocks is None else Blocks(*blocks), *rest)


def _attention(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    with backend.device_guard(query.device):
        launcher = backend.implementation("attention", query.device).forward
        return launcher(query, key, value, rules_of(*rules), backend.input_precision(query.dtype))


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    out = new_output(query, value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _attention_backward(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, rules, (need_bias, need_sinks) = rest[:6], rules_of(*rest[6:-2]), rest[-2:]
    with backend.device_guard(grad_out.device):
        launcher = backend.implementation("attention", grad_out.device).backward
        precision = backend.input_precision(grad_out.dtype)
        return tensors_only(grad_out, *launcher(grad_out, *tensors, rules, need_bias, need_sinks, precision))


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, blocks: Sequence[Tensor] | None, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_bias, need_sinks = rest[-2:]
    dq, dk, dv = map(new_gradient, (query, key, value))
    dbias = bias.new_empty(bias.shape) if bias is not None and need_bias else grad_out.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None and need_sinks else grad_out.new_empty(0)
    return dq, dk, dv, dbias, dsinks


attention_op = define(
    f"attention(Tensor query, Tensor key, Tensor value, {RULES_SCHEMA}) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
attention_backward_op = define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {RULES_SCHEMA}, bool need_bias, bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    out, lse = outputs
    grad_out, grad_lse = grad_outputs
    grad_out = torch.zeros_like(out) if grad_out is None else row_contiguous(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    need_bias, need_sinks = needs[5], needs[7]
    dq, dk, dv, dbias, dsinks = call(
        attention_backward_op, grad_out, grad_lse, *arguments[:3], out, lse, *arguments[3:], need_bias, need_sinks
    )
    return (
        dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, None, None,
        dbias if need_bias else None, None, dsinks if need_sinks else None,
    )  # fmt: skip


def _double_gradient(
    needs: Sequence[bool], grad_grads: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad_out, grad_lse, query, key, value, _, _, *rules, need_bias, need_sinks = arguments
    taken = [True, True, True, need_bias, need_sinks]
    d_out, d_lse, dq, dk, dv, dbias, dsinks = eager.double_backward(
        [g if t else None for g, t in zip(grad_grads, taken)], taken, grad_out, grad_lse, query, key, value, rules_of(*rules)
    )  # fmt: skip
    return d_out, d_lse, dq, dk, dv, None, None, None, None, dbias, None, dsinks


differentiate(attention_op, _gradient, keep_outputs=(0, 1))
differentiate(attention_backward_op, _double_gradient)


def row_contiguous(x: Tensor) -> Tensor:
    """`x`, copied where the last dimension is not contiguous or where rows lie too far apart for a kernel."""
    return x if x.stride(-1) == 1 and x.stride(-2) <= MOST_BETWEEN_ROWS else x.contiguous()


def _check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_rank(name, tensor, 4, "(batch, heads, length, head_dim)")
    if not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(name_of(t.dtype) for t in (query, key, value))
        raise TypeError(f"query, key and value must have one dtype, got {dtypes}")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have the same batch size, got {shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key and value must have the same heads and length, got {shapes}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head_dim, got {shapes}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the query's heads must be a multiple of the key's heads, got {heads} and {kv_heads} ({shapes})"
        )
    for name, dim in (("head_dim of query and key", query.shape[3]), ("head_dim of value", value.shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be in 1..{MAX_HEAD_DIM}, got {dim}")


def _pairwise(name: str, tensor: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask or bias as 4 dimensions, each 1 or that of (B, Hq, Nq, Nk)."""
    if tensor is None:
        return None
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    fits = tensor.dim() <= 4 and all(s in (1, f) for s, f in zip(tensor.shape[::-1], full[::-1]))
    if not fits:
        raise ValueError(f"{name} must broadcast to (batch, heads, Nq, Nk) = {full}, got shape {tuple(tensor.shape)}")
    return tensor.view((1,) * (4 - tensor.dim()) + tuple(tensor.shape))


def _check_block_mask(mask: BlockMask, query: Tensor, key: Tensor) -> BlockMask:
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.shape[2:] != full[2:] or any(size not in (1, f) for size, f in zip(mask.shape, full)):
        raise ValueError(f"mask must be a block mask of (batch or 1, heads or 1, Nq, Nk) in {full}, got {mask}")
    return mask


def check_window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    if window is None:
        return None, 0 if causal else None
    check_pair("window", window, "must be None or (left, right)")
    for name, side in zip(("left", "right"), window):
        if side is not None and not is_integer(side):
            raise TypeError(f"window's {name} side must be None (unbounded) or an integer, got {type(side).__name__}")
        if side is not None and side < 0:
            raise ValueError(f"window's {name} side must be None (unbounded) or at least 0, got {side}")
    left, right = (None if side is None else torch.sym_min(as_int(side), FARTHEST) for side in window)
    return left, 0 if causal else right


def check_slopes(slopes: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """ALiBi slopes as fp32 (batch, heads)."""
    if slopes is None:
        return None
    check_tensor("alibi_slopes", slopes)
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(slopes.shape)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes has no gradient: pass a differentiable bias, or alibi_slopes.detach()")
    return slopes.float().expand(batch, heads)


def check_sinks(sinks: Tensor | None, heads: int) -> Tensor | None:
    """Sinks (heads,), contiguous."""
    if sinks is None:
        return None
    check_tensor("sinks", sinks)
    check_shape("sinks", sinks, (heads,), "one per query head")
    return sinks.contiguous()


def canonical(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None, bias: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, scale: float | None, left: int | None, right: int | None, softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, ScoreRules]:  # fmt: skip
    """(query, key, value, rules), checked. `left` and `right` are the window's sides; `right` may be negative here."""
    query, key, value = autocast(query, key, value)  # type: ignore[assignment]
    _check_qkv(query, key, value)
    check_probability("dropout_p", dropout_p)
    blocks = None
    if isinstance(mask, BlockMask):
        blocks = _check_block_mask(mask, query, key).within(left, right).blocks
        mask = left = right = None
    elif mask is not None:
        check_tensor("mask", mask, (torch.bool,))
    if bias is not None:
        check_tensor("bias", bias)
    sinks = check_sinks(sinks, query.shape[1])
    check_softcap(softcap)
    check_scale(scale)
    slopes = check_slopes(slopes, *query.shape[:2])
    given_mask = mask if blocks is None else blocks.kinds
    check_same_device(query=query, key=key, value=value, mask=given_mask, bias=bias, alibi_slopes=slopes, sinks=sinks)
    mask, bias = _pairwise("mask", mask, query, key), _pairwise("bias", bias, query, key)
    if scale is None:
        scale = query.shape[3] ** -0.5
    seed = draw_seed(query.device) if dropout_p > 0.0 else None
    rules = ScoreRules(
        mask if blocks is None else blocks, bias, slopes, sinks, seed, float(scale), left, right, float(softcap or 0.0), float(dropout_p),
    )  # fmt: skip
    return row_contiguous(query), row_contiguous(key), row_contiguous(value), rules


def attend(query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules) -> tuple[Tensor, Tensor]:
    """(out, lse) of canonical arguments: the op, or its plain definition inside transforms and forward-mode AD."""
    if needs_composite(query, key, value, rules.bias, rules.sinks):
        if is_distributed(query, key, value, rules.bias, rules.sinks):
            return in_shares(attend, query, key, value, rules)
        return eager.definition(query, key, value, rules)
    return call(attention_op, query, key, value, *rule_arguments(rules))


def _by_torch(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor | None:
    """Plain attention on the CPU, where it is one call of PyTorch's fused kernel; None where it is not.

    The way through checks and dispatch shows in calls of a few milliseconds, after a kernel that swept the caches.
    """
    if scale is not None and not (type(scale) is float and -LARGEST_NUMBER <= scale <= LARGEST_NUMBER):
        return None
    if listening() or not (type(query) is type(key) is type(value) is Tensor and backend.eager_on_cpu()):
        return None
    dtype = query.dtype
    if dtype not in (torch.float32, torch.bfloat16) or not (
        dtype is key.dtype is value.dtype and query.is_cpu and key.is_cpu and value.is_cpu
    ):
        return None
    shape, kv_shape = query.shape, key.shape
    if len(shape) != 4 or kv_shape != value.shape or not 0 < shape[3] <= MAX_HEAD_DIM or 0 in shape or 0 in kv_shape:
        return None
    fits = len(kv_shape) == 4 and shape[0] == kv_shape[0] and shape[3] == kv_shape[3] and not shape[1] % kv_shape[1]
    if not fits or (causal and (shape[2] != kv_shape[2] or (scale is not None and scale <= 0.0))):
        return None
    of_query, of_key, of_value = query.stride(), key.stride(), value.stride()
    if not of_query[3] == of_key[3] == of_value[3] == 1 or 1 in of_query[:3] + of_key[:3] + of_value[:3]:
        return None
    if torch._C._is_any_autocast_enabled():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return None
    factor, alone = None if scale is None else float(scale), shape[2] == 1 and attention_fused.slow_alone(query)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        factor = shape[3] ** -0.5 if factor is None else factor
        return None if alone else _Plain.apply(query, key, value, bool(causal), factor)
    if alone:
        return attention_fused.forward(query, key, value, False, factor)[0].contiguous()
    return torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, bool(causal), scale=factor)[0]


class _Plain(torch.autograd.Function):
    """PyTorch's fused attention on the CPU, with a gradient that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse = torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            right = 0 if ctx.causal else None
            nothing = [None] * 6
            rules = (*nothing, ctx.scale, None, right, 0.0, 0.0, False, False)
            tensors = (row_contiguous(grad_out), None, query, key, value, out, lse.contiguous())
            grads = call(attention_backward_op, *tensors, *rules)[:3]
        else:
            grads = attention_fused.backward(grad_out, query, key, value, out, lse, ctx.causal, ctx.scale)
        return *grads, None, None


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = ..., window: tuple[int | None, int | None] | None = ...,
    mask: Tensor | BlockMask | None = ..., bias: Tensor | None = ..., alibi_slopes: Tensor | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., dropout_p: float = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = ..., window: tuple[int | None, int | None] | None = ...,
    mask: Tensor | BlockMask | None = ..., bias: Tensor | None = ..., alibi_slopes: Tensor | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., dropout_p: float = ..., scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with every score feature, all of which compose and have gradients.

        S = scale·Q Kᵀ;   S ← softcap·tanh(S / softcap);   S ← S + bias - slope·|i + Nk - Nq - j|
        S ← -inf where masked;   P = exp(S) / (Σ_j exp(S_j) + exp(sink));   out = dropout(P) V

    Sources: Vaswani et al. 2017 (attention); Dao 2023, arXiv:2307.08691 (the algorithm); Press et al. 2021,
    arXiv:2108.12409 (ALiBi); Gemma 2, arXiv:2408.00118 (softcap); Xiao et al. 2023, arXiv:2309.17453 (sinks).

    Of a DTensor query, key and value, sharded by batches or heads, each process computes its own (without dropout); a
    length that is sharded is gathered. The other tensors may be plain: the same in every process.

    Args:
        query: (B, Hq, Nq, D), float32, float16 or bfloat16, any strides. D in 1..256.
        key: (B, Hkv, Nk, D), the same dtype. Hq must be a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        value: (B, Hkv, Nk, Dv), the same dtype. Dv in 1..256.
        causal: row i sees column j only where j <= i + Nk - Nq (aligned at the bottom right).
        window: (left, right): row i sees i + Nk - Nq - left <= j <= i + Nk - Nq + right; None = unbounded on that side.
            With `causal`, the right side is 0.
        mask: bool, broadcastable to (B, Hq, Nq, Nk); True = attend. Or a `fastattn.BlockMask`, whose empty blocks cost nothing. A
            tensor of 512 rows and more (768 on a CPU) is searched for what can be skipped at each call, a `BlockMask` once.
        bias: floating, broadcastable to (B, Hq, Nq, Nk); added to the score. Its gradient has its shape.
        alibi_slopes: (Hq,) or (B, Hq), floating; not differentiable.
        softcap: None, or the bound c > 0 of c·tanh(score / c).
        sinks: (Hq,), floating: a logit per head that takes part in the denominator only.
        dropout_p: probability in [0, 1) of dropping an attention weight. The seed comes from torch's generator; the choice
            depends on (seed, batch, head, row, column) alone and is the same on every backend; it takes 16 random bits, so
            that the share is p to the nearest 2⁻¹⁶.
        scale: multiplies Q Kᵀ; None = 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out (B, Hq, Nq, Dv) in the query's dtype, and with `return_lse` also lse (B, Hq, Nq), float32, natural logarithm,
        differentiable. A row that sees nothing has out 0, lse -inf (the sink's logit with `sinks`) and zero gradients.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, rank, shape or device; an option of the wrong type or out of range.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
        >>> fastattn.attention(q, k, v, causal=True, window=(32, 0)).shape
        torch.Size([2, 8, 128, 64])
    """
    if window is mask is bias is alibi_slopes is softcap is sinks is None and dropout_p == 0.0 and not return_lse:
        plain = _by_torch(query, key, value, causal, scale)
        if plain is not None:
            return plain
    left, right = check_window(window, causal)
    out, lse = attend(
        *canonical(query, key, value, mask, bias, alibi_slopes, sinks, scale, left, right, softcap, dropout_p)
    )
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: its arguments, its meaning, our kernels.

    Unlike `attention`, `is_causal` is aligned at the top left: row i sees j <= i whatever Nq and Nk are.

    Args:
        query: (..., Nq, D), with any number of leading dimensions, which broadcast; the last of them is the heads.
        key: (..., Nk, D).
        value: (..., Nk, Dv).
        attn_mask: broadcastable to (..., Nq, Nk): bool (True = attend) or floating (added to the scores, differentiable).
        dropout_p: probability in [0, 1); applied whenever it is positive, as in torch.
        is_causal: excludes `attn_mask`.
        scale: None = 1 / sqrt(D).
        enable_gqa: allow the query to have a multiple of the key's heads, and of the value's.

    Returns:
        (..., Nq, Dv). A row that sees nothing is 0.

    Raises:
        ValueError, TypeError: as `attention`; `attn_mask` with `is_causal`; shapes that do not broadcast.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
        >>> fastattn.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    same_heads = isinstance(query, Tensor) and isinstance(key, Tensor) and query.shape[1:2] == key.shape[1:2]
    if attn_mask is None and dropout_p == 0.0 and (same_heads or enable_gqa):
        plain = _by_torch(query, key, value, is_causal, scale)
        if plain is not None:
            return plain
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal=True")
    query, key, value, attn_mask, leading = four_dims(query, key, value, attn_mask, enable_gqa)
    mask, bias = (attn_mask, None) if attn_mask is not None and attn_mask.dtype == torch.bool else (None, attn_mask)
    right = query.shape[2] - key.shape[2] if is_causal else None  # row i stands at column i + Nk - Nq
    out, _ = attend(*canonical(query, key, value, mask, bias, None, None, scale, None, right, None, dropout_p))
    return out.reshape(*leading, *out.shape[-2:]) if len(leading) != 2 else out


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options)
    given.apply_defaults()
    o = given.arguments
    left, right = check_window(o.get("window"), o.get("causal", False))
    if function is scaled_dot_product_attention:
        names = ("query", "key", "value", "attn_mask", "enable_gqa")
        o["query"], o["key"], o["value"], pairs, _ = four_dims(*(o[name] for name in names))
        o["bias" if pairs is not None and pairs.is_floating_point() else "mask"] = pairs
        right = o["query"].shape[2] - o["key"].shape[2] if o["is_causal"] else None
    dropout_p = o["dropout_p"]
    check_probability("dropout_p", dropout_p)
    query, key, value, rules = canonical(
        o["query"], o["key"], o["value"], o.get("mask"), o.get("bias"), o.get("alibi_slopes"), o.get("sinks"), o["scale"],
        left, right, o.get("softcap"), 0.0,
    )  # fmt: skip
    if dropout_p > 0.0:  # drawing a seed would advance the generator
        rules = rules._replace(seed=torch.zeros(1, dtype=torch.int64, device=query.device), dropout_p=float(dropout_p))
    return backend.implementation("attention", query.device).explain(query, key, value, rules)
