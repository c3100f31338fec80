"""Attention over sequences of different lengths: packed, against padding them and against one call for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import machine
from bench.cases import OpCase, Unavailable, comparison, need
from bench.contest import Run
from tests import reference

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Layout:
    """What does the job, and how its tensors differ from packed ones (tokens, H, D), if they do; moving is not timed."""

    function: Function
    pack: Callable[[Tensor], Tensor] = lambda packed: packed
    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Varlen(OpCase["Varlen"]):
    """`longest` and shorter sequences down to an eighth of it, evenly spread."""

    causal: bool
    sequences: int
    longest: int
    heads: int = 8
    dim: int = 64

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        kind = "causal" if self.causal else "full"
        return f"varlen attention {kind} {passes} {self.dtype} {self.sequences} sequences up to {self.longest}"

    @property
    def lengths(self) -> list[int]:
        shortest = self.longest // 8
        return [
            self.longest - i * (self.longest - shortest) // max(1, self.sequences - 1) for i in range(self.sequences)
        ]

    @property
    def flops(self) -> float:
        """As for attention, over the pairs within each sequence."""
        pairs = sum(n * (n + 1) / 2 if self.causal else n**2 for n in self.lengths)
        return self.heads * pairs * 2 * self.dim * (7 if self.backward else 2)

    @property
    def differentiable(self) -> int:
        return 3

    def small(self) -> Varlen:
        return replace(self, sequences=3, longest=24)

    def inputs(self) -> list[Tensor]:
        return [self.randn(sum(self.lengths), self.heads, self.dim) for _ in range(3)]

    def definition(self, *packed: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(self.lengths, dim=2) for x in packed))
        outputs = [reference.attention(q, k, v, causal=self.causal)[0] for q, k, v in parts]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    def job(self, provider: Callable[[Varlen], Layout]) -> Run:
        layout, inputs = provider(self), self.inputs()
        dy = layout.pack(self._grad_output(inputs))
        return self._run(layout.function, [layout.pack(x) for x in inputs], dy)

    def check(self, provider: Callable[[Varlen], Layout]) -> None:
        def function(case: Varlen) -> Function:
            layout = provider(case)
            return lambda *packed: layout.unpack(layout.function(*(layout.pack(x) for x in packed)))

        super().check(function)


def ours(case: Varlen) -> Layout:
    ends = torch.tensor([0, *case.lengths], device=machine.device()).cumsum(0, dtype=torch.int32)
    n, causal = max(case.lengths), case.causal
    return Layout(lambda q, k, v: fastattn.varlen_attention(q, k, v, ends, ends, n, n, causal=causal))


def padded(case: Varlen) -> Layout:
    """PyTorch's attention of (B, H, N, D); causal padding at the end needs no mask, else the keys' is made beforehand."""
    lengths = torch.tensor(case.lengths, device=machine.device())
    tokens = torch.arange(case.longest, device=machine.device()) < lengths[:, None]  # (B, N)
    mask = None if case.causal else tokens[:, None, None, :]

    def pack(packed: Tensor) -> Tensor:
        rows = packed.new_zeros(case.sequences, case.longest, *packed.shape[1:])
        return rows.masked_scatter(tokens[..., None, None], packed).transpose(1, 2)

    return Layout(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.causal),
        pack,
        lambda out: out.transpose(1, 2)[tokens],
    )


def one_by_one(case: Varlen) -> Layout:
    """PyTorch's attention, a call for each sequence."""

    def function(*packed: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(case.lengths, dim=2) for x in packed))
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=case.causal) for q, k, v in parts]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    return Layout(function)


def flash_attn(case: Varlen) -> Layout:
    """The package flash-attn, on an NVIDIA GPU."""
    package = need("flash_attn")
    if case.dtype == "fp32":
        raise Unavailable("flash-attn has no fp32")
    ends = torch.tensor([0, *case.lengths], device=machine.device()).cumsum(0, dtype=torch.int32)
    n, causal = max(case.lengths), case.causal
    return Layout(lambda q, k, v: package.flash_attn_varlen_func(q, k, v, ends, ends, n, n, causal=causal))


PROVIDERS = {
    "fastattn": ours,
    "torch SDPA, padded": padded,
    "torch SDPA, one by one": one_by_one,
    "flash-attn": flash_attn,
}
DEFAULT = [Varlen("fp32", backward, True, 8, 1024) for backward in (False, True)]
REST = [
    Varlen(dtype, backward, causal, *shape)
    for dtype in ("fp32", "bf16")
    for causal in (False, True)
    for backward in (False, True)
    for shape in ((8, 1024), (32, 256), (4, 4096))
]


@comparison(PROVIDERS, DEFAULT, REST)
def test_varlen(compare: Callable[..., None], case: Varlen, provider: str) -> None:
    compare(case, provider, PROVIDERS)
