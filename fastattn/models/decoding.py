"""One new token of every sequence through a GPT on a CPU, without the overhead of modules and ops.

For one token, what modules and ops do around a block's products (calls, checks, dispatch) takes as long as the products,
because the weights push its code and data out of the caches (`python -m bench.report models` times generation). The formulas are those of
`Block` and `SelfAttention`, and tests/test_gpt.py holds `TokenReader` to their numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn import backend
from fastattn.eager import attention_fused
from fastattn.eager.feed_forward import hidden_layer
from fastattn.eager.products import pack, product
from fastattn.eager.rotary import rotated
from fastattn.models.layers import Block, KVCache, SelfAttention
from fastattn.nn import FeedForward, GatedFeedForward, LayerNorm, RMSNorm, RotaryEmbedding
from fastattn.ops.library import observed

if TYPE_CHECKING:
    from fastattn.models.gpt import GPT

_MODULES = {
    *(nn.Embedding, nn.Dropout, nn.ModuleList, nn.Linear, Block, SelfAttention, FeedForward, GatedFeedForward),
    *(LayerNorm, RMSNorm, RotaryEmbedding),
}


def can_read_tokens(model: GPT) -> bool:
    """Whether a `TokenReader` does what the modules would: they are our own, unchanged, and nobody watches them."""
    weight = model.token_embedding.weight
    if not weight.is_cpu or observed((weight,)) or torch.is_autocast_enabled("cpu"):
        return False
    if not backend.eager_on_cpu() or torch.nn.modules.module._has_any_global_hook():
        return False
    _, *modules = model.modules()
    return (
        all(type(m) in _MODULES and "forward" not in vars(m) for m in modules)
        and all(m.norm_first for m in modules if isinstance(m, Block))
        and not any(m.interleaved for m in modules if isinstance(m, RotaryEmbedding))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and all(type(p) is nn.Parameter and p.dtype == weight.dtype for p in model.parameters())
    )


_Norm = Callable[[Tensor], Tensor]
_Linear = tuple[Tensor, Tensor | None]  # weight and bias


class _Layers(NamedTuple):
    """A block's, and how many tokens before its own a token sees (None: all)."""

    norm1: _Norm
    norm2: _Norm
    in_proj: _Linear
    out_proj: _Linear
    behind: int | None
    linear1: _Linear
    gate: tuple[Tensor | None, Tensor | None]
    activation: str
    linear2: _Linear


class TokenReader:
    """What `model.hidden(tokens[:, None], cache)[:, 0]` gives, for a model that `can_read_tokens`.

    Args:
        model: its parameters must stay the same tensors, with the same values.
        batch: number of sequences, to copy the weights into an order and the cache into a dtype that the CPU reads faster (pays for
            many tokens); 0 = no copy.

    Attributes:
        output_weight: the model's, or its copy: for `product`, which makes logits of what a call gives.
    """

    def __init__(self, model: GPT, batch: int = 0) -> None:
        config, blocks = model.config, list[Any](model.blocks)
        self.token_embedding = model.token_embedding.weight
        self.position_embedding = model.position_embedding.weight if model.rotary is None else None
        self.rotary = model.rotary
        self.heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.norm = _norm(model.norm)
        plain = [*(linear.weight for block in blocks for linear in _linears(block) if linear), model.output_weight]
        weights = iter(pack(plain, batch) if batch else plain)
        self.blocks: list[_Layers] = []
        for block in blocks:
            linears: list[Any] = [(next(weights), x.bias) if x else (None, None) for x in _linears(block)]
            in_proj, out_proj, linear1, gate, linear2 = linears
            behind = None if block.attention.window is None else block.attention.window[0]
            norms, activation = (_norm(block.norm1), _norm(block.norm2)), block.feed_forward.activation
            self.blocks.append(_Layers(*norms, in_proj, out_proj, behind, linear1, gate, activation, linear2))
        self.output_weight = next(weights)
        dtype = self.output_weight.dtype
        self.cache_dtype = torch.float32 if batch and attention_fused.faster_in_fp32(dtype) else dtype

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """(B,) → (B, d_model). The cache holds a token at least, as many of every sequence, and has room for one more.

        Its buffers are replaced where they are to have another dtype.
        """
        position, batch, dtype = int(cache.length), len(tokens), self.cache_dtype
        if cache.blocks[0][0].dtype != dtype:
            cache.blocks = [(keys.to(dtype), values.to(dtype)) for keys, values in cache.blocks]
        heads, kv_heads = self.heads
        cos = sin = None
        x = torch.embedding(self.token_embedding, tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding[position]
        if self.rotary is not None:
            cos, sin = self.rotary.cos[position], self.rotary.sin[position]
        for block, (keys, values) in zip(self.blocks, cache.blocks):
            # [B, Hq + 2 Hkv, 1, D]
            packed = product(block.norm1(x), *block.in_proj).view(batch, heads + 2 * kv_heads, 1, -1)
            turned, value = packed.split((heads + kv_heads, kv_heads), 1)
            if cos is not None and sin is not None:
                turned = rotated(turned, cos, sin, False, False)
            query, key = turned.split((heads, kv_heads), 1)
            keys.narrow(2, position, 1).copy_(key)
            values.narrow(2, position, 1).copy_(value)
            first = 0 if block.behind is None else max(0, position - block.behind)
            count = position + 1 - first
            seen = keys.narrow(2, first, count), values.narrow(2, first, count)
            query = query.reshape(batch, kv_heads, heads // kv_heads, -1).to(dtype)  # those that share a key, as rows
            out = attention_fused.forward(query, *seen, False, None)[0].reshape(batch, -1).to(x.dtype)
            x = x + product(out, *block.out_proj)
            hidden = hidden_layer(block.norm2(x), *block.linear1, *block.gate, block.activation)
            x = x + product(hidden, *block.linear2)
        cache.length = position + 1
        return self.norm(x)


def _linears(block: Any) -> tuple[nn.Linear | None, ...]:
    """In the order of `_Layers`; None: no gate."""
    attention, mlp = block.attention, block.feed_forward
    return attention.in_proj, attention.out_proj, mlp.linear1, getattr(mlp, "gate", None), mlp.linear2


def _norm(norm: Any) -> _Norm:
    """A norm as one call of PyTorch's."""
    shape, weight, eps = norm.normalized_shape, norm.weight, norm.eps
    if isinstance(norm, RMSNorm):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias = norm.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
