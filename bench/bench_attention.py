"""Attention: full, causal, grouped-query, windowed, ALiBi, bias with causal, softcap, boolean mask; forward, and with backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastattn
from bench import machine
from bench.cases import DTYPES, OpCase, Unavailable, comparison, in_one_graph, need
from tests import reference

FEATURES = ("full", "causal", "gqa", "window", "alibi", "bias_causal", "softcap", "mask")
WINDOW = 256
SOFTCAP = 30.0


@dataclass(frozen=True)
class Attention(OpCase["Attention"]):
    """`feature` is one of FEATURES. "mask": a boolean tensor, causal, with an eighth of the keys hidden behind the others, such as
    Hugging Face's models make of padded sequences."""

    feature: str
    n: int
    batch: int = 1
    heads: int = 8
    dim: int = 64
    window: int = WINDOW

    @property
    def name(self) -> str:
        heads = "" if self.heads == 8 else f" {self.heads} heads"
        passes = "forward+backward" if self.backward else "forward"
        return f"attention {self.feature} {passes} {self.dtype}{heads} N{self.n}"

    @property
    def kv_heads(self) -> int:
        return 2 if self.feature == "gqa" else self.heads

    @property
    def shown(self) -> int:
        """Keys that "mask" does not hide."""
        return self.n - self.n // 8

    @property
    def pairs(self) -> float:
        """Visible (row, column) pairs of one head."""
        if self.feature == "full":
            return self.n**2
        hidden = {"window": max(0, self.n - self.window - 1), "mask": self.n - self.shown}.get(self.feature, 0)
        return self.n * (self.n + 1) / 2 - hidden * (hidden + 1) / 2

    @property
    def flops(self) -> float:
        """2 products of 2·D operations a pair, and 5 more in the backward."""
        return self.batch * self.heads * self.pairs * 2 * self.dim * (7 if self.backward else 2)

    @property
    def traffic(self) -> float:
        """Query, key, value and output once; the backward reads them and the output's gradient, and writes three gradients."""
        query, key = (self.batch * heads * self.n * self.dim for heads in (self.heads, self.kv_heads))
        bias = self.heads * self.n**2 if self.feature == "bias_causal" else 0
        numbers = 2 * query + 2 * key + bias
        return DTYPES[self.dtype].itemsize * (numbers + (4 * query + 4 * key + 2 * bias if self.backward else 0))

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
        mask = self.visible() if self.feature == "mask" else None
        softcap = SOFTCAP if self.feature == "softcap" else None
        return reference.attention(
            query, key, value, causal=causal, window=window, mask=mask, bias=bias, alibi_slopes=slopes, softcap=softcap
        )[0]

    def visible(self) -> Tensor:
        """The boolean mask of "mask", (1, 1, N, N)."""
        positions = torch.arange(self.n, device=machine.device())
        return ((positions[:, None] >= positions) & (positions < self.shown))[None, None]

    def mask(self) -> Tensor:
        """What is added to the scores for window, ALiBi and causality, (1, 1 or heads, N, N)."""
        device = machine.device()
        gap = torch.arange(self.n, device=device)[:, None] - torch.arange(self.n, device=device)
        mask = torch.zeros(self.n, self.n, device=device)
        if self.feature == "alibi":
            mask = mask - self.slopes(device)[:, None, None] * gap
        if self.feature != "full":
            mask = mask.masked_fill(gap < 0, -torch.inf)
        if self.feature == "window":
            mask = mask.masked_fill(gap > self.window, -torch.inf)
        if self.feature == "mask":
            mask = mask.masked_fill(~self.visible(), -torch.inf)
        return mask.to(DTYPES[self.dtype]).view(1, -1, self.n, self.n)


def ours(case: Attention) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return fastattn.attention(query, key, value, bias=bias, **options)

    options: dict[str, Any] = {"causal": case.feature not in ("full", "mask")}
    if case.feature == "mask":
        options["mask"] = case.visible()
    if case.feature == "window":
        options["window"] = (case.window, None)
    if case.feature == "alibi":
        options["alibi_slopes"] = case.slopes(machine.device())
    if case.feature == "softcap":
        options["softcap"] = SOFTCAP
    return run


def sdpa(case: Attention) -> Callable[..., Tensor]:
    """PyTorch's; what it has no option for is an additive mask, made before the clock starts."""
    if case.feature == "softcap":
        raise Unavailable("PyTorch's attention has no softcap")
    if case.feature in ("full", "causal", "gqa"):
        causal, gqa = case.feature != "full", case.feature == "gqa"
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    mask = case.visible() if case.feature == "mask" else case.mask()

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask if bias is None else mask + bias)

    return run


def sdpa_with(backend: SDPBackend, case: Attention) -> Callable[..., Tensor]:
    """One of PyTorch's implementations, where it can do this case."""

    def run(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return function(*inputs)

    small = case.small()
    function = sdpa(small)
    try:
        with warnings.catch_warnings():  # in which PyTorch says at length why not
            warnings.simplefilter("ignore")
            run(*(x.requires_grad_(case.backward) for x in small.inputs()))
    except RuntimeError as error:
        raise Unavailable(f"PyTorch on this device: {error}") from error
    function = sdpa(case)
    return run


def plain(case: Attention) -> Callable[..., Tensor]:
    """The formula, written in PyTorch."""
    mask, groups = case.mask(), case.heads // case.kv_heads

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * case.dim**-0.5
        if case.feature == "softcap":
            scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype) @ value

    return run


