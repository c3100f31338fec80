"""Matrix products on a CPU, by the fastest of PyTorch's ways to the same numbers.

PyTorch multiplies fp32 by MKL, and 16-bit numbers by oneDNN. On AMD's CPUs with AVX-512 oneDNN is faster in fp32 as well; its
way there is the product with an epilogue that torch.compile uses. On CPUs with tiles for bf16 (AMX) a few rows have faster ways
than either. A CPU without instructions for a 16-bit dtype multiplies copies in fp32 and rounds the result: PyTorch's own way takes 3
times as long there in bf16, in fp16 10 to 400 times (`python -m bench.report models feed_forward` times all of them at work).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.tracing import constant_to_compilers

_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
MOST_PACKED = 1 << 30  # bytes
# Of an x86 CPU any of which multiplies bf16 numbers; oneDNN calls bf16 supported from AVX-512 on, which does not.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_1", "avx_ne_convert")


class _Rows(NamedTuple):
    """Rows from which on a 16-bit product takes longer than copies in fp32 and theirs, on a CPU without such instructions.

    Attributes:
        forward: of X Wᵀ.
        backward: of dY W and dYᵀ X, whose 16-bit forms are slower.
        copied: of X Wᵀ where the copy of W was made before.
    """

    forward: int
    backward: int
    copied: int


_LEAST_WIDENED = {torch.bfloat16: _Rows(24, 8, 4), torch.float16: _Rows(8, 1, 1)}
LEAST_WEIGHT = 1 << 17  # numbers of an fp32 weight from which on oneDNN's call, which takes longer than MKL's, pays
LEAST_PRODUCT = 1 << 22  # multiplications from which on oneDNN's call pays
_LEAST_RATIO = 2  # of the sides of a weight's gradient from which on oneDNN is faster


@cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in known or bool(getattr(torch.ops.mkldnn, known[dtype])())


def _capabilities() -> dict[str, Any]:
    """What PyTorch knows of the CPU; nothing in old versions."""
    return getattr(torch.cpu, "get_capabilities", dict)()


@constant_to_compilers
def emulates(dtype: torch.dtype) -> bool:
    """Whether this is a 16-bit dtype for whose products the CPU has no instructions."""
    return _emulates(dtype)


@cache
def _emulates(dtype: torch.dtype) -> bool:
    if dtype not in _LEAST_WIDENED:
        return False
    capabilities = _capabilities()
    x86 = capabilities.get("architecture") == "x86_64"
    lacking = x86 and dtype == torch.bfloat16 and not any(capabilities.get(name) for name in _BF16_INSTRUCTIONS)
    return lacking or not onednn_takes(dtype)


def widens(rows: int, dtype: torch.dtype) -> bool:
    """Whether X Wᵀ of so many rows on a CPU is computed in fp32."""
    return dtype in _LEAST_WIDENED and rows >= _LEAST_WIDENED[dtype].forward and emulates(dtype)


def widened(x: Tensor, weight: Tensor) -> bool:
    """Whether X Wᵀ is computed in fp32: as `widens` says, or since `pack` made an fp32 copy of W."""
    if x.dtype is torch.float32 or not x.is_cpu:
        return False
    return x.dtype != weight.dtype or (not weight.is_mkldnn and widens(x.shape[0], x.dtype))


def _widened_backward(dy: Tensor) -> bool:
    """Whether a product of the backward with these rows is computed in fp32."""
    if dy.dtype is torch.float32 or not dy.is_cpu:
        return False
    return emulates(dy.dtype) and dy.shape[0] >= _LEAST_WIDENED[dy.dtype].backward


def in_fp32(function: Callable[..., Tensor], x: Tensor, *tensors: Tensor | None) -> Tensor:
    """function(x, *tensors) of fp32 copies, rounded to x's dtype."""
    return function(x.float(), *(None if t is None else t.float() for t in tensors)).to(x.dtype)


@cache
def has_tiles() -> bool:
    """Whether the CPU has tiles for products of 16-bit numbers (AMX)."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_amx_tile_supported())


@cache
def fp32_by_onednn() -> bool:
    """Whether oneDNN's fp32 products are faster than MKL's: on AMD's CPUs with AVX-512 (`python -m bench.report feed_forward`)."""
    capabilities = _capabilities()
    amd = "AMD" in str(capabilities.get("cpu_name", "")) and bool(capabilities.get("avx512_f"))
    return amd and torch.backends.mkl.is_available() and _linear_pointwise is not None and onednn_takes(torch.float32)


