"""Multi-head attention as a module: torch's, over our kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.plain import call_linear, linear
from fastattn.ops.attention import attend, canonical
from fastattn.ops.attention_maps import weights_of


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: the same constructor, parameters, initialisation, arguments and results.

    Differences, all deliberate: a query that may see no key gives 0 (before the output projection), never NaN; the output
    comes from the fused kernel also where `need_weights=True`; bad shapes raise ValueError.

    Example:
        >>> layer = fastattn.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 10, 64])
    """

    def _reset_parameters(self) -> None:
        # Where `_qkv_same_embed_dim` is True, torch.nn.TransformerEncoderLayer and torch.nn.TransformerEncoder compute
        # with this module's parameters in C++, around its `forward`. So it is True only while torch initialises.
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`.

        Args:
            query: (L, B, E), or (B, L, E) with `batch_first`, or (L, E) for one sequence.
            key: (S, B, kdim) and so on.
            value: (S, B, vdim) and so on.
            key_padding_mask: (B, S), or (S,) for one sequence: True = ignore this key; or floating: added to the scores.
            need_weights: also return the attention weights (after dropout).
            attn_mask: (L, S) or (B · num_heads, L, S): True = may not attend; or floating: added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that `attn_mask`, which must be given, is the causal mask.

        Returns:
            (output in the query's layout, weights (B, L, S) or (B, num_heads, L, S), or None)

        Raises:
            ValueError: shapes that do not fit each other.
            RuntimeError: `is_causal` without `attn_mask`, as in torch.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which is None: pass the causal mask as well")
        if need_weights and self.in_proj_weight is None and hasattr(self.q_proj_weight, "device_mesh"):
            raise ValueError("need_weights must be False where the heads are shared among processes")
        batched = query.dim() == 3
        _check_inputs(query, key, value, key_padding_mask, self.embed_dim, self.kdim, self.vdim, self.batch_first)
        query, key, value = self._project(query, key, value)
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        lengths = query.shape[1], key.shape[1]
        key, value = self._extend(key, value)
        query, key, value = (t.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for t in (query, key, value))

        right = None
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask, right = None, lengths[0] - key.shape[2]  # torch's causal is aligned at the top left
        padding = None if key_padding_mask is None else key_padding_mask.reshape(query.shape[0], 1, 1, lengths[1])
        pairs = _pairs(attn_mask, query.shape[0], query.shape[1], lengths)
        extra = key.shape[2] - lengths[1]
        mask = _combine_bool(*[_extended(m, extra) for m in (padding, pairs)])
        bias = _combine_float(*[_extended(m, extra) for m in (padding, pairs)])
        dropout_p = self.dropout if self.training else 0.0
        query, key, value, rules = canonical(
            query, key, value, mask, bias, None, None, None, None, right, None, dropout_p
        )
        out, _ = attend(query, key, value, rules)
        rows = out.transpose(1, 2) if self.batch_first or not batched else out.permute(2, 0, 1, 3)
        out = call_linear(self.out_proj, rows.flatten(2))
        weights = None
        if need_weights:
            weights = weights_of(query, key, rules)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The input projections, in one product where the inputs are one tensor."""
        e = self.embed_dim
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            if query is key and key is value:
                return linear(query, self.in_proj_weight, self.in_proj_bias).split(e, dim=-1)
            if key is value:
                bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split((e, 2 * e))
                packed = linear(key, self.in_proj_weight[e:], bias[1])
                return linear(query, self.in_proj_weight[:e], bias[0]), *packed.split(e, dim=-1)
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(_linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def _extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) with the learned key and value of `add_bias_kv` and the zeros of `add_zero_attn` behind."""
        batch, _, width = key.shape
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.to(key.dtype).expand(batch, 1, width)], 1)
            value = torch.cat([value, self.bias_v.to(value.dtype).expand(batch, 1, width)], 1)
        if self.add_zero_attn:
            key, value = (torch.cat([t, t.new_zeros(batch, 1, width)], 1) for t in (key, value))
        return key, value


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b; of a weight that is distributed by rows, this process's columns of it."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return linear(x, weight, bias)
    from torch.distributed.tensor import DTensor, Replicate

    product: Any = F.linear(DTensor.from_local(x, mesh, [Replicate()]), weight, bias)
    return product.to_local()


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, embed_dim: int, kdim: int, vdim: int, first: bool
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested:
            raise ValueError(f"{name} must be dense, got a nested tensor: pad it, or pack it for varlen_attention")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        raise ValueError(f"query, key and value must all have 3 dimensions, or 2 for one sequence, got {shapes}")
    for name, tensor, width in (("query", query, embed_dim), ("key", key, kdim), ("value", value, vdim)):
        if tensor.shape[-1] != width:
            raise ValueError(f"{name} must have {width} features in its last dimension, got {shapes}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must have the same length and batch size, got {shapes}")
    if query.dim() == 3 and query.shape[0 if first else 1] != key.shape[0 if first else 1]:
        raise ValueError(f"query and key must have the same batch size, got {shapes} (batch_first={first})")
    if padding is not None:
        length = key.shape[0] if key.dim() == 2 else key.shape[1 if first else 0]
        expected = (length,) if key.dim() == 2 else (key.shape[0 if first else 1], length)
        if tuple(padding.shape) != expected:
            raise ValueError(f"key_padding_mask must have shape {expected} (batch, keys), got {tuple(padding.shape)}")
        _check_mask_dtype("key_padding_mask", padding)


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = ignore) or floating (added to the scores), got {mask.dtype}")


def _pairs(attn_mask: Tensor | None, batch: int, heads: int, lengths: tuple[int, int]) -> Tensor | None:
    """attn_mask as (1 or B, 1 or H, L, S)."""
    if attn_mask is None:
        return None
    _check_mask_dtype("attn_mask", attn_mask)
    if tuple(attn_mask.shape) == lengths:
        return attn_mask[None, None]
    if tuple(attn_mask.shape) != (batch * heads, *lengths):
        allowed = f"{lengths} or {(batch * heads, *lengths)}"
        raise ValueError(f"attn_mask must have shape {allowed}, got {tuple(attn_mask.shape)}")
    return attn_mask.view(batch, heads, *lengths)


def _extended(mask: Tensor | None, extra: int) -> Tensor | None:
    """A mask with `extra` visible keys behind."""
    if mask is None or extra == 0:
        return mask
    return F.pad(mask, (0, extra))


def _combine_bool(padding: Tensor | None, pairs: Tensor | None) -> Tensor | None:
    """What may be attended to, from the bool masks among the two (True = ignore)."""
    masks = [m for m in (padding, pairs) if m is not None and m.dtype == torch.bool]
    return None if not masks else ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])


def _combine_float(padding: Tensor | None, pairs: Tensor | None) -> Tensor | None:
    """What is added to the scores, from the floating masks among the two."""
    masks = [m for m in (padding, pairs) if m is not None and m.dtype != torch.bool]
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]
