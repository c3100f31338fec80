"""Backward of the norms; the equations stand in normalization.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import dropout_threshold
from fastattn.kernels.config import REDUCE_COLUMNS, REDUCE_ROWS, norm_backward_config
from fastattn.kernels.launch import contiguous, current_target, launch
from fastattn.kernels.norm_tiles import as_rows, load_gain, load_rows
from fastattn.kernels.random import dropout


@triton.jit
def load_normalised(HIDDEN, MEAN, RSTD, offs_m, offs_n, mask_m, mask, stride):
    """(x̂ [ROWS, COLUMNS], rstd [ROWS])"""
    h = load_rows(HIDDEN, offs_m, offs_n, mask, stride)
    rstd = tl.load(RSTD + offs_m, mask=mask_m, other=0.0)
    if MEAN is not None:
        h -= tl.load(MEAN + offs_m, mask=mask_m, other=0.0)[:, None]
    return h * rstd[:, None], rstd


@triton.jit
def store_gradient(dh, DY_HIDDEN, SEED, DHIDDEN, DX, offs_m, offs_n, mask, columns, threshold, keep_scale):
    """Adds the gradient of the residual stream; writes dh, and dx where it differs by dropout or dtype."""
    if DY_HIDDEN is not None:
        dh += load_rows(DY_HIDDEN, offs_m, offs_n, mask, columns)
    offsets = offs_m[:, None] * columns + offs_n[None, :]
    if DHIDDEN is not None:
        tl.store(DHIDDEN + offsets, dh.to(DHIDDEN.dtype.element_ty), mask=mask)
    if DX is not None:
        dx = dropout(dh, SEED, offs_m, offs_n, threshold, keep_scale)
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_group", "programs", "threshold"])
def norm_backward_kernel(
    DY,  # (rows, columns), unit stride along a row
    DY_HIDDEN,  # (rows, columns), contiguous: the gradient of the residual stream, or None
    X,  # (rows, columns), unit stride along a row: h, as the forward kept it
    SEED,  # int64 (1,), or None: no dropout
    WEIGHT, SCALE,  # (columns,) and (groups, columns), or None
    MEAN, RSTD,  # fp32 (rows,); MEAN is None for RMS norm
    DHIDDEN, DX,  # (rows, columns), contiguous, or None
    PARTIAL_A, PARTIAL_B,  # fp32 (groups · programs, columns), or None
    stride_dy, stride_x, stride_scale,
    rows_per_group, columns, programs, weight_offset, threshold, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One of `programs` programs of a group: every programs-th tile of ROWS whole rows, dh and partial sums A, B."""
    group, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    offs_n = tl.arange(0, COLUMNS)
    mask_n = offs_n < columns
    gain = load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset)
    partial_a, partial_b = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, rows_per_group, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        offs_m, mask_m = group * rows_per_group + row, row < rows_per_group
        mask = mask_m[:, None] & mask_n[None, :]
        x_hat, rstd = load_normalised(X, MEAN, RSTD, offs_m, offs_n, mask_m, mask, stride_x)
        dy = load_rows(DY, offs_m, offs_n, mask, stride_dy)
        if PARTIAL_A is not None:
            partial_a += dy * x_hat
            partial_b += dy
        g = dy * gain[None, :]
        dh = g - x_hat * (tl.sum(g * x_hat, 1) / columns)[:, None]
        if MEAN is not None:
            dh -= (tl.sum(g, 1) / columns)[:, None]
        store_gradient(
            dh * rstd[:, None], DY_HIDDEN, SEED, DHIDDEN, DX, offs_m, offs_n, mask, columns, threshold, keep_scale
        )
    if PARTIAL_A is not None:
        offs_partial = tl.program_id(0).to(tl.int64) * columns + offs_n
        tl.store(PARTIAL_A + offs_partial, tl.sum(partial_a, 0), mask=mask_n)
        tl.store(PARTIAL_B + offs_partial, tl.sum(partial_b, 0), mask=mask_n)