def _prefers_onednn(dtype: torch.dtype, rows: int) -> bool:
    """Whether no way is faster than oneDNN's product with bias and activation."""
    if dtype == torch.float32:
        return fp32_by_onednn()
    slower = (rows <= 16 and has_tiles()) or widens(rows, dtype)
    return dtype == torch.bfloat16 and not slower and _linear_pointwise is not None and onednn_takes(dtype)


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product with bias and activation does the job of (rows, in) and (out, in), as fast as any other."""
    if weight.is_mkldnn:
        return True
    in_order = weight.is_contiguous() or (x.dtype == torch.float32 and weight.t().is_contiguous())
    large = weight.numel() >= LEAST_WEIGHT or x.shape[0] * weight.numel() >= LEAST_PRODUCT or x.dtype != torch.float32
    plain = large and x.is_cpu and x.is_contiguous() and in_order and 0 not in x.shape and 0 not in weight.shape
    return plain and _prefers_onednn(x.dtype, x.shape[0])


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", variant: str | None = None
) -> Tensor:
    """act(X Wᵀ + b) by oneDNN, which reads a bias as if it were contiguous."""
    return _linear_pointwise(x, weight, None if bias is None else bias.contiguous(), activation, [], variant)


def pack(weights: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Copies of weights for `product` with so many rows, a few at most, in the dtype and order that the CPU multiplies fastest.

    A copy takes as long as some ten products and as much memory as its weight, or twice as much. Copies of more than `MOST_PACKED` bytes
    in all are not made, nor those that do not pay: such weights come back as they are.
    """
    if not all(w.is_cpu and w.is_contiguous() and 0 not in w.shape for w in weights):
        return list(weights)
    dtypes = [_packed_dtype(w.dtype, rows) for w in weights]
    if sum(w.numel() * dtype.itemsize for w, dtype in zip(weights, dtypes)) > MOST_PACKED:
        return list(weights)
    copies = [w.detach().to(dtype) for w, dtype in zip(weights, dtypes)]
    return [torch.ops.mkldnn._reorder_linear_weight(w, rows) if _prefers_onednn(w.dtype, 1) else w for w in copies]


def _packed_dtype(dtype: torch.dtype, rows: int) -> torch.dtype:
    emulated = dtype in _LEAST_WIDENED and rows >= _LEAST_WIDENED[dtype].copied and emulates(dtype)
    return torch.float32 if emulated else dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b of (rows, in), with a weight (out, in) or what `pack` made of it.

    A few rows are done in an order of loops for which PyTorch has faster CPU kernels: in bf16, with tiles, as (W Xᵀ)ᵀ + b; in fp32 as
    a batch of products with 64 rows of W each.
    """
    rows, dtype = x.shape[0], x.dtype
    if widened(x, weight):
        return in_fp32(product, x, weight, bias)
    if fuses(x, weight):
        return onednn_linear(x, weight, bias)
    if dtype == torch.bfloat16 and x.is_cpu and has_tiles():
        if rows == 1:
            return (torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0]))[None]
        if 2 <= rows <= 8:
            y = torch.mm(weight, x.t()).t().contiguous()
            return y if bias is None else y.add_(bias)
    few = 3 <= rows <= 8 and dtype == torch.float32 and x.is_cpu and weight.is_contiguous()
    whole = weight.shape[0] // 64 * 64 if few else 0
    if not whole:
        return F.linear(x, weight, bias)
    parts = weight[:whole].view(whole // 64, 64, weight.shape[1]).transpose(1, 2)
    y = torch.bmm(x.expand(whole // 64, -1, -1), parts).transpose(0, 1).reshape(rows, whole)
    if whole < weight.shape[0]:
        y = torch.cat([y, F.linear(x, weight[whole:])], 1)
    return y if bias is None else y.add_(bias)


def product_with_columns(dy: Tensor, weight: Tensor, dg: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """dY W (+ dG Wg), of (rows, out) and (out, in)."""
    if _widened_backward(dy):
        return in_fp32(product_with_columns, dy, weight, dg, gate)
    by_onednn = dy.dtype == torch.float32 and fuses(dy, weight)
    dx = onednn_linear(dy, weight.t(), None) if by_onednn else dy @ weight
    return dx if dg is None or gate is None else dx.addmm_(dg, gate)


def product_over_rows(dy: Tensor, x: Tensor) -> Tensor:
    """dYᵀ X, (out, in), of (rows, out) and (rows, in): a weight's gradient, accumulated in fp32."""
    if _widened_backward(dy):
        return in_fp32(product_over_rows, dy, x)
    long, short = max(dy.shape[1], x.shape[1]), min(dy.shape[1], x.shape[1])
    if dy.dtype != torch.float32 or long < _LEAST_RATIO * short or not fuses(dy, x):
        return torch.mm(dy.t(), x)
    if long == x.shape[1]:
        return onednn_linear(dy.t(), x.t(), None)
    return onednn_linear(x.t(), dy.t(), None).t().contiguous()
