"""Layer norm and RMS norm, forward and with backward; bytes are those that have to be read and written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench.cases import DTYPES, OpCase, Unavailable, comparison, if_compiled, in_one_graph, need

EPS = 1e-5


@dataclass(frozen=True)
class Norm(OpCase["Norm"]):
    rows: int
    width: int
    rms: bool = False
    fp32_parameters: bool = False

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        parameters = " fp32 parameters" if self.fp32_parameters else ""
        return f"{'rms_norm' if self.rms else 'layer_norm'} {passes} {self.dtype} {self.rows}x{self.width}{parameters}"

    @property
    def traffic(self) -> float:
        """Forward reads x and writes y; backward reads x and dy and writes dx."""
        return self.rows * self.width * DTYPES[self.dtype].itemsize * (5 if self.backward else 2)

    @property
    def differentiable(self) -> int:
        return 2 if self.rms else 3

    def small(self) -> Norm:
        return replace(self, rows=19, width=40)

    def inputs(self) -> list[Tensor]:
        """Rows, weight, and for layer norm a bias."""
        parameters = [self.randn(self.width) for _ in range(1 if self.rms else 2)]
        return [self.randn(self.rows, self.width), *(p.float() if self.fp32_parameters else p for p in parameters)]

    def definition(self, input: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        centred = input if self.rms else input - input.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        return y + bias[0] if bias else y


def ours(case: Norm) -> Callable[..., Tensor]:
    norm = fastattn.rms_norm if case.rms else fastattn.layer_norm
    return lambda x, *weights: norm(x, case.width, *weights, eps=EPS)


def ours_compiled(case: Norm) -> Callable[..., Tensor]:
    return in_one_graph(ours(case))


def torch_nn(case: Norm) -> Callable[..., Tensor]:
    if case.fp32_parameters and not torch.cuda.is_available():
        raise Unavailable("the gradients of fp32 parameters are sums in 16 bits")
    return _torch_nn(case)


def _torch_nn(case: Norm) -> Callable[..., Tensor]:
    norm = F.rms_norm if case.rms else F.layer_norm
    return lambda x, *weights: norm(x, (case.width,), *weights, eps=EPS)


def torch_nn_in_fp32(case: Norm) -> Callable[..., Tensor]:
    """PyTorch's, with 16-bit rows widened: how to get right gradients of weight and bias from it on a CPU."""
    if case.dtype == "fp32" or not case.backward:
        raise Unavailable("the same as torch.nn")
    function, dtype = _torch_nn(case), DTYPES[case.dtype]
    return lambda *inputs: function(*(x.float() for x in inputs)).to(dtype)


def plain(case: Norm) -> Callable[..., Tensor]:
    """The formula, written in PyTorch."""
    return case.definition


def compiled(case: Norm) -> Callable[..., Tensor]:
    return in_one_graph(case.definition)


def liger(case: Norm) -> Callable[..., Tensor]:
    """The package liger-kernel, on a GPU."""
    package = need("liger_kernel.transformers.functional")
    if not torch.cuda.is_available():
        raise Unavailable("liger-kernel needs a GPU")
    norm = package.liger_rms_norm if case.rms else package.liger_layer_norm
    return lambda *inputs: norm(*inputs, EPS)


PROVIDERS = {
    "fastattn": ours,
    "torch.nn": torch_nn,
    "torch.nn in fp32": torch_nn_in_fp32,
    "plain PyTorch": plain,
    "fastattn, torch.compile": ours_compiled,
    "plain, torch.compile": compiled,
    "liger-kernel": liger,
}
SIZES = ((64, 384), (512, 768), (2048, 384), (2048, 1024), (4096, 768), (4096, 4096), (512, 16384))
DEFAULT = [
    Norm(dtype, backward, rows, width, rms)
    for dtype in ("fp32", "bf16")
    for rows, width, rms in ((2048, 384, False), (4096, 768, False), (4096, 768, True))
    for backward in (False, True)
]
REST = [
    Norm(dtype, backward, *size, rms)
    for rms in (False, True)
    for dtype in ("fp32", "bf16")
    for size in SIZES
    for backward in (False, True)
] + [Norm("bf16", True, rows, width, fp32_parameters=True) for rows, width in ((2048, 384), (4096, 768))]


@comparison(PROVIDERS, DEFAULT, REST, slow=if_compiled)
def test_normalization(compare: Callable[..., None], case: Norm, provider: str) -> None:
    compare(case, provider, PROVIDERS)