@triton.jit(do_not_specialize=["rows_per_group", "threshold"])
def norm_backward_wide_kernel(
    DY, DY_HIDDEN, X, SEED, WEIGHT, SCALE, MEAN, RSTD, DHIDDEN, DX,  # as in `norm_backward_kernel`
    stride_dy, stride_x, stride_scale,
    rows_per_group, columns, weight_offset, threshold, keep_scale,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: dh of one row, in blocks of COLUMNS."""
    row = tl.program_id(0).to(tl.int64)
    offs_m, group = row + tl.arange(0, 1), row // rows_per_group
    mask_m = offs_m >= 0
    sum_gx, sum_g = tl.zeros([1, COLUMNS], tl.float32), tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        offs_n = start + tl.arange(0, COLUMNS)
        mask_n = offs_n < columns
        x_hat, _ = load_normalised(X, MEAN, RSTD, offs_m, offs_n, mask_m, mask_n[None, :], stride_x)
        gain = load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset)
        g = load_rows(DY, offs_m, offs_n, mask_n[None, :], stride_dy) * gain[None, :]
        sum_gx += g * x_hat
        sum_g += g
    mean_gx, mean_g = tl.sum(sum_gx, 1) / columns, tl.sum(sum_g, 1) / columns
    for start in range(0, columns, COLUMNS):
        offs_n = start + tl.arange(0, COLUMNS)
        mask_n = offs_n < columns
        x_hat, rstd = load_normalised(X, MEAN, RSTD, offs_m, offs_n, mask_m, mask_n[None, :], stride_x)
        gain = load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset)
        dh = load_rows(DY, offs_m, offs_n, mask_n[None, :], stride_dy) * gain[None, :] - x_hat * mean_gx[:, None]
        if MEAN is not None:
            dh -= mean_g[:, None]
        store_gradient(
            dh * rstd[:, None], DY_HIDDEN, SEED, DHIDDEN, DX, offs_m, offs_n, mask_n[None, :], columns, threshold,
            keep_scale,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_group", "programs"])
def norm_partials_kernel(
    DY, X, MEAN, RSTD, PARTIAL_A, PARTIAL_B,  # as in `norm_backward_kernel`
    stride_dy, stride_x, rows_per_group, columns, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums A, B of wide rows: one program takes a block of columns and every programs-th tile of rows."""
    blocks = tl.cdiv(columns, COLUMNS)
    part = tl.program_id(0) // blocks
    group, program = (part // programs).to(tl.int64), part % programs
    offs_n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < columns
    partial_a, partial_b = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, rows_per_group, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        offs_m, mask_m = group * rows_per_group + row, row < rows_per_group
        mask = mask_m[:, None] & mask_n[None, :]
        x_hat, _ = load_normalised(X, MEAN, RSTD, offs_m, offs_n, mask_m, mask, stride_x)
        dy = load_rows(DY, offs_m, offs_n, mask, stride_dy)
        partial_a += dy * x_hat
        partial_b += dy
    offs_partial = part.to(tl.int64) * columns + offs_n
    tl.store(PARTIAL_A + offs_partial, tl.sum(partial_a, 0), mask=mask_n)
    tl.store(PARTIAL_B + offs_partial, tl.sum(partial_b, 0), mask=mask_n)


@triton.jit(do_not_specialize=["programs"])
def norm_reduce_kernel(
    PARTIAL_A, PARTIAL_B,  # fp32 (groups · programs, columns)
    A, B,  # (groups, columns), contiguous
    columns, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A and B of one group and block of columns: the sum of its programs' partials, in order."""
    blocks = tl.cdiv(columns, COLUMNS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < columns
    a, b = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & mask_n[None, :]
        a += load_rows(PARTIAL_A, group * programs + row, offs_n, mask, columns)
        b += load_rows(PARTIAL_B, group * programs + row, offs_n, mask, columns)
    tl.store(A + group * columns + offs_n, tl.sum(a, 0).to(A.dtype.element_ty), mask=mask_n)
    tl.store(B + group * columns + offs_n, tl.sum(b, 0).to(B.dtype.element_ty), mask=mask_n)


def backward(
    grad_output: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    seed: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    rows: int,
    columns: int,
    weight_offset: float,
    dropout_p: float,
    has_residual: bool,
    input_dtype: torch.dtype,
    sums_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh, dx where it differs from dh, A, B), as `fastattn.ops.normalization` describes them."""
    dy, h = as_rows(grad_output, rows, columns), as_rows(hidden, rows, columns)
    dy_hidden = contiguous(grad_hidden)
    separate = seed is not None or input_dtype != hidden.dtype
    grad = hidden.new_empty(hidden.shape if has_residual or not separate else 0)
    grad_input = hidden.new_empty(hidden.shape if separate else 0, dtype=input_dtype)
    rows_per_group = rows // max(groups, 1)
    mixed_residual = has_residual and input_dtype != hidden.dtype
    heavy = seed is not None or scale is not None
    alone = mean.numel() > 0 and not (has_residual or heavy)
    config = norm_backward_config(current_target(), columns, input_dtype.itemsize, mixed_residual, heavy, alone)
    programs = max(1, min(config.programs // max(groups, 1), triton.cdiv(rows_per_group, config.rows)))
    partials = None if sums_dtype is None else hidden.new_empty(2, groups * programs, columns, dtype=torch.float32)
    partial_a, partial_b = (None, None) if partials is None else (partials[0], partials[1])
    statistics = (mean if mean.numel() else None, rstd)
    arguments = (
        dy, dy_hidden, h, seed, contiguous(weight), scale, *statistics,
        grad if grad.numel() else None, grad_input if grad_input.numel() else None,
    )  # fmt: skip
    constants = (weight_offset, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p))
    if config.wide:
        launch(
            norm_backward_wide_kernel, (rows if columns else 0,),
            *arguments,
            dy.stride(0), h.stride(0), columns, rows_per_group, columns, *constants,
            COLUMNS=config.columns, num_warps=config.num_warps,
        )  # fmt: skip
        if partials is not None:
            launch(
                norm_partials_kernel, (groups * programs * triton.cdiv(columns, config.partial_columns),),
                dy, h, *statistics, partial_a, partial_b,
                dy.stride(0), h.stride(0), rows_per_group, columns, programs,
                ROWS=config.rows, COLUMNS=config.partial_columns,
            )  # fmt: skip
    else:
        launch(
            norm_backward_kernel, (groups * programs if columns else 0,),
            *arguments, partial_a, partial_b,
            dy.stride(0), h.stride(0), columns, rows_per_group, columns, programs, *constants,
            ROWS=config.rows, COLUMNS=config.columns, num_warps=config.num_warps, max_registers=config.max_registers,
        )  # fmt: skip
    if partials is None:
        return grad, grad_input, hidden.new_empty(0), hidden.new_empty(0)
    sum_a, sum_b = (hidden.new_empty(groups, columns, dtype=sums_dtype) for _ in range(2))
    launch(
        norm_reduce_kernel, (groups * triton.cdiv(columns, REDUCE_COLUMNS),),
        partial_a, partial_b, sum_a, sum_b, columns, programs,
        ROWS=REDUCE_ROWS, COLUMNS=REDUCE_COLUMNS,
    )  # fmt: skip
    return grad, grad_input, sum_a, sum_b
