"""The feed-forward layer of a transformer: linear, activation, linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.cases import OpCase, in_one_graph

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class FeedForward(OpCase["FeedForward"]):
    activation: str
    rows: int
    width: int

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        return f"feed_forward {self.activation} {passes} {self.dtype} {self.rows}x{self.width}"

    @property
    def flops(self) -> float:
        """2 products of 2·rows·width·4·width operations; the backward takes twice that."""
        return 16 * self.rows * self.width**2 * (3 if self.backward else 1)

    @property
    def differentiable(self) -> int:
        return 5

    def small(self) -> FeedForward:
        return replace(self, rows=17, width=24)

    def inputs(self) -> list[Tensor]:
        d, h = self.width, 4 * self.width
        return [
            self.randn(self.rows, d),
            self.randn(h, d) / d**0.5,
            self.randn(h),
            self.randn(d, h) / h**0.5,
            self.randn(d),
        ]

    def definition(self, input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](input @ weight1.T + bias1) @ weight2.T + bias2


def ours(case: FeedForward) -> Callable[..., Tensor]:
    return lambda *tensors: fastattn.feed_forward(*tensors, activation=case.activation)


def sequential(case: FeedForward) -> Callable[..., Tensor]:
    """What `nn.Sequential(nn.Linear, activation, nn.Linear)` runs."""
    activate = ACTIVATIONS[case.activation]
    return lambda x, w1, b1, w2, b2: F.linear(activate(F.linear(x, w1, b1)), w2, b2)


def compiled(case: FeedForward) -> Callable[..., Tensor]:
    return in_one_graph(sequential(case))


PROVIDERS = {"fastattn": ours, "torch nn.Sequential": sequential, "nn.Sequential, torch.compile": compiled}
DEFAULT = [
    FeedForward(dtype, backward, "gelu_tanh", 2048, 384) for dtype in ("fp32", "bf16") for backward in (False, True)
]
REST = [
    case
    for dtype in ("fp32", "bf16")
    for activation in ACTIVATIONS
    for rows, width in ((64, 384), (2048, 384), (1024, 1024))
    for backward in (False, True)
    if (case := FeedForward(dtype, backward, activation, rows, width)) not in DEFAULT
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "case", [*DEFAULT, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)], ids=lambda case: case.name
)
def test_feed_forward(compare: Callable[..., None], case: FeedForward, provider: str) -> None:
    compare(case, provider, PROVIDERS)
