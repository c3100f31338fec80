"""What the example models are built from: self-attention with an optional cache, and the transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.nn import FeedForward, LayerNorm
from fastattn.ops.attention import attention
from fastattn.ops.decode import attention_with_kv_cache


class KVCache:
    """The keys and values of the tokens read so far, one pair of buffers per block, appended to in place.

    Args:
        capacity: tokens that fit.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append the new tokens' keys and values of one block, and attend to all up to each token: (B, H, T, D).

        `length` is the caller's to advance, once all blocks have appended.
        """
        if block == len(self.blocks):
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.blocks.append((key.new_empty(shape), key.new_empty(shape)))
        key_cache, value_cache = self.blocks[block]
        return attention_with_kv_cache(query, key_cache, value_cache, self.length, key=key, value=value)


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of each sequence; (B, T, d_model) in and out."""

    def __init__(self, d_model: int, num_heads: int, *, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, *, causal: bool, mask: Tensor | None = None, cache: KVCache | None = None, block: int = 0
    ) -> Tensor:
        """Attend to the tokens of `cache` and then to x's own, those before it only if `causal`.

        Args:
            x: (B, T, d_model).
            causal: hide later tokens.
            mask: bool, broadcastable to (B, heads, T, T): True = attend.
            cache: read and extended, or None; with a cache, later tokens are hidden and there is no mask.
            block: which of the cache's buffers is this layer's.
        """
        batch, new, width = x.shape
        packed = self.in_proj(x).view(batch, new, 3, self.num_heads, width // self.num_heads)
        packed = packed.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D), of which the three are views: nothing is copied
        query, key, value = packed.unbind()
        if cache is None:
            dropout_p = self.dropout if self.training else 0.0
            out = attention(query, key, value, causal=causal, mask=mask, dropout_p=dropout_p)
        else:
            out = cache.attend(block, query, key, value)
        return self.out_proj(out.transpose(1, 2).reshape(batch, new, width))


class Block(nn.Module):
    """Self-attention and feed-forward, each with a residual connection.

    norm_first:  x + f(norm(x)), "pre-norm": trains stably at any depth
    otherwise:   norm(x + f(x)), "post-norm": the original transformer (Vaswani et al., 2017)
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        bias: bool = True,
        activation: str = "gelu_tanh",
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, bias=bias)
        self.attention = SelfAttention(d_model, num_heads, dropout=attention_dropout, bias=bias)
        self.norm2 = LayerNorm(d_model, bias=bias)
        self.feed_forward = FeedForward(d_model, d_ff, activation=activation, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, *, causal: bool, mask: Tensor | None = None, cache: KVCache | None = None, block: int = 0
    ) -> Tensor:
        """(B, T, d_model) → (B, T, d_model); the arguments are those of `SelfAttention.forward`."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), causal=causal, mask=mask, cache=cache, block=block))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, causal=causal, mask=mask, cache=cache, block=block)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))
