"""Layer norm and RMS norm in Triton, forward and backward, for rows of any width.

With h = input + residual, one row of `columns` numbers normalises to

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

from fastattn.kernels.config import REDUCE_COLUMNS, REDUCE_ROWS, norm_backward_config, norm_forward_config
from fastattn.kernels.launch import current_target, launch


@triton.jit
def load_tile(POINTER, offs_m, offs_n, mask, stride):
    """[ROWS, COLUMNS] in fp32, zero where masked."""
    return tl.load(POINTER + offs_m[:, None] * stride + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_hidden(X, RESIDUAL, HIDDEN, offs_m, offs_n, mask, stride_x, stride_residual, columns):
    """h = x + residual, rounded to the dtype in which it is kept, so that the backward sees the same numbers."""
    h = load_tile(X, offs_m, offs_n, mask, stride_x)
    if RESIDUAL is not None:
        h += load_tile(RESIDUAL, offs_m, offs_n, mask, stride_residual)
        rounded = h.to(HIDDEN.dtype.element_ty)
        tl.store(HIDDEN + offs_m[:, None] * columns + offs_n[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset):
    """∂y/∂x̂ = (1 + scale) · (offset + weight), [COLUMNS]."""
    gain = tl.full(offs_n.shape, 1.0, tl.float32)
    if WEIGHT is not None:
        gain = tl.load(WEIGHT + offs_n, mask=mask_n, other=0.0).to(tl.float32) + weight_offset
    if SCALE is not None:
        gain *= 1.0 + tl.load(SCALE + group * stride_scale + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return gain


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


@triton.jit(do_not_specialize=["rows_per_group", "tiles"])
def norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, SCALE, SHIFT, Y, HIDDEN, MEAN, RSTD,
    stride_x, stride_residual, stride_scale,
    rows_per_group, columns, tiles, eps, weight_offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows of one group, kept in registers."""
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    offs_m, offs_n = group * rows_per_group + row, tl.arange(0, COLUMNS)
    mask_m, mask_n = row < rows_per_group, offs_n < columns
    mask = mask_m[:, None] & mask_n[None, :]
    h = load_hidden(X, RESIDUAL, HIDDEN, offs_m, offs_n, mask, stride_x, stride_residual, columns)
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


