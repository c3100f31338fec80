"""The feed-forward layer of a transformer as a module, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.ops.feed_forward import ACTIVATIONS, RECOMPUTE, feed_forward


class FeedForward(nn.Module):
    """linear2(activation(linear1(x))) in two kernels.

    The parameters are those of two `torch.nn.Linear`, initialised alike: linear1.weight (d_hidden, d_model),
    linear1.bias, linear2.weight (d_model, d_hidden), linear2.bias.

    Args:
        d_model: features of input and output.
        d_hidden: features in between; default 4 · d_model.
        activation: "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh" or "identity".
        bias: whether the two layers have one.
        recompute: what the backward computes again, see `fastattn.feed_forward`.

    Example:
        >>> FeedForward(8, activation="silu")(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        recompute: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        for name, value, allowed in (
            ("activation", activation, tuple(ACTIVATIONS)),
            ("recompute", recompute, RECOMPUTE),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, size in (("d_model", d_model), ("d_hidden", d_hidden)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.activation, self.recompute = activation, recompute
        self.linear1 = nn.Linear(d_model, d_hidden, bias=bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(d_hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)"""
        return feed_forward(
            input,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute!r}"


class GatedFeedForward(FeedForward):
    """linear2(activation(gate(x)) · linear1(x)): GLU ("sigmoid"), ReGLU ("relu"), GEGLU ("gelu"), SwiGLU ("silu").

    As `FeedForward`, with a third `torch.nn.Linear` named gate, (d_hidden, d_model) like linear1.

    Example:
        >>> GatedFeedForward(8, 20)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        activation: str = "silu",
        bias: bool = True,
        recompute: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_hidden, activation=activation, bias=bias, recompute=recompute, device=device, dtype=dtype
        )
        self.gate = nn.Linear(d_model, self.linear1.out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)"""
        return feed_forward(
            input,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
            gate_weight=self.gate.weight,
            gate_bias=self.gate.bias,
            recompute=self.recompute,
        )
