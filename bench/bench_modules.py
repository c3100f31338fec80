"""Drop-in modules against torch's: one layer with its parameters, forward (`eval`) and forward with backward (`train`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fastattn.nn
from bench import machine
from bench.cases import DTYPES, Case, comparison, if_compiled, in_one_graph
from bench.contest import Run
from tests.compare import assert_close

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder layer": ("TransformerEncoderLayer", {}),
    "encoder layer, norm first, GELU": ("TransformerEncoderLayer", {"norm_first": True, "activation": "gelu"}),
    "decoder layer": ("TransformerDecoderLayer", {}),
    "multi-head attention": ("MultiheadAttention", {}),
}


@dataclass(frozen=True)
class Module(Case):
    """`padded`: samples of different lengths with a key padding mask. A provider gives the class's library and a wrapper."""

    backward: bool
    kind: str
    batch: int = 8
    length: int = 256
    width: int = 384
    heads: int = 6
    padded: bool = False

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        where = f"B{self.batch} T{self.length} d{self.width}{' padded' if self.padded else ''}"
        return f"{self.kind} {passes} {self.dtype} {where}"

    @property
    def flops(self) -> float:
        """2 operations a token for each number of a matrix, attention's 2 products over all pairs; the backward twice that."""
        attentions = 2 if self.kind == "decoder layer" else 1
        feed_forward = 0 if self.kind == "multi-head attention" else 8
        per_token = 2 * (4 * attentions + feed_forward) * self.width**2 + 4 * attentions * self.length * self.width
        return self.batch * self.length * per_token * (3 if self.backward else 1)

    def small(self) -> Module:
        return replace(self, batch=2, length=12, width=16, heads=2)

    def layer(self, library: ModuleType) -> nn.Module:
        name, options = KINDS[self.kind]
        torch.manual_seed(0)
        sizes = {} if self.kind == "multi-head attention" else {"dim_feedforward": 4 * self.width}
        return getattr(library, name)(self.width, self.heads, dropout=0.0, batch_first=True, **sizes, **options)

    def call(self, layer: Callable[..., Any], x: Tensor) -> Tensor:
        lengths = torch.linspace(self.length, self.length // 4, self.batch, device=x.device).long()
        hidden = torch.arange(self.length, device=x.device) >= lengths[:, None] if self.padded else None
        if self.kind == "decoder layer":
            return layer(x, x, tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        if self.kind == "multi-head attention":
            return layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        return layer(x, src_key_padding_mask=hidden)

    def job(self, provider: Callable[[Module], tuple[nn.Module, Callable[..., Any]]]) -> Run:
        return self._run(*provider(self), DTYPES[self.dtype])

    def check(self, provider: Callable[[Module], tuple[nn.Module, Callable[..., Any]]]) -> None:
        """Against torch's in fp64 and training mode, which takes no short cuts."""
        case = self.small()
        model = torch_nn(case)[0].train()
        plain = replace(case, backward=True)._run(model, model, DTYPES[self.dtype])()
        truth = replace(case, backward=True)._run(model, model, torch.float64)()
        text = slice(case.length // 4 if self.padded else None)  # torch's `eval` puts zeros where a sample has ended
        for i, tensors in enumerate(zip(case.job(provider)(), truth, plain)):
            compared = [x[:, text] if x.dim() == 3 else x for x in tensors]
            assert_close(f"gradient {i}" if i else "output", *compared)

    def _run(self, model: nn.Module, call: Callable[..., Any], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        model.to(machine.device(), dtype).train(self.backward)
        generator = torch.Generator().manual_seed(1)
        x, dy = torch.randn(2, self.batch, self.length, self.width, generator=generator).to(machine.device(), dtype)
        leaves = [x.requires_grad_(self.backward), *model.parameters()]

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(self.backward):
                out = self.call(call, leaves[0])
            return [out, *torch.autograd.grad(out, leaves, dy)] if self.backward else [out]

        return run


def ours(case: Module) -> tuple[nn.Module, Callable[..., Any]]:
    layer = case.layer(fastattn.nn)
    return layer, layer


def torch_nn(case: Module) -> tuple[nn.Module, Callable[..., Any]]:
    layer = case.layer(nn)
    return layer, layer


def torch_nn_compiled(case: Module) -> tuple[nn.Module, Callable[..., Any]]:
    layer = case.layer(nn)
    return layer, in_one_graph(layer)


PROVIDERS = {"fastattn": ours, "torch.nn": torch_nn, "torch.nn, torch.compile": torch_nn_compiled}
DEFAULT = [Module(dtype, backward, "encoder layer") for dtype in ("fp32", "bf16") for backward in (False, True)]
REST = [
    Module(dtype, backward, kind, padded=padded)
    for dtype in ("fp32", "bf16")
    for kind in KINDS
    for padded in (False, True)
    for backward in (False, True)
]


@comparison(PROVIDERS, DEFAULT, REST, slow=if_compiled)
def test_module(compare: Callable[..., None], case: Module, provider: str) -> None:
    compare(case, provider, PROVIDERS)
