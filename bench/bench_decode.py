"""Decoding: one new token of each sequence is appended to a cache of keys and values, and attends to all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import machine
from bench.cases import DTYPES, OpCase, Unavailable, comparison, need
from tests import reference

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Decode(OpCase["Decode"]):
    """`cached` tokens of each sequence lie in caches that have room for one more."""

    batch: int
    cached: int
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64

    @property
    def name(self) -> str:
        heads = f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads} heads"
        return f"decode {self.dtype} B{self.batch} {heads} N{self.cached}"

    @property
    def flops(self) -> float:
        return self.batch * self.heads * (self.cached + 1) * 4 * self.dim

    @property
    def traffic(self) -> float:
        """Every key and value is read once."""
        return 2 * self.batch * self.kv_heads * (self.cached + 1) * self.dim * DTYPES[self.dtype].itemsize

    @property
    def differentiable(self) -> int:
        return 0

    def small(self) -> Decode:
        return replace(self, cached=24)

    def inputs(self) -> list[Tensor]:
        """query, the new key and value, and the caches"""
        new = [self.randn(self.batch, heads, 1, self.dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return [*new, *(self.randn(self.batch, self.kv_heads, self.cached + 1, self.dim) for _ in range(2))]

    def definition(self, query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Tensor:
        keys, values = (torch.cat([c[:, :, : self.cached], x], dim=2) for c, x in zip(caches, (key, value)))
        return reference.attention(query, keys, values)[0]


def ours(case: Decode) -> Function:
    def run(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Tensor:
        return fastattn.attention_with_kv_cache(query, *caches, case.cached, key=key, value=value)

    return run


def in_place(case: Decode) -> Function:
    """PyTorch's attention on a cache that is written in place, as Hugging Face's StaticCache is."""

    def run(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Tensor:
        for cache, new in zip(caches, (key, value)):
            cache[:, :, case.cached : case.cached + 1] = new
        return F.scaled_dot_product_attention(query, *caches, enable_gqa=case.heads != case.kv_heads)

    return run


def by_concatenation(case: Decode) -> Function:
    """PyTorch's attention on a cache that is made anew, as Hugging Face's DynamicCache is."""

    def run(query: Tensor, key: Tensor, value: Tensor, *caches: Tensor) -> Tensor:
        keys, values = (torch.cat([c[:, :, : case.cached], x], dim=2) for c, x in zip(caches, (key, value)))
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=case.heads != case.kv_heads)

    return run


def flash_attn(case: Decode) -> Function:
    """The package flash-attn, on an NVIDIA GPU."""
    package = need("flash_attn")
    if case.dtype == "fp32":
        raise Unavailable("flash-attn has no fp32")
    lengths = torch.full((case.batch,), case.cached, dtype=torch.int32, device=machine.device())

    def run(*tensors: Tensor) -> Tensor:
        query, key, value, *caches = (x.transpose(1, 2) for x in tensors)
        options: dict[str, Any] = {"k": key, "v": value, "cache_seqlens": lengths, "causal": True}
        return package.flash_attn_with_kvcache(query, *caches, **options).transpose(1, 2)

    return run


PROVIDERS = {
    "fastattn": ours,
    "torch SDPA, cache in place": in_place,
    "torch SDPA, cache by cat": by_concatenation,
    "flash-attn": flash_attn,
}
DEFAULT = [Decode(dtype, False, 8, 1024, 8, kv_heads) for dtype in ("fp32", "bf16") for kv_heads in (8, 2)]
REST = [
    Decode(dtype, False, batch, cached, 8, kv_heads)
    for dtype in ("fp32", "bf16")
    for batch in (1, 8)
    for cached in (256, 4096, 16384)
    for kv_heads in (8, 2)
]


@comparison(PROVIDERS, DEFAULT, REST)
def test_decode(compare: Callable[..., None], case: Decode, provider: str) -> None:
    compare(case, provider, PROVIDERS)
