"""Layer norm, forward and with backward; bytes are those that have to be read and written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.cases import DTYPES, OpCase, Unavailable, comparison, if_compiled, in_one_graph, need


@dataclass(frozen=True)
class LayerNorm(OpCase["LayerNorm"]):
    rows: int
    width: int

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        return f"layer_norm {passes} {self.dtype} {self.rows}x{self.width}"

    @property
    def traffic(self) -> float:
        """Forward reads x and writes y; backward reads x and dy and writes dx."""
        return self.rows * self.width * DTYPES[self.dtype].itemsize * (5 if self.backward else 2)

    @property
    def differentiable(self) -> int:
        return 3

    def small(self) -> LayerNorm:
        return replace(self, rows=19, width=40)

    def inputs(self) -> list[Tensor]:
        return [self.randn(self.rows, self.width), self.randn(self.width), self.randn(self.width)]

    def definition(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def ours(case: LayerNorm) -> Callable[..., Tensor]:
    return lambda x, weight, bias: fastattn.layer_norm(x, case.width, weight, bias)


def torch_nn(case: LayerNorm) -> Callable[..., Tensor]:
    return lambda x, weight, bias: F.layer_norm(x, (case.width,), weight, bias)


def torch_nn_in_fp32(case: LayerNorm) -> Callable[..., Tensor]:
    """PyTorch's, with 16-bit rows widened: how to get right gradients of weight and bias from it on a CPU."""
    if case.dtype == "fp32" or not case.backward:
        raise Unavailable("the same as torch.nn")
    dtype = DTYPES[case.dtype]
    return lambda *inputs: F.layer_norm(inputs[0].float(), (case.width,), *(x.float() for x in inputs[1:])).to(dtype)


def plain(case: LayerNorm) -> Callable[..., Tensor]:
    """The formula, written in PyTorch."""
    return case.definition


def compiled(case: LayerNorm) -> Callable[..., Tensor]:
    return in_one_graph(case.definition)


def liger(case: LayerNorm) -> Callable[..., Tensor]:
    """The package liger-kernel, on a GPU."""
    package = need("liger_kernel.transformers.functional")
    if not torch.cuda.is_available():
        raise Unavailable("liger-kernel needs a GPU")
    return lambda x, weight, bias: package.liger_layer_norm(x, weight, bias, 1e-5)


PROVIDERS = {
    "fastattn": ours,
    "torch.nn": torch_nn,
    "torch.nn in fp32": torch_nn_in_fp32,
    "plain PyTorch": plain,
    "plain, torch.compile": compiled,
    "liger-kernel": liger,
}
DEFAULT = [
    LayerNorm(dtype, backward, rows, width)
    for dtype in ("fp32", "bf16")
    for rows, width in ((2048, 384), (4096, 768))
    for backward in (False, True)
]
REST = [
    LayerNorm(dtype, backward, rows, width)
    for dtype in ("fp32", "bf16")
    for rows, width in ((64, 384), (512, 768), (2048, 1024), (4096, 4096), (512, 16384))
    for backward in (False, True)
]


@comparison(PROVIDERS, DEFAULT, REST, slow=if_compiled)
def test_normalization(compare: Callable[..., None], case: LayerNorm, provider: str) -> None:
    compare(case, provider, PROVIDERS)
