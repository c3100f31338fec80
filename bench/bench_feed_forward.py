"""The feed-forward layer of a transformer: linear, activation, linear; and with a gate (SwiGLU, GEGLU)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.cases import DTYPES, OpCase, Unavailable, comparison, if_compiled, in_one_graph, need

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
    gated: bool = False

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        return f"feed_forward{' gated' * self.gated} {self.activation} {passes} {self.dtype} {self.rows}x{self.width}"

    @property
    def flops(self) -> float:
        """2 products of 2·rows·width·4·width operations, 3 with a gate; the backward takes twice that."""
        return (24 if self.gated else 16) * self.rows * self.width**2 * (3 if self.backward else 1)

    @property
    def traffic(self) -> float:
        """Input, output and matrices once; the backward reads them again and writes their gradients."""
        numbers = 2 * self.rows * self.width + (12 if self.gated else 8) * self.width**2
        return DTYPES[self.dtype].itemsize * numbers * (3 if self.backward else 1)

    @property
    def differentiable(self) -> int:
        return 7 if self.gated else 5

    def small(self) -> FeedForward:
        return replace(self, rows=17, width=24)

    def inputs(self) -> list[Tensor]:
        d, h = self.width, 4 * self.width
        gate = [self.randn(h, d) / d**0.5, self.randn(h)] if self.gated else []
        return [
            self.randn(self.rows, d),
            self.randn(h, d) / d**0.5,
            self.randn(h),
            self.randn(d, h) / h**0.5,
            self.randn(d),
            *gate,
        ]

    def definition(self, input: Tensor, weight1: Tensor, bias1: Tensor, *rest: Tensor) -> Tensor:
        weight2, bias2, *gate = rest
        hidden, activate = input @ weight1.T + bias1, ACTIVATIONS[self.activation]
        hidden = activate(input @ gate[0].T + gate[1]) * hidden if gate else activate(hidden)
        return hidden @ weight2.T + bias2


def ours(case: FeedForward) -> Callable[..., Tensor]:
    def run(input: Tensor, *weights: Tensor) -> Tensor:
        gate = dict(zip(("gate_weight", "gate_bias"), weights[4:]))
        return fastattn.feed_forward(input, *weights[:4], activation=case.activation, **gate)

    return run


def sequential(case: FeedForward) -> Callable[..., Tensor]:
    """What `nn.Sequential(nn.Linear, activation, nn.Linear)` runs; with a gate, what Llama's MLP runs."""
    activate = ACTIVATIONS[case.activation]
    if case.gated:
        return lambda x, w1, b1, w2, b2, wg, bg: F.linear(activate(F.linear(x, wg, bg)) * F.linear(x, w1, b1), w2, b2)
    return lambda x, w1, b1, w2, b2: F.linear(activate(F.linear(x, w1, b1)), w2, b2)


def compiled(case: FeedForward) -> Callable[..., Tensor]:
    return in_one_graph(sequential(case))


def liger(case: FeedForward) -> Callable[..., Tensor]:
    """The package liger-kernel, on a GPU: its product of activation and gate between PyTorch's linear layers."""
    if (case.gated, case.activation) not in ((True, "silu"), (True, "gelu_tanh")):
        raise Unavailable("liger-kernel has SwiGLU and GEGLU only")
    name = "swiglu" if case.activation == "silu" else "geglu"
    package = need(f"liger_kernel.ops.{name}")
    if not torch.cuda.is_available():
        raise Unavailable("liger-kernel needs a GPU")
    multiply = package.LigerSiLUMulFunction.apply if name == "swiglu" else package.LigerGELUMulFunction.apply
    return lambda x, w1, b1, w2, b2, wg, bg: F.linear(multiply(F.linear(x, wg, bg), F.linear(x, w1, b1)), w2, b2)


PROVIDERS = {
    "fastattn": ours,
    "torch nn.Sequential": sequential,
    "nn.Sequential, torch.compile": compiled,
    "liger-kernel": liger,
}
DEFAULT = [
    FeedForward(dtype, backward, *kind)
    for dtype in ("fp32", "bf16")
    for backward in (False, True)
    for kind in (("gelu_tanh", 2048, 384), ("silu", 2048, 384, True))
]
REST = [
    FeedForward(dtype, backward, activation, rows, width, gated)
    for dtype in ("fp32", "bf16")
    for activation in ACTIVATIONS
    for gated in (False, True)
    for rows, width in ((64, 384), (2048, 384), (1024, 1024))
    for backward in (False, True)
]


@comparison(PROVIDERS, DEFAULT, REST, slow=if_compiled)
def test_feed_forward(compare: Callable[..., None], case: FeedForward, provider: str) -> None:
    compare(case, provider, PROVIDERS)
