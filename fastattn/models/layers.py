"""What the example models are built from: self-attention with an optional cache, and the transformer block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.layout import Packing
from fastattn.nn import FeedForward, LayerNorm, RMSNorm, RotaryEmbedding
from fastattn.nn.plain import call_linear
from fastattn.ops.attention import attention
from fastattn.ops.decode import attention_with_kv_cache
from fastattn.ops.varlen import varlen_attention

NORMS = ("layer_norm", "rms_norm")


def make_norm(name: str, d_model: int, eps: float = 1e-5, bias: bool = True) -> nn.Module:
    """The norm of that name; an RMS norm has no bias."""
    return LayerNorm(d_model, eps, bias=bias) if name == "layer_norm" else RMSNorm(d_model, eps)


class KVCache:
    """The keys and values of the tokens read so far, one pair of buffers per block, appended to in place.

    Args:
        capacity: tokens that fit.

    Attributes:
        length: tokens that it holds: an int, or int32 (B,) where the sequences' lengths differ.
        blocks: the buffers, (B, Hkv, capacity, D) each.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length: int | Tensor = 0
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Append the new tokens' keys and values of one block, and attend to all up to each token: (B, Hq, T, D).

        The options are those of `attention_with_kv_cache`.
        The caller advances `length` once all blocks have appended.
        """
        if block == len(self.blocks):
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.blocks.append((key.new_empty(shape), key.new_empty(shape)))
        key_cache, value_cache = self.blocks[block]
        return attention_with_kv_cache(query, key_cache, value_cache, self.length, key=key, value=value, **options)


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of each sequence; (B, T, d_model) in and out.

    Args:
        d_model: features of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads, each of which serves num_heads / num_kv_heads query heads; None = num_heads.
        head_dim: features of a head; None = d_model / num_heads.
        window: how many tokens each sees, itself and those before it; None = all.
        dropout: probability with which an attention weight is dropped.
        bias: whether the output projection has one.
        qkv_bias: whether the input projection has one; None = `bias`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        qkv_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or d_model // num_heads
        self.window = None if window is None else (window - 1, None)
        self.dropout = dropout
        heads = self.num_heads + 2 * self.num_kv_heads
        self.heads_per_kv_head = heads // self.num_kv_heads  # query heads and the key's and the value's own
        self.in_proj = nn.Linear(d_model, heads * self.head_dim, bias=bias if qkv_bias is None else qkv_bias)
        self.out_proj = nn.Linear(num_heads * self.head_dim, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        rotary: RotaryEmbedding | None = None,
        positions: Tensor | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
        block: int = 0,
    ) -> Tensor:
        """Attend to the tokens of `cache` and then to x's own, those before it only if `causal`.

        Args:
            x: (B, T, d_model).
            causal: hide later tokens.
            mask: bool, broadcastable to (B, heads, T, T): True = attend.
            rotary: turns queries and keys by their positions, or None.
            positions: int64 (B or 1, T), for `rotary`; None: those after the cache's.
            packing: how sequences lie one after the other in x, with B = 1 and no mask; each sees itself alone. Or None.
            cache: read and extended, or None; with a cache, later tokens are hidden and there is no mask.
            block: which of the cache's buffers is this layer's.
        """
        query, key, value = self.heads(x, rotary=rotary, positions=positions, cache=cache)
        dropout_p = self.dropout if self.training else 0.0
        if cache is not None:
            out = cache.attend(block, query, key, value, window=self.window)
        elif packing is not None:
            q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, D)
            rows = varlen_attention(q, k, v, *packing, causal=causal, window=self.window, dropout_p=dropout_p)
            out = rows.transpose(0, 1)[None]
        else:
            out = attention(query, key, value, causal=causal, window=self.window, mask=mask, dropout_p=dropout_p)
        return call_linear(self.out_proj, out.transpose(1, 2).flatten(2))

    def heads(
        self,
        x: Tensor,
        *,
        rotary: RotaryEmbedding | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, Hq, T, D), key and value (B, Hkv, T, D) of x's tokens; the arguments are those of `forward`."""
        packed = call_linear(self.in_proj, x)  # (B, T, (Hq + 2 Hkv) · D), of the heads that this process has
        width = packed.shape[2] // self.heads_per_kv_head
        parts = packed.split((packed.shape[2] - 2 * width, width, width), dim=2)
        query, key, value = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)  # (B, H, T, D)
        if rotary is not None:
            offset = 0 if cache is None or positions is not None else cache.length
            query, key = rotary(query, key, positions=positions, offset=offset)
        return query, key, value


class Block(nn.Module):
    """Self-attention and feed-forward, each with a residual connection.

    norm_first:  x + f(norm(x)), "pre-norm": trains stably at any depth
    otherwise:   norm(x + f(x)), "post-norm": the original transformer (Vaswani et al., 2017)

    Args:
        d_model: features of input and output.
        attention: the attention among tokens.
        feed_forward: (..., d_model) → (..., d_model).
        dropout: probability with which a number of either's output is dropped.
        norm: "layer_norm" or "rms_norm".
        norm_eps: what the norms add to the variance.
        bias: whether a layer norm has one.
        norm_first: see above.
    """

    def __init__(
        self,
        d_model: int,
        attention: SelfAttention,
        feed_forward: FeedForward,
        *,
        dropout: float = 0.0,
        norm: str = "layer_norm",
        norm_eps: float = 1e-5,
        bias: bool = True,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = make_norm(norm, d_model, norm_eps, bias)
        self.attention = attention
        self.norm2 = make_norm(norm, d_model, norm_eps, bias)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """(B, T, d_model) → (B, T, d_model); the options are those of `SelfAttention.forward`."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), **options))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, **options)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))
