"""How far the predictions may be trusted: the model applied to a kernel whose measured speed is public.

The kernel is FlashAttention-2's forward in its plain form, as Triton's fused-attention tutorial has it: one loop without
masks, one over the diagonal, no feature. Its figures on A100 and H100 are the tutorial's own and public runs of it, where
the fastest of several tiles counts. The prediction is

    TFLOP/s = peak · clock held · alternating bound of the loop without masks

where the clock held is the share of the boost clock that the GPU holds with its tensor cores busy: what cuBLAS reaches of
the peak in large 16-bit products, since those have nothing else in the way. H100 at 700 W reaches about 0.79 (750 to 800
of 989 TFLOP/s), A100 at 400 W about 0.92. Without that factor the model is too kind to H100 by a fifth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

from bench.codegen.hardware import MULTIPROCESSORS
from bench.codegen.report import Row
from bench.codegen.worker import report_launches
from fastattn.kernels.targets import find_target

Tile: TypeAlias = tuple[int, int, int, int]

CLOCK_HELD = {"sm_80": 0.92, "sm_90": 0.79}


@triton.jit
def _walk(acc, l, m, q, k_ptrs, v_ptrs, low, high, stride, offs_m, scale, EDGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """One step per block of keys: the running maximum m (base 2), the denominator l and the output acc."""
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        # [HEAD_DIM, BLOCK_N]
        k = tl.load(k_ptrs + start * stride)
        s = tl.dot(q, k)
        if EDGE:
            s = s * scale + tl.where(offs_m[:, None] >= start + offs_n[None, :], 0.0, -1.0e6)
            new_m = tl.maximum(m, tl.max(s, 1))
            s -= new_m[:, None]
        else:
            new_m = tl.maximum(m, tl.max(s, 1) * scale)
            s = s * scale - new_m[:, None]
        p = tl.exp2(s)
        alpha = tl.exp2(m - new_m)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptrs + start * stride)
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = new_m
    return acc, l, m


@triton.jit
def flash_forward(
    Q, K, V, OUT, LSE, scale, length, stride,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Q, K, V, OUT: (batch · heads, length, HEAD_DIM), rows `stride` apart; LSE: fp32 (batch · heads, length)."""
    start_m, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    offs_m, offs_n, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    first = head * length * stride
    rows = first + offs_m[:, None] * stride + offs_d[None, :]
    k_ptrs = K + first + offs_n[None, :] * stride + offs_d[:, None]
    v_ptrs = V + first + offs_n[:, None] * stride + offs_d[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    q = tl.load(Q + rows)
    high = start_m if CAUSAL else length
    acc, l, m = _walk(acc, l, m, q, k_ptrs, v_ptrs, 0, high, stride, offs_m, scale, False, BLOCK_N)
    if CAUSAL:
        high += BLOCK_M
        acc, l, m = _walk(acc, l, m, q, k_ptrs, v_ptrs, start_m, high, stride, offs_m, scale, True, BLOCK_N)
    tl.store(LSE + head * length + offs_m, m + tl.log2(l))
    tl.store(OUT + rows, (acc / l[:, None]).to(OUT.dtype.element_ty))


@dataclass(frozen=True)
class Published:
    """A measured figure; `tflops` counts visible pairs only."""

    target: str
    head_dim: int
    causal: bool
    tflops: float
    source: str


# (BLOCK_M, BLOCK_N, warps, stages)
TILES: tuple[Tile, ...] = (
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 32, 4, 3),
    (64, 64, 4, 3),
    (128, 128, 4, 2),
)
FIGURES = (
    Published("sm_80", 64, True, 164.0, "the tutorial's table, A100"),
    Published("sm_90", 64, True, 403.0, "public run of the tutorial, H100"),
    Published("sm_90", 128, False, 469.0, "public runs of the tutorial, H100: 395 to 469"),
)


def launch(head_dim: int, causal: bool, tile: Tile) -> None:
    """Launch the kernel with one tile; a stand-in driver compiles it and stops there."""
    rows, columns, warps, stages = tile
    tensors = [torch.zeros(4, 1024, head_dim, dtype=torch.float16) for _ in range(4)]
    flash_forward[(1024 // rows, 4)](
        *tensors, torch.zeros(4, 1024), 0.18, 1024, head_dim,
        HEAD_DIM=head_dim, BLOCK_M=rows, BLOCK_N=columns, CAUSAL=causal, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def bound(row: Row) -> float:
    """Of a launch: that of the loop without the mask, the longer one."""
    return 0.0 if row["violations"] else max(loop["alternating"] or 0.0 for loop in row["loops"])


def predict(figure: Published, bounds: dict[Tile, float]) -> dict[str, Any]:
    """The best tile's prediction in TFLOP/s, with and without the clock held, and its error."""
    processor, target = MULTIPROCESSORS[figure.target], find_target(figure.target)
    tile = max(bounds, key=lambda tile: bounds[tile])
    at_boost = 2 * processor.tensor * target.multiprocessors * processor.clock_ghz / 1e3 * bounds[tile]
    predicted = at_boost * CLOCK_HELD[figure.target]
    error = predicted / figure.tflops - 1.0
    return {"figure": figure, "tile": tile, "at_boost": at_boost, "predicted": predicted, "error": error}


def validate(figure: Published) -> dict[str, Any]:
    """Compile all tiles and predict."""
    bounds = {}
    for tile in TILES:
        (row,) = report_launches(lambda tile=tile: launch(figure.head_dim, figure.causal, tile), figure.target)  # type: ignore[misc]
        bounds[tile] = bound(row)
    return predict(figure, bounds)


def table(predictions: list[dict[str, Any]]) -> str:
    """Markdown: a row per published figure, and the mean size of the error."""
    lines = [
        "| GPU | kernel | published TFLOP/s | predicted | error | at boost clock | tile |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in predictions:
        figure = p["figure"]
        kernel = f"D{figure.head_dim} {'causal' if figure.causal else 'full'} ({figure.source})"
        lines.append(
            f"| {figure.target} | {kernel} | {figure.tflops:.0f} | {p['predicted']:.0f} | {p['error']:+.0%} | "
            f"{p['at_boost']:.0f} | {p['tile']} |"
        )
    mean = sum(abs(p["error"]) for p in predictions) / len(predictions)
    return "\n".join([*lines, f"\nmean error {mean:.0%}"])
