"""The feed-forward layer of a transformer as a module, plain and gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastattn.checks import check_integer
from fastattn.nn.plain import activation_name, is_plain_linear, is_unhooked, weight_of
from fastattn.ops.feed_forward import ACTIVATIONS, RECOMPUTE, feed_forward, linear


def two_layers(
    input: Tensor,
    linear1: nn.Linear,
    linear2: nn.Linear,
    activation: str | Callable[[Tensor], Tensor],
    *,
    gate: nn.Linear | None = None,
    dropout: nn.Module | None = None,
    recompute: str = "none",
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), or with a gate linear2(dropout(activation(gate(x)) · linear1(x))).

    Plain linear layers run fused; layers with hooks, adapters or wrappers are called one by one.
    """
    name = activation if isinstance(activation, str) else activation_name(activation)
    plain1, plain2 = is_plain_linear(linear1, *([] if gate is None else [gate])), is_plain_linear(linear2)
    if name is not None and plain1 and plain2 and not _acts(dropout):
        return feed_forward(
            input, weight_of(linear1), linear1.bias, weight_of(linear2), linear2.bias,
            activation=name, gate_weight=None if gate is None else weight_of(gate),
            gate_bias=None if gate is None else gate.bias, recompute=recompute,
        )  # fmt: skip
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    if gate is not None:
        hidden = act(gate(input)) * linear1(input)
    elif name is not None and plain1:
        hidden = linear(input, weight_of(linear1), linear1.bias, activation=name)
    else:
        hidden = act(linear1(input))
    return linear2(hidden if dropout is None else dropout(hidden))


def _acts(dropout: nn.Module | None) -> bool:
    """Whether calling `dropout` may do anything."""
    if dropout is None or (type(dropout) is nn.Identity and is_unhooked(dropout)):
        return False
    return type(dropout) is not nn.Dropout or not is_unhooked(dropout) or (dropout.training and dropout.p > 0.0)


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
        d_model = check_integer("d_model", d_model, least=1)
        d_hidden = check_integer("d_hidden", d_hidden, least=1)
        self.activation, self.recompute = activation, recompute
        self.linear1 = nn.Linear(d_model, d_hidden, bias=bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(d_hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)"""
        return two_layers(input, self.linear1, self.linear2, self.activation, recompute=self.recompute)

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
        layers = self.linear1, self.linear2, self.activation
        return two_layers(input, *layers, gate=self.gate, recompute=self.recompute)