@triton.jit(do_not_specialize=["rows_per_group", "tiles"])
def norm_forward_wide_kernel(
    X, RESIDUAL, WEIGHT, BIAS, SCALE, SHIFT, Y, HIDDEN, MEAN, RSTD,
    stride_x, stride_residual, stride_scale,
    rows_per_group, columns, tiles, eps, weight_offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As above for wide rows, in blocks of COLUMNS; each lane follows its own mean and Σ (h - mean)² (Welford)."""
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    offs_m = group * rows_per_group + tile + tl.arange(0, ROWS)
    mean, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        offs_n = start + tl.arange(0, COLUMNS)
        mask = (offs_n < columns)[None, :]
        h = load_hidden(X, RESIDUAL, HIDDEN, offs_m, offs_n, mask, stride_x, stride_residual, columns)
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
        if RESIDUAL is not None:
            h = load_tile(HIDDEN, offs_m, offs_n, mask_n[None, :], columns)
        else:
            h = load_tile(X, offs_m, offs_n, mask_n[None, :], stride_x)
        if MEAN is not None:
            h -= row_mean[:, None]
        y = affine(h * rstd[:, None], WEIGHT, BIAS, SCALE, SHIFT, group, offs_n, mask_n, stride_scale, weight_offset)
        tl.store(Y + offs_m[:, None] * columns + offs_n[None, :], y.to(Y.dtype.element_ty), mask=mask_n[None, :])


@triton.jit
def load_normalised(HIDDEN, MEAN, RSTD, offs_m, offs_n, mask_m, mask, stride):
    """(x̂ [ROWS, COLUMNS], rstd [ROWS])"""
    h = load_tile(HIDDEN, offs_m, offs_n, mask, stride)
    rstd = tl.load(RSTD + offs_m, mask=mask_m, other=0.0)
    if MEAN is not None:
        h -= tl.load(MEAN + offs_m, mask=mask_m, other=0.0)[:, None]
    return h * rstd[:, None], rstd


@triton.jit
def store_gradient(dh, DY_HIDDEN, DHIDDEN, DX, offs_m, offs_n, mask, columns):
    """Adds the gradient of the residual stream; writes dh, and once more where x has another dtype."""
    if DY_HIDDEN is not None:
        dh += load_tile(DY_HIDDEN, offs_m, offs_n, mask, columns)
    offsets = offs_m[:, None] * columns + offs_n[None, :]
    tl.store(DHIDDEN + offsets, dh.to(DHIDDEN.dtype.element_ty), mask=mask)
    if DX is not None:
        tl.store(DX + offsets, dh.to(DX.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_group", "programs"])
def norm_backward_kernel(
    DY, DY_HIDDEN, X, WEIGHT, SCALE, MEAN, RSTD, DHIDDEN, DX, PARTIAL_A, PARTIAL_B,
    stride_dy, stride_x, stride_scale,
    rows_per_group, columns, programs, weight_offset,
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
        dy = load_tile(DY, offs_m, offs_n, mask, stride_dy)
        if PARTIAL_A is not None:
            partial_a += dy * x_hat
            partial_b += dy
        g = dy * gain[None, :]
        dh = g - x_hat * (tl.sum(g * x_hat, 1) / columns)[:, None]
        if MEAN is not None:
            dh -= (tl.sum(g, 1) / columns)[:, None]
        store_gradient(dh * rstd[:, None], DY_HIDDEN, DHIDDEN, DX, offs_m, offs_n, mask, columns)
    if PARTIAL_A is not None:
        offs_partial = tl.program_id(0).to(tl.int64) * columns + offs_n
        tl.store(PARTIAL_A + offs_partial, tl.sum(partial_a, 0), mask=mask_n)
        tl.store(PARTIAL_B + offs_partial, tl.sum(partial_b, 0), mask=mask_n)


@triton.jit(do_not_specialize=["rows_per_group"])
def norm_backward_wide_kernel(
    DY, DY_HIDDEN, X, WEIGHT, SCALE, MEAN, RSTD, DHIDDEN, DX,
    stride_dy, stride_x, stride_scale,
    rows_per_group, columns, weight_offset,
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
        g = load_tile(DY, offs_m, offs_n, mask_n[None, :], stride_dy) * gain[None, :]
        sum_gx += g * x_hat
        sum_g += g
    mean_gx, mean_g = tl.sum(sum_gx, 1) / columns, tl.sum(sum_g, 1) / columns
    for start in range(0, columns, COLUMNS):
        offs_n = start + tl.arange(0, COLUMNS)
        mask_n = offs_n < columns
        x_hat, rstd = load_normalised(X, MEAN, RSTD, offs_m, offs_n, mask_m, mask_n[None, :], stride_x)
        gain = load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset)
        dh = load_tile(DY, offs_m, offs_n, mask_n[None, :], stride_dy) * gain[None, :] - x_hat * mean_gx[:, None]
        if MEAN is not None:
            dh -= mean_g[:, None]
        store_gradient(dh * rstd[:, None], DY_HIDDEN, DHIDDEN, DX, offs_m, offs_n, mask_n[None, :], columns)


@triton.jit(do_not_specialize=["rows_per_group", "programs"])
def norm_partials_kernel(
    DY, X, MEAN, RSTD, PARTIAL_A, PARTIAL_B,
    stride_dy, stride_x, rows_per_group, columns, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums A, B of wide rows: one program takes a block of columns and every programs-th tile of rows."""
    group, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    offs_n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < columns
    partial_a, partial_b = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, rows_per_group, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        offs_m, mask_m = group * rows_per_group + row, row < rows_per_group
        mask = mask_m[:, None] & mask_n[None, :]
        x_hat, _ = load_normalised(X, MEAN, RSTD, offs_m, offs_n, mask_m, mask, stride_x)
        dy = load_tile(DY, offs_m, offs_n, mask, stride_dy)
        partial_a += dy * x_hat
        partial_b += dy
    offs_partial = tl.program_id(0).to(tl.int64) * columns + offs_n
    tl.store(PARTIAL_A + offs_partial, tl.sum(partial_a, 0), mask=mask_n)
    tl.store(PARTIAL_B + offs_partial, tl.sum(partial_b, 0), mask=mask_n)


@triton.jit(do_not_specialize=["programs"])
def norm_reduce_kernel(
    PARTIAL_A, PARTIAL_B, A, B, columns, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A and B of one group (program axis 1) and block of columns: the sum of its programs' partials, in order."""
    group = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < columns
    a, b = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & mask_n[None, :]
        a += load_tile(PARTIAL_A, group * programs + row, offs_n, mask, columns)
        b += load_tile(PARTIAL_B, group * programs + row, offs_n, mask, columns)
    tl.store(A + group * columns + offs_n, tl.sum(a, 0).to(A.dtype.element_ty), mask=mask_n)
    tl.store(B + group * columns + offs_n, tl.sum(b, 0).to(B.dtype.element_ty), mask=mask_n)


def as_rows(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] with unit stride along a row: a view where there is one."""
    tensor = tensor.reshape(rows, columns)
    return tensor if tensor.stride(1) == 1 or columns == 1 else tensor.contiguous()


def parameter(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    input: Tensor,
    residual: Tensor | None,
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
    output_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hidden, mean, rstd), as `fastattn.ops.normalization` describes them."""
    x = as_rows(input, rows, columns)
    added = None if residual is None else as_rows(residual, rows, columns)
    output = input.new_empty(input.shape, dtype=output_dtype)
    hidden = input.new_empty(0 if added is None else input.shape, dtype=hidden_dtype)
    mean = input.new_empty(rows if centered else 0, dtype=torch.float32)
    rstd = input.new_empty(rows, dtype=torch.float32)
    rows_per_group = rows // max(groups, 1)
    config = norm_forward_config(columns)
    tiles = triton.cdiv(rows_per_group, config.rows)
    launch(
        norm_forward_wide_kernel if config.wide else norm_forward_kernel,
        (groups * tiles if columns else 0,),
        *(x, added, parameter(weight), parameter(bias), scale, shift),
        *(output, None if added is None else hidden, mean if centered else None, rstd),
        *(x.stride(0), 0 if added is None else added.stride(0), columns),
        *(rows_per_group, columns, tiles, eps, weight_offset),
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return output, hidden, mean, rstd


def backward(
    grad_output: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    rows: int,
    columns: int,
    weight_offset: float,
    input_dtype: torch.dtype,
    sums_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh, dh in the input's dtype where that differs, A, B), as `fastattn.ops.normalization` describes them."""
    dy, h = as_rows(grad_output, rows, columns), as_rows(hidden, rows, columns)
    dy_hidden = None if grad_hidden is None else grad_hidden.contiguous()
    grad = hidden.new_empty(hidden.shape)
    grad_input = hidden.new_empty(0 if input_dtype == hidden.dtype else hidden.shape, dtype=input_dtype)
    rows_per_group = rows // max(groups, 1)
    config = norm_backward_config(current_target(), columns)
    programs = max(1, min(config.programs // max(groups, 1), triton.cdiv(rows_per_group, config.rows)))
    partials = None if sums_dtype is None else hidden.new_empty(2, groups * programs, columns, dtype=torch.float32)
    partial_a, partial_b = (None, None) if partials is None else (partials[0], partials[1])
    statistics = (mean if mean.numel() else None, rstd)
    arguments = (
        *(dy, dy_hidden, h, parameter(weight), scale, *statistics),
        *(grad, grad_input if grad_input.numel() else None),
    )
    if config.wide:
        launch(
            norm_backward_wide_kernel,
            (rows if columns else 0,),
            *arguments,
            *(dy.stride(0), h.stride(0), columns, rows_per_group, columns, weight_offset),
            COLUMNS=config.columns,
            num_warps=config.num_warps,
        )
        if partials is not None:
            launch(
                norm_partials_kernel,
                (groups * programs, triton.cdiv(columns, config.partial_columns)),
                *(dy, h, *statistics, partial_a, partial_b),
                *(dy.stride(0), h.stride(0), rows_per_group, columns, programs),
                ROWS=config.rows,
                COLUMNS=config.partial_columns,
            )
    else:
        launch(
            norm_backward_kernel,
            (groups * programs if columns else 0,),
            *(*arguments, partial_a, partial_b),
            *(dy.stride(0), h.stride(0), columns, rows_per_group, columns, programs, weight_offset),
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.num_warps,
        )
    if partials is None:
        return grad, grad_input, hidden.new_empty(0), hidden.new_empty(0)
    sum_a, sum_b = (hidden.new_empty(groups, columns, dtype=sums_dtype) for _ in range(2))
    launch(
        norm_reduce_kernel,
        (triton.cdiv(columns, REDUCE_COLUMNS), groups),
        *(partial_a, partial_b, sum_a, sum_b, columns, programs),
        ROWS=REDUCE_ROWS,
        COLUMNS=REDUCE_COLUMNS,
    )
    return grad, grad_input, sum_a, sum_b