def plain_compiled(case: Attention) -> Callable[..., Tensor]:
    return in_one_graph(plain(case))


def flex(case: Attention) -> Callable[..., Tensor]:
    """PyTorch's FlexAttention, under torch.compile as it is meant to be."""
    if case.backward and machine.device().type == "cpu":
        raise Unavailable("FlexAttention has no backward on a CPU")
    if case.feature == "bias_causal" and case.backward:
        raise Unavailable("FlexAttention's gradient of a bias is not deterministic")
    attend, slopes = in_one_graph(flex_attention), case.slopes(machine.device())

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if case.feature == "mask":
            return (i >= j) & (j < case.shown)
        return (i >= j) & (i - j <= case.window) if case.feature == "window" else i >= j

    blocks = None
    if case.feature != "full":
        blocks = create_block_mask(visible, None, None, case.n, case.n, device=machine.device().type)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if case.feature == "alibi":
                return s - slopes[h] * (i - j)
            if case.feature == "softcap":
                return SOFTCAP * torch.tanh(s / SOFTCAP)
            return s if bias is None else s + bias[0, h, i, j]

        modified = case.feature in ("alibi", "softcap", "bias_causal")
        return attend(query, key, value, score if modified else None, blocks, enable_gqa=case.feature == "gqa")

    return run


def flash_attn(case: Attention) -> Callable[..., Tensor]:
    """The package flash-attn, on an NVIDIA GPU."""
    package = need("flash_attn")
    if case.dtype == "fp32" or case.feature in ("bias_causal", "mask"):
        raise Unavailable("flash-attn has neither fp32 nor a bias nor a mask")
    options: dict[str, Any] = {"causal": case.feature != "full"}
    if case.feature == "window":
        options["window_size"] = (case.window, 0)
    if case.feature == "alibi":
        options["alibi_slopes"] = case.slopes(machine.device())
    if case.feature == "softcap":
        options["softcap"] = SOFTCAP

    def run(*inputs: Tensor) -> Tensor:
        return package.flash_attn_func(*(x.transpose(1, 2) for x in inputs), **options).transpose(1, 2)

    return run


def xformers(case: Attention) -> Callable[..., Tensor]:
    """The package xformers, on a GPU."""
    package = need("xformers.ops")
    if not torch.cuda.is_available():
        raise Unavailable("xformers needs a GPU")
    if case.feature in ("gqa", "softcap"):
        raise Unavailable(f"xformers' memory_efficient_attention has no {case.feature}")
    mask: Any = None
    if case.feature == "causal":
        mask = package.LowerTriangularMask()
    elif case.feature != "full":
        mask = case.mask().expand(case.batch, case.heads, -1, -1)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        inputs = (x.transpose(1, 2) for x in (query, key, value))
        return package.memory_efficient_attention(*inputs, mask if bias is None else mask + bias).transpose(1, 2)

    return run


PROVIDERS = {
    "fastattn": ours,
    "torch SDPA": sdpa,
    "torch SDPA flash": partial(sdpa_with, SDPBackend.FLASH_ATTENTION),
    "torch SDPA efficient": partial(sdpa_with, SDPBackend.EFFICIENT_ATTENTION),
    "torch SDPA cuDNN": partial(sdpa_with, SDPBackend.CUDNN_ATTENTION),
    "torch SDPA math": partial(sdpa_with, SDPBackend.MATH),
    "plain PyTorch": plain,
    "plain, torch.compile": plain_compiled,
    "FlexAttention, torch.compile": flex,
    "flash-attn": flash_attn,
    "xformers": xformers,
}
DEFAULT = [
    *(Attention("fp32", backward, feature, 1024) for feature in FEATURES[:4] for backward in (False, True)),
    *(Attention("bf16", backward, feature, 1024) for feature in ("causal", "window") for backward in (False, True)),
    *(Attention("fp32", backward, "causal", n) for n in (128, 2048) for backward in (False, True)),
    *(Attention("fp32", backward, feature, 2048) for feature in FEATURES[4:] for backward in (False, True)),
    Attention("fp32", False, "window", 8192, heads=2),
]
REST = [
    *(
        Attention(dtype, backward, feature, n)
        for dtype in ("fp32", "bf16")
        for feature in FEATURES
        for n in (128, 256, 512, 1024, 2048, 4096)
        for backward in (False, True)
    ),
    *(Attention(dtype, backward, "window", 8192, heads=2) for dtype in ("fp32", "bf16") for backward in (False, True)),
    *(Attention("fp16", backward, "causal", n) for n in (256, 1024) for backward in (False, True)),
]


def if_there_is_sdpa(case: Attention, name: str) -> bool:
    """One peer is enough by default: PyTorch's own choice, or the formula where it has none; and other packages."""
    return name not in (
        "fastattn",
        "torch SDPA" if case.feature != "softcap" else "plain PyTorch",
        "flash-attn",
        "xformers",
    )


@comparison(PROVIDERS, DEFAULT, REST, slow=if_there_is_sdpa)
def test_attention(compare: Callable[..., None], case: Attention, provider: str) -> None:
    compare(case, provider, PROVIDERS)
