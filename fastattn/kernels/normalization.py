"""Layer norm and RMS norm in Triton, forward and backward, for rows of any width.

With h = dropout(input) + residual, one row of `columns` numbers normalises to

    x̂ = (h - mean) · rstd,  rstd = 1 / sqrt(var + eps)        (RMS norm: mean = 0 and var = Σ h² / columns)
    y = (1 + scale) · ((offset + weight) · x̂ + bias) + shift

where scale and shift (adaptive layer norm) are shared by the `rows_per_group` rows of a group. With g = ∂L/∂y times the
factor of x̂, the gradient of a row is

    dh = rstd · (g - x̂ · mean(g · x̂) - mean(g))               (RMS norm: without mean(g))

and every parameter's gradient follows from two sums over rows, A = Σ dy · x̂ and B = Σ dy, one pair for each group.
Programs of the backward stay on the machine, take every P-th tile of rows, and write one fp32 partial of A and B each;
a second kernel adds the partials in a fixed order. A row that fits in registers is read once; a wider one twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import dropout_threshold
from fastattn.kernels.config import norm_backward_config, norm_forward_config
from fastattn.kernels.launch import contiguous, current_target, launch
from fastattn.kernels.norm_tiles import as_rows, load_gain, load_rows
from fastattn.kernels.normalization_backward import backward
from fastattn.kernels.random import dropout

__all__ = ["backward", "forward"]


@triton.jit
def load_hidden(
    X, RESIDUAL, SEED, HIDDEN, offs_m, offs_n, mask, stride_x, stride_residual, columns, threshold, keep_scale
):
    """h = dropout(x) + residual, rounded to the dtype in which it is kept: the backward sees the same numbers."""
    h = dropout(load_rows(X, offs_m, offs_n, mask, stride_x), SEED, offs_m, offs_n, threshold, keep_scale)
    if RESIDUAL is not None:
        h += load_rows(RESIDUAL, offs_m, offs_n, mask, stride_residual)
    if HIDDEN is not None:
        rounded = h.to(HIDDEN.dtype.element_ty)
        tl.store(HIDDEN + offs_m[:, None] * columns + offs_n[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def affine(x_hat, WEIGHT, BIAS, SCALE, SHIFT, group, offs_n, mask_n, stride_scale, weight_offset):
    """y = (1 + scale) · ((offset + weight) · x̂ + bias) + shift, [ROWS, COLUMNS]."""
    y = x_hat * load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset)[None, :]
    added = tl.zeros(offs_n.shape, tl.float32)
    if BIAS is not None:
        added += tl.load(BIAS + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if SCALE is not None:
            added *= 1.0 + tl.load(SCALE + group * stride_scale + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if SHIFT is not None:
        added += tl.load(SHIFT + group * stride_scale + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return y + added[None, :]


@triton.jit(do_not_specialize=["rows_per_group", "tiles", "threshold"])
def norm_forward_kernel(
    X, RESIDUAL,  # (rows, columns), unit stride along a row; RESIDUAL may be None
    SEED,  # int64 (1,), or None: no dropout
    WEIGHT, BIAS,  # (columns,), or None
    SCALE, SHIFT,  # (groups, columns), or None
    Y, HIDDEN,  # (rows, columns), contiguous; HIDDEN is None where it is X
    MEAN, RSTD,  # fp32 (rows,); MEAN is None for RMS norm
    stride_x, stride_residual, stride_scale,
    rows_per_group, columns, tiles, eps, weight_offset, threshold, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows of one group, kept in registers."""
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    offs_m, offs_n = group * rows_per_group + row, tl.arange(0, COLUMNS)
    mask_m, mask_n = row < rows_per_group, offs_n < columns
    mask = mask_m[:, None] & mask_n[None, :]
    # [ROWS, COLUMNS]
    h = load_hidden(
        X, RESIDUAL, SEED, HIDDEN, offs_m, offs_n, mask, stride_x, stride_residual, columns, threshold, keep_scale
    )
    if MEAN is not None:
        mean = tl.sum(h, 1) / columns
        h = tl.where(mask, h - mean[:, None], 0.0)
        rest = tl.sum(h, 1) / columns  # what rounding left of the mean, which counts where the mean is large
        tl.store(MEAN + offs_m, mean + rest, mask=mask_m)
        h = tl.where(mask, h - rest[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / columns + eps)
    tl.store(RSTD + offs_m, rstd, mask=mask_m)
    y = affine(h * rstd[:, None], WEIGHT, BIAS, SCALE, SHIFT, group, offs_n, mask_n, stride_scale, weight_offset)
    tl.store(Y + offs_m[:, None] * columns + offs_n[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_group", "tiles", "threshold"])
def norm_forward_wide_kernel(
    X, RESIDUAL, SEED, WEIGHT, BIAS, SCALE, SHIFT, Y, HIDDEN, MEAN, RSTD,  # as in `norm_forward_kernel`
    stride_x, stride_residual, stride_scale,
    rows_per_group, columns, tiles, eps, weight_offset, threshold, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As above for wide rows, in blocks of COLUMNS; each lane follows its own mean and Σ (h - mean)² (Welford)."""
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    offs_m = group * rows_per_group + tile + tl.arange(0, ROWS)
    mean, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        offs_n = start + tl.arange(0, COLUMNS)
        mask = (offs_n < columns)[None, :]
        h = load_hidden(
            X, RESIDUAL, SEED, HIDDEN, offs_m, offs_n, mask, stride_x, stride_residual, columns, threshold, keep_scale
        )
        if MEAN is not None:
            difference = tl.where(mask, h - mean, 0.0)
            mean += difference / (start // COLUMNS + 1)
            squares += difference * (h - mean)
        else:
            squares += h * h
    if MEAN is not None:
        count = tl.cdiv(columns - tl.arange(0, COLUMNS), COLUMNS)[None, :]
        row_mean = tl.sum(mean * count, 1) / columns
        squares += count * (mean - row_mean[:, None]) * (mean - row_mean[:, None])
        tl.store(MEAN + offs_m, row_mean)
    rstd = tl.rsqrt(tl.sum(squares, 1) / columns + eps)
    tl.store(RSTD + offs_m, rstd)
    # Every thread's part of HIDDEN is visible to the others: the sum over the row is a barrier.
    for start in range(0, columns, COLUMNS):
        offs_n = start + tl.arange(0, COLUMNS)
        mask_n = offs_n < columns
        if HIDDEN is not None:
            h = load_rows(HIDDEN, offs_m, offs_n, mask_n[None, :], columns)
        else:
            h = load_rows(X, offs_m, offs_n, mask_n[None, :], stride_x)
        if MEAN is not None:
            h -= row_mean[:, None]
        y = affine(h * rstd[:, None], WEIGHT, BIAS, SCALE, SHIFT, group, offs_n, mask_n, stride_scale, weight_offset)
        tl.store(Y + offs_m[:, None] * columns + offs_n[None, :], y.to(Y.dtype.element_ty), mask=mask_n[None, :])


def forward(
    input: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    rows: int,
    columns: int,
    eps: float,
    centered: bool,
    weight_offset: float,
    dropout_p: float,
    output_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hidden, mean, rstd), as `fastattn.ops.normalization` describes them."""
    x = as_rows(input, rows, columns)
    added = None if residual is None else as_rows(residual, rows, columns)
    output = input.new_empty(input.shape, dtype=output_dtype)
    keeps = residual is not None or seed is not None
    hidden = input.new_empty(input.shape if keeps else 0, dtype=hidden_dtype)
    mean = input.new_empty(rows if centered else 0, dtype=torch.float32)
    rstd = input.new_empty(rows, dtype=torch.float32)
    rows_per_group = rows // max(groups, 1)
    config = norm_forward_config(columns)
    tiles = triton.cdiv(rows_per_group, config.rows)
    launch(
        norm_forward_wide_kernel if config.wide else norm_forward_kernel, (groups * tiles if columns else 0,),
        x, added, seed, contiguous(weight), contiguous(bias), scale, shift,
        output, hidden if keeps else None, mean if centered else None, rstd,
        x.stride(0), 0 if added is None else added.stride(0), columns,
        rows_per_group, columns, tiles, eps, weight_offset, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        ROWS=config.rows, COLUMNS=config.columns, num_warps=config.num_warps,
    )  # fmt: skip
    return output, hidden, mean, rstd


def explain(columns: int, itemsize: int, mixed_residual: bool, heavy: bool, alone: bool) -> list[str]:
    """The tiles of rows of this width."""
    lines = []
    for name, config in (
        ("forward", norm_forward_config(columns)),
        ("backward", norm_backward_config(current_target(), columns, itemsize, mixed_residual, heavy, alone)),
    ):
        how = f"rows in blocks of {config.columns} columns" if config.wide else f"{config.rows} whole rows a step"
        lines.append(f"{name}: {how}, {config.num_warps} warps")
    return lines
