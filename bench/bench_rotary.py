"""Rotary position embedding of queries (B, H, N, D) that a projection made (a row's heads lie together)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastattn
from bench import machine
from bench.cases import DTYPES, OpCase, comparison, if_compiled, in_one_graph, need


@dataclass(frozen=True)
class Rotary(OpCase["Rotary"]):
    batch: int
    heads: int
    length: int
    head_dim: int

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        return f"rotary {passes} {self.dtype} {self.batch}x{self.heads}x{self.length}x{self.head_dim}"

    @property
    def traffic(self) -> float:
        """Each pass reads and writes every number once."""
        numbers = self.batch * self.heads * self.length * self.head_dim
        return numbers * DTYPES[self.dtype].itemsize * (4 if self.backward else 2)

    @property
    def differentiable(self) -> int:
        return 1

    def small(self) -> Rotary:
        return replace(self, batch=2, heads=2, length=9, head_dim=16)

    def inputs(self) -> list[Tensor]:
        query = self.randn(self.batch, self.length, self.heads, self.head_dim).transpose(1, 2)
        return [query, *fastattn.rotary_tables(self.head_dim, self.length, device=machine.device())]

    def definition(self, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turn = torch.complex(cos, sin)
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        turned = torch.complex(*wide.chunk(2, -1)) * turn.to(torch.promote_types(wide.dtype, torch.complex64))
        return torch.cat([turned.real, turned.imag], -1).to(query.dtype)

    def _grad_output(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.randn_like(inputs[0])


def ours(case: Rotary) -> Callable[..., Tensor]:
    return lambda query, cos, sin: fastattn.rotary(query, None, cos, sin)[0]


def ours_compiled(case: Rotary) -> Callable[..., Tensor]:
    return in_one_graph(ours(case))


def plain(case: Rotary) -> Callable[..., Tensor]:
    """The two halves, written in PyTorch."""

    def rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = query.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(query.dtype)

    return rotate


def transformers(case: Rotary) -> Callable[..., Tensor]:
    """What Hugging Face's models call, with tables made for it beforehand."""
    llama = need("transformers.models.llama.modeling_llama")

    def rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = (torch.cat([table, table], -1)[None].to(query.dtype) for table in (cos, sin))
        return llama.apply_rotary_pos_emb(query, query[:, :0], *wide)[0]

    return rotate


def compiled(case: Rotary) -> Callable[..., Tensor]:
    return in_one_graph(plain(case))


PROVIDERS = {
    "fastattn": ours,
    "plain PyTorch": plain,
    "fastattn, torch.compile": ours_compiled,
    "plain, torch.compile": compiled,
    "transformers": transformers,
}
DEFAULT = [Rotary(dtype, True, 4, 8, 512, 64) for dtype in ("fp32", "bf16")]
REST = [
    Rotary(dtype, backward, *shape)
    for dtype in ("fp32", "bf16")
    for backward in (False, True)
    for shape in ((1, 32, 1, 128), (1, 8, 2048, 64), (1, 32, 4096, 128))
]


@comparison(PROVIDERS, DEFAULT, REST, slow=if_compiled)
def test_rotary(compare: Callable[..., None], case: Rotary, provider: str) -> None:
    compare(case, provider, PROVIDERS)
