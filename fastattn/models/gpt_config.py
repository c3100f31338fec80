"""The sizes and choices that make a GPT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastattn.models.layers import NORMS
from fastattn.models.pretrained import check_sizes
from fastattn.ops.feed_forward import ACTIVATIONS, RECOMPUTE

POSITIONS = ("learned", "rotary")


@dataclass(frozen=True)
class GPTConfig:
    """What a GPT is built from.

    The defaults are GPT-2's; Llama is norm="rms_norm", positions="rotary", activation="silu", gated=True, bias=False.

    Attributes:
        vocab_size: number of different tokens.
        context_length: the longest sequence that the model reads, in tokens.
        num_layers: number of blocks.
        num_heads: attention heads in each block.
        d_model: width of the residual stream.
        d_ff: width inside the feed-forward network; None means 4 · d_model.
        dropout: probability with which the embeddings and each branch's output are dropped in training.
        attention_dropout: the same for the attention weights; on a CPU this costs more than the rest of the attention.
        bias: whether linear layers and layer norms have a bias.
        tie_weights: whether the output layer is the transposed token embedding.
        num_kv_heads: heads of keys and values, which must divide num_heads; None means num_heads.
        head_dim: width of a head; None means d_model / num_heads.
        norm: "layer_norm" or "rms_norm".
        norm_eps: added to the variance by the norms.
        positions: "learned" (an embedding) or "rotary" (queries and keys turn).
        rope_theta, rope_scaling: base and scaling of the rotary frequencies, see `fastattn.rotary_tables`.
        activation: of the feed-forward network, see `fastattn.feed_forward`.
        gated: whether the feed-forward network has a gate (with "silu": SwiGLU).
        qkv_bias: whether queries, keys and values have a bias; None means `bias`.
        window: how many tokens each token sees: itself and those before it; None means all.
        recompute: what the feed-forward network's backward computes again, see `fastattn.feed_forward`: "none"
            saves a CPU one pass over each block's hidden layer, but keeps that layer in memory.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a number out of its range, naming it.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 6
    num_heads: int = 6
    d_model: int = 384
    d_ff: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    bias: bool = True
    tie_weights: bool = True
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool | None = None
    window: int | None = None
    recompute: str = "activation"

    def __post_init__(self) -> None:
        derived = {"d_ff": 4 * self.d_model, "num_kv_heads": self.num_heads, "qkv_bias": self.bias}
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        sizes = ["vocab_size", "context_length", "num_layers", "num_heads", "num_kv_heads", "d_model", "d_ff"]
        check_sizes(self, *sizes, *(name for name in ("head_dim", "window") if getattr(self, name) is not None))
        source, numbers = "head_dim", str(self.head_dim)
        if self.head_dim is None:
            source, numbers = "d_model / num_heads", f"{self.d_model} / {self.num_heads}"
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        choices = {"norm": NORMS, "positions": POSITIONS, "activation": tuple(ACTIVATIONS), "recompute": RECOMPUTE}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.positions == "rotary" and self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(f"{source} must be even with rotary positions, got {numbers}")
        if self.num_heads % self.num_kv_heads:  # type: ignore[operator]
            heads = f"{self.num_heads} and {self.num_kv_heads}"
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {heads}")
        if not 0.0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be at least 0 and finite, got {self.norm_eps}")
