"""Attention: full, causal, grouped-query, windowed, ALiBi, bias with causal; forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from bench.cases import DTYPES, OpCase, Unavailable, need
from tests import reference

WINDOW = 256


@dataclass(frozen=True)
class Attention(OpCase["Attention"]):
    """`feature` is one of: full, causal, gqa, window, alibi, bias_causal."""

    feature: str
    n: int
    batch: int = 1
    heads: int = 8
    dim: int = 64
    window: int = WINDOW

    @property
    def name(self) -> str:
        return f"attention {self.feature} {'forward+backward' if self.backward else 'forward'} {self.dtype} N{self.n}"

    @property
    def kv_heads(self) -> int:
        return 2 if self.feature == "gqa" else self.heads

    @property
    def pairs(self) -> float:
        """Visible (row, column) pairs of one head."""
        if self.feature == "full":
            return self.n**2
        hidden = max(0, self.n - self.window - 1) if self.feature == "window" else 0
        return self.n * (self.n + 1) / 2 - hidden * (hidden + 1) / 2

    @property
    def flops(self) -> float:
        """2 products of 2·D operations a pair, and 5 more in the backward."""
        return self.batch * self.heads * self.pairs * 2 * self.dim * (7 if self.backward else 2)

    @property
    def differentiable(self) -> int:
        return 4 if self.feature == "bias_causal" else 3

    def small(self) -> Attention:
        return replace(self, n=48, window=9)

    def inputs(self) -> list[Tensor]:
        kv = (self.batch, self.kv_heads, self.n, self.dim)
        tensors = [self.randn(self.batch, self.heads, self.n, self.dim), self.randn(*kv), self.randn(*kv)]
        if self.feature == "bias_causal":
            tensors.append(self.randn(1, self.heads, self.n, self.n))
        return tensors

    def slopes(self, device: torch.device) -> Tensor:
        """Press et al.: 2^(-8 (h + 1) / heads)"""
        return 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=device) / self.heads)

    def definition(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        causal = self.feature != "full"
        window = (self.window, None) if self.feature == "window" else None
        slopes = self.slopes(query.device) if self.feature == "alibi" else None
        return reference.attention(query, key, value, causal=causal, window=window, bias=bias, alibi_slopes=slopes)[0]


def ours(case: Attention) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return fastattn.attention(query, key, value, bias=bias, **options)

    options: dict[str, Any] = {"causal": case.feature != "full"}
    if case.feature == "window":
        options["window"] = (case.window, None)
    if case.feature == "alibi":
        options["alibi_slopes"] = case.slopes(case.randn(0).device)
    return run


def sdpa(case: Attention) -> Callable[..., Tensor]:
    """PyTorch's; what it has no option for is an additive mask, made before the clock starts."""
    if case.feature in ("full", "causal", "gqa"):
        causal, gqa = case.feature != "full", case.feature == "gqa"
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    device, dtype = case.randn(0).device, DTYPES[case.dtype]
    gap = torch.arange(case.n, device=device)[:, None] - torch.arange(case.n, device=device)
    mask = torch.zeros(case.n, case.n, device=device).masked_fill(gap < 0, -torch.inf)
    if case.feature == "window":
        mask = mask.masked_fill(gap > case.window, -torch.inf)
    if case.feature == "alibi":
        mask = mask - case.slopes(device)[:, None, None] * gap
    mask = mask.to(dtype).view(1, -1, case.n, case.n)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask if bias is None else mask + bias)

    return run


def math(case: Attention) -> Callable[..., Tensor]:
    """PyTorch's with all the scores in memory."""
    function = sdpa(case)

    def run(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*inputs)

    return run


def flash_attn(case: Attention) -> Callable[..., Tensor]:
    """The package flash-attn, on an NVIDIA GPU."""
    package = need("flash_attn")
    if case.dtype == "fp32" or case.feature == "bias_causal":
        raise Unavailable("flash-attn has neither fp32 nor a bias")
    device = case.randn(0).device
    options: dict[str, Any] = {"causal": case.feature != "full"}
    if case.feature == "window":
        options["window_size"] = (case.window, 0)
    if case.feature == "alibi":
        options["alibi_slopes"] = case.slopes(device)

    def run(*inputs: Tensor) -> Tensor:
        return package.flash_attn_func(*(x.transpose(1, 2) for x in inputs), **options).transpose(1, 2)

    return run


PROVIDERS = {"fastattn": ours, "torch SDPA": sdpa, "torch SDPA math": math, "flash-attn": flash_attn}
FEATURES = ("full", "causal", "gqa", "window", "alibi", "bias_causal")
DEFAULT = [
    *(Attention("fp32", backward, feature, 1024) for feature in FEATURES for backward in (False, True)),
    *(Attention("bf16", backward, feature, 1024) for feature in ("causal", "window") for backward in (False, True)),
    *(Attention("fp32", backward, "causal", n) for n in (128, 2048) for backward in (False, True)),
]
REST = [
    case
    for dtype in ("fp32", "bf16")
    for feature in FEATURES
    for n in (128, 256, 512, 1024, 2048, 4096)
    for backward in (False, True)
    if (case := Attention(dtype, backward, feature, n)) not in DEFAULT
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "case", [*DEFAULT, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)], ids=lambda case: case.name
)
def test_attention(compare: Callable[..., None], case: Attention, provider: str) -> None:
    compare(case, provider, PROVIDERS)
