"""One new token of every sequence through a GPT on a CPU, without the overhead of modules and ops.

For one token, what modules and ops do around a block's products (calls, checks, dispatch) takes as long as the products,
because the weights push its code and data out of the caches (`python -m bench.report models` times generation). The formulas are those of
`Block` and `SelfAttention`, and tests/test_gpt.py holds `TokenReader` to their numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn import backend
from fastattn.eager import attention_fused
from fastattn.eager.feed_forward import activated
from fastattn.eager.products import pack, product
from fastattn.models.layers import Block, KVCache, SelfAttention
from fastattn.nn import FeedForward, LayerNorm
from fastattn.ops.library import observed

if TYPE_CHECKING:
    from fastattn.models.gpt import GPT

_MODULES = {nn.Embedding, nn.Dropout, nn.ModuleList, nn.Linear, Block, SelfAttention, FeedForward, LayerNorm}


def can_read_tokens(model: GPT) -> bool:
    """Whether a `TokenReader` does what the modules would: they are our own, unchanged, and nobody watches them."""
    weight, config = model.token_embedding.weight, model.config
    if config.num_kv_heads != config.num_heads:
        return False
    if not weight.is_cpu or observed((weight,)) or torch.is_autocast_enabled("cpu"):
        return False
    if not backend.eager_on_cpu() or torch.nn.modules.module._has_any_global_hook():
        return False
    _, *modules = model.modules()
    return (
        all(type(m) in _MODULES and "forward" not in vars(m) for m in modules)
        and all(m.norm_first for m in modules if isinstance(m, Block))
        and all(m.window is None for m in modules if isinstance(m, SelfAttention))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and all(type(p) is nn.Parameter and p.dtype == weight.dtype for p in model.parameters())
    )


class TokenReader:
    """What `model.hidden(tokens[:, None], cache)[:, 0]` gives, for a model that `can_read_tokens`.

    Args:
        model: its parameters must stay the same tensors, with the same values.
        batch: number of sequences, to copy the weights into an order that the CPU reads faster (pays for many tokens); 0 = no copy.

    Attributes:
        output_weight: the model's, or its copy: for `product`, which makes logits of what a call gives.
    """

    def __init__(self, model: GPT, batch: int = 0) -> None:
        self.embeddings = model.token_embedding.weight, model.position_embedding.weight
        self.num_heads = model.config.num_heads
        self.norm = _norm_parameters(model.norm)
        self.blocks: list[Any] = []
        blocks: Any = model.blocks
        plain = [*(m.weight for block in blocks for m in _linears(block)), model.output_weight]
        weights = iter(pack(plain, batch) if batch else plain)
        for block in blocks:
            norms = _norm_parameters(block.norm1), _norm_parameters(block.norm2)
            linears = [(next(weights), m.bias) for m in _linears(block)]
            self.blocks.append((*norms, *linears, block.feed_forward.activation))
        self.output_weight = next(weights)
        self.cache_dtype = (
            torch.float32 if attention_fused.faster_in_fp32(self.output_weight.dtype) else self.output_weight.dtype
        )

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """(B,) → (B, d_model). The cache holds a token at least, as many of every sequence, and has room for one more.

        What it holds becomes fp32 where a query is faster then.
        """
        position, batch, dtype = int(cache.length), len(tokens), self.cache_dtype
        if cache.blocks[0][0].dtype != dtype:
            cache.blocks = [(keys.to(dtype), values.to(dtype)) for keys, values in cache.blocks]
        x = torch.embedding(self.embeddings[0], tokens) + self.embeddings[1][position]
        for (norm1, norm2, in_proj, out_proj, linear1, linear2, activation), (keys, values) in zip(
            self.blocks, cache.blocks
        ):
            packed = product(torch.layer_norm(x, *norm1), *in_proj)
            query, key, value = packed.view(batch, 3, self.num_heads, 1, -1).unbind(1)  # (B, H, 1, D)
            keys.narrow(2, position, 1).copy_(key)
            values.narrow(2, position, 1).copy_(value)
            seen = keys.narrow(2, 0, position + 1), values.narrow(2, 0, position + 1)
            out = attention_fused.forward(query.to(dtype), *seen, False, None)[0].reshape(batch, -1).to(x.dtype)
            x = x + product(out, *out_proj)
            x = x + product(activated(torch.layer_norm(x, *norm2), linear1[0], linear1[1], activation), *linear2)
        cache.length = position + 1
        return torch.layer_norm(x, *self.norm)


def _linears(block: Any) -> tuple[nn.Linear, ...]:
    attention, mlp = block.attention, block.feed_forward
    return attention.in_proj, attention.out_proj, mlp.linear1, mlp.linear2


def _norm_parameters(norm: Any) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps
