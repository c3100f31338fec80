"""Cross entropy of logits and of a projection, forward and backward; memory is what the loss of a language model is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import machine
from bench.cases import DTYPES, OpCase, Unavailable, comparison, in_one_graph, need


@dataclass(frozen=True)
class CrossEntropy(OpCase["CrossEntropy"]):
    """Mean cross entropy of logits (tokens, classes)."""

    tokens: int
    classes: int

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        return f"cross_entropy {passes} {self.dtype} {self.tokens}x{self.classes}"

    @property
    def traffic(self) -> float:
        """Forward reads the logits; backward reads them and writes the gradient."""
        return self.tokens * self.classes * DTYPES[self.dtype].itemsize * (3 if self.backward else 1)

    @property
    def differentiable(self) -> int:
        return 1

    def small(self) -> CrossEntropy:
        return replace(self, tokens=9, classes=50)

    def inputs(self) -> list[Tensor]:
        return [self.randn(self.tokens, self.classes), _targets(self.tokens, self.classes)]

    def definition(self, logits: Tensor, target: Tensor) -> Tensor:
        return _mean_loss(logits, target)

    def _grad_output(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.ones((), device=machine.device())


@dataclass(frozen=True)
class LinearCrossEntropy(CrossEntropy):
    """Mean cross entropy of hidden (tokens, width) times a weight (classes, width)."""

    width: int

    @property
    def name(self) -> str:
        return "linear_" + super().name + f" width {self.width}"

    @property
    def flops(self) -> float:
        return (6 if self.backward else 2) * self.tokens * self.classes * self.width

    @property
    def traffic(self) -> float:
        """Hidden states and weight once; the backward reads them again and writes their gradients."""
        numbers = (self.tokens + self.classes) * self.width
        return DTYPES[self.dtype].itemsize * numbers * (3 if self.backward else 1)

    @property
    def differentiable(self) -> int:
        return 2

    def small(self) -> LinearCrossEntropy:
        return replace(self, tokens=9, classes=50, width=16)

    def inputs(self) -> list[Tensor]:
        weight = self.randn(self.classes, self.width) * self.width**-0.5
        return [self.randn(self.tokens, self.width), weight, _targets(self.tokens, self.classes)]

    def definition(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return _mean_loss(hidden @ weight.t(), target)


def _targets(tokens: int, classes: int) -> Tensor:
    return torch.randint(classes, (tokens,), device=machine.device())


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (torch.logsumexp(z, 1) - z.gather(1, target[:, None])[:, 0]).mean()


def ours(case: CrossEntropy) -> Callable[..., Tensor]:
    return fastattn.cross_entropy


def torch_nn(case: CrossEntropy) -> Callable[..., Tensor]:
    return lambda logits, target: F.cross_entropy(logits.float(), target)


def compiled(case: CrossEntropy) -> Callable[..., Tensor]:
    return in_one_graph(torch_nn(case))


def liger(case: CrossEntropy) -> Callable[..., Tensor]:
    """The package liger-kernel, on a GPU."""
    package = need("liger_kernel.transformers.functional")
    if not torch.cuda.is_available():
        raise Unavailable("liger-kernel needs a GPU")
    return lambda logits, target: package.liger_cross_entropy(logits, target)


def ours_linear(case: LinearCrossEntropy) -> Callable[..., Tensor]:
    return fastattn.linear_cross_entropy


def torch_linear(case: LinearCrossEntropy) -> Callable[..., Tensor]:
    return lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_chunked(case: LinearCrossEntropy) -> Callable[..., Tensor]:
    """PyTorch's own chunks, which it has since 2.13."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable("this PyTorch has no chunked linear_cross_entropy")
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options())


def liger_linear(case: LinearCrossEntropy) -> Callable[..., Tensor]:
    """The package liger-kernel, on a GPU."""
    package = need("liger_kernel.transformers.functional")
    if not torch.cuda.is_available():
        raise Unavailable("liger-kernel needs a GPU")
    return lambda hidden, weight, target: package.liger_fused_linear_cross_entropy(hidden, weight, target)


PROVIDERS = {
    "fastattn": ours,
    "torch.nn": torch_nn,
    "torch.nn, torch.compile": compiled,
    "liger-kernel": liger,
}
LINEAR_PROVIDERS = {
    "fastattn": ours_linear,
    "torch.nn": torch_linear,
    "torch.nn, in chunks": torch_chunked,
    "liger-kernel": liger_linear,
}
DEFAULT = [CrossEntropy("fp32", True, 1024, 8192)]
REST = [
    CrossEntropy(dtype, backward, tokens, classes)
    for dtype in ("fp32", "bf16")
    for backward in (False, True)
    for tokens, classes in ((2048, 8192), (2048, 50257), (1024, 128256))
]
LINEAR_DEFAULT = [LinearCrossEntropy("fp32", True, 2048, 50257, 256)]
LINEAR_REST = [
    LinearCrossEntropy(dtype, True, tokens, classes, width)
    for dtype in ("fp32", "bf16")
    for tokens, classes, width in (
        (2048, 8192, 384), (2048, 50257, 768), (2048, 32000, 1024), (4096, 50257, 768),
    )
]  # fmt: skip


@comparison(PROVIDERS, DEFAULT, REST)
def test_cross_entropy(compare: Callable[..., None], case: CrossEntropy, provider: str) -> None:
    compare(case, provider, PROVIDERS)


@comparison(LINEAR_PROVIDERS, LINEAR_DEFAULT, LINEAR_REST)
def test_linear_cross_entropy(compare: Callable[..., None], case: LinearCrossEntropy, provider: str) -> None:
    compare(case, provider, LINEAR_PROVIDERS)
