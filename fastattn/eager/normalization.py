"""Layer norm and RMS norm in plain PyTorch: the differentiable definition, and the CPU backend.

The launchers have the signatures of `fastattn/kernels/normalization.py`. Plain layer norm goes to PyTorch's own kernels, and so
does the backward of plain RMS norm. Everything else is computed in fp32 in blocks of rows, so that temporaries stay small.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastattn.eager.random import drop
from fastattn.eager.row_blocks import row_blocks

BLOCK_NUMBERS = 1 << 18  # numbers in a block of rows: it stays in the cache
SUMMED_NUMBERS = 1 << 19  # the same where rows are only summed over: fewer calls, each of which waits for all threads
ROOM = 2048  # numbers more than a tensor has, so that the next one of its size finds room in its memory (glibc aligns anew)


def normalise(hidden: Tensor, dims: int, eps: float, centered: bool) -> Tensor:
    """x̂ = (h - mean) / sqrt(var + eps) in fp32 over the last `dims` dimensions; RMS norm takes the mean as 0."""
    h, over = hidden.float(), tuple(range(-dims, 0))
    if centered:
        h = h - h.mean(over, keepdim=True)
    return h * torch.rsqrt(h.square().mean(over, keepdim=True) + eps)


def modulate(
    x_hat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight_offset: float,
) -> Tensor:
    """y = (1 + scale) · ((offset + weight) · x̂ + bias) + shift in fp32, with the factors and terms that are given."""
    y = x_hat if weight is None else x_hat * (weight.float() + weight_offset)
    y = y if bias is None else y + bias.float()
    y = y if scale is None else y * (1.0 + scale.float())
    return y if shift is None else y + shift.float()


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
    h, added = input.reshape(rows, columns), None if residual is None else residual.reshape(rows, columns)
    keeps = residual is not None or seed is not None
    hidden = input.new_empty(input.shape if keeps else 0, dtype=hidden_dtype)
    if added is not None and seed is None and hidden_dtype == torch.promote_types(h.dtype, added.dtype):
        h = torch.add(h, added, out=hidden.view(rows, columns))
    elif keeps:
        for block in row_blocks(rows, columns, BLOCK_NUMBERS):
            x = drop(h[block], seed, dropout_p, range(block.start, block.stop), columns)
            hidden.view(rows, columns)[block] = x if added is None else x + added[block]
        h = hidden.view(rows, columns)
    if centered and scale is None and shift is None and output_dtype == h.dtype:
        gain, added = _gain(weight, columns, weight_offset, h), None if bias is None else _flat(bias)
        y, mean, rstd = torch.native_layer_norm(h, (columns,), gain, added, eps)
        return y.view(input.shape), hidden, mean.view(rows), rstd.view(rows)
    output = input.new_empty(input.shape, dtype=output_dtype)
    if not centered and scale is None and shift is None:
        factor = None if weight is None and not weight_offset else _gain(weight, columns, weight_offset, h)
        rstd = _rms(h, factor, None if bias is None else _flat(bias), eps, output.view(rows, columns))
        return output, hidden, rstd.new_empty(0), rstd
    y, mean = output.view(rows, columns), input.new_empty(rows if centered else 0, dtype=torch.float32)
    rstd = input.new_empty(rows, dtype=torch.float32)
    flat_weight, flat_bias = (None if p is None else p.reshape(columns) for p in (weight, bias))
    for block in row_blocks(rows, columns, BLOCK_NUMBERS):
        x_hat = h[block].float()
        if centered:  # (a mean that is rounded once leaves a constant row a variance)
            x_hat, *statistics = torch.native_layer_norm(x_hat, (columns,), None, None, eps)
            mean[block], rstd[block] = (s.view(-1) for s in statistics)
        else:
            rstd[block] = torch.rsqrt(x_hat.square().mean(1) + eps)
            x_hat = x_hat * rstd[block, None]
        factor, term = (None if m is None else m[_group_of(block, rows, groups, m)] for m in (scale, shift))
        y[block] = modulate(x_hat, flat_weight, flat_bias, factor, term, weight_offset)
    return output, hidden, mean, rstd


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
    dy, h = grad_output.reshape(rows, columns), hidden.reshape(rows, columns)
    gain, plain = _gain(weight, columns, weight_offset, h), groups == 1 and scale is None
    whole = plain and seed is None and h.dtype == input_dtype and grad_hidden is None
    rounded_twice = mean.numel() == 0 and h.dtype != torch.float32  # RMS norm's: the kernel's, and with the term added
    if whole and not rounded_twice:
        grad, sums = fused_backward(dy.to(h.dtype), h, gain, mean, rstd, sums_dtype)
        return grad.view(hidden.shape), hidden.new_empty(0), *_sums([s[None] for s in sums], rstd, sums_dtype)
    separate = seed is not None or input_dtype != hidden.dtype
    grad = hidden.new_empty(hidden.shape if has_residual or not separate else 0)
    grad_input = hidden.new_empty(hidden.shape if separate else 0, dtype=input_dtype)
    added = None if grad_hidden is None else grad_hidden.reshape(rows, columns)
    sums = [hidden.new_zeros(groups, columns, dtype=torch.float32) for _ in range(2)]
    for block in row_blocks(rows, columns, BLOCK_NUMBERS):
        dy_block, h_block = dy[block].float(), h[block].float()
        if plain:
            means = mean[block] if mean.numel() else mean
            dh, summands = fused_backward(dy_block, h_block, gain, means, rstd[block], sums_dtype)
            for total, summand in zip(sums, summands):
                total += summand
        else:
            mean_block, rstd_block = (mean[block, None] if mean.numel() else None), rstd[block, None]
            group = _group_of(block, rows, groups, h)
            x_hat = (h_block if mean_block is None else h_block - mean_block) * rstd_block
            g = dy_block * (gain if scale is None else gain * (1.0 + scale[group].float()))
            dh = g - x_hat * (g * x_hat).mean(1, keepdim=True)
            dh = (dh if mean_block is None else dh - g.mean(1, keepdim=True)) * rstd_block
            for total, summand in zip(sums, (dy_block * x_hat, dy_block)):
                total.index_add_(0, group, summand)
        dh = dh if added is None else dh + added[block]
        if grad.numel():
            grad.view(rows, columns)[block] = dh
        if grad_input.numel():
            dx = drop(dh, seed, dropout_p, range(block.start, block.stop), columns)
            grad_input.view(rows, columns)[block] = dx
    return grad, grad_input, *_sums(sums, rstd, sums_dtype)


def _rms(h: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float, output: Tensor) -> Tensor:
    """Writes y = gain · h · rstd + bias and returns rstd = 1 / sqrt(mean(h²) + eps): (rows,), fp32.

    h, output: (rows, columns); gain, bias: (columns,), fp32. PyTorch's vector norm sums 16-bit rows in fp32, without a copy.
    """
    rows, columns = h.shape
    norm = torch.linalg.vector_norm(h, dim=1, dtype=torch.float32)
    rstd = norm.square_().div_(columns).add_(eps).rsqrt_()
    in_place, copied = output.dtype == h.dtype == torch.float32, h.dtype != torch.float32
    for block in [slice(0, rows)] if in_place else row_blocks(rows, columns, BLOCK_NUMBERS):
        x = h[block].float()  # fp32 rows themselves, which stay as they are: they may be the residual stream
        y = torch.mul(x, rstd[block, None], out=output[block] if in_place else x if copied else None)
        y = y if gain is None else y.mul_(gain)
        y = y if bias is None else y.add_(bias)
        if not in_place:
            output[block] = y
    return rstd


def _group_of(block: slice, rows: int, groups: int, like: Tensor) -> Tensor:
    return torch.arange(block.start, block.stop, device=like.device) // (rows // groups)


def _flat(parameter: Tensor) -> Tensor:
    """(columns,) in fp32; calls that change nothing are left out, since they cost as much as those that do."""
    flat = parameter if parameter.dim() == 1 else parameter.reshape(-1)
    return flat if flat.dtype == torch.float32 else flat.float()


def _gain(weight: Tensor | None, columns: int, weight_offset: float, like: Tensor) -> Tensor:
    """offset + weight in fp32, which also makes PyTorch's kernel keep its statistics in fp32."""
    if weight is None:
        return like.new_ones(columns, dtype=torch.float32)
    gain = _flat(weight)
    return gain + weight_offset if weight_offset else gain


def fused_backward(
    dy: Tensor, h: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor, sums_dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    """PyTorch's layer norm backward: dh in the rows' dtype, and unless `sums_dtype` is None A and B in fp32, as exact as that.

    dy, h: (rows, columns); gain: (columns,), fp32; mean, rstd: (rows,), fp32. Without a mean, and in fp32, the rows' norm is
    RMS norm: layer norm with mean 0, whose gradient lacks the term that the mean's own dependence on h brings in.
    """
    of_fp32, centered = sums_dtype is not None and h.dtype == torch.float32, mean.numel() > 0
    which, means = [True, of_fp32, of_fp32], mean if centered else torch.zeros_like(rstd)
    sums = [] if sums_dtype is None or of_fp32 else sums_over_rows(dy, h, gain, mean, rstd, sums_dtype)
    dh, *fp32_sums = torch.ops.aten.native_layer_norm_backward.default(
        dy, h, gain.shape, means[:, None], rstd[:, None], gain, gain, which
    )
    if not centered:
        dh += (torch.mv(dy, gain) * (rstd / len(gain)))[:, None]
    return dh, fp32_sums if of_fp32 else sums


def sums_over_rows(dy: Tensor, h: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[A, B] = [Σ dy · x̂, Σ dy] of 16-bit rows in fp32, for a result in `dtype`; shapes as in `fused_backward`.

    PyTorch's layer norm sums them in 16 bits: 20,000 ones make 256. Its batch norm sums over rows as well, and in fp32: from
    x̂ (the batch norm in which each row is a channel, with the statistics known) it gets A and B (the backward of
    one with mean 0 and deviation 1). x̂ is rounded to 16 bits on the way, as the result will be; where the result is
    fp32, blocks of rows are made fp32 for PyTorch's layer norm.
    """
    rows, columns = h.shape
    zeros, ones, no_statistics = _constants(columns, h.device)
    if not h.numel():  # PyTorch's batch norm divides by the number of rows and ends the process
        return [zeros.clone(), zeros.clone()]
    if dtype != torch.float32:
        x_hat = h.new_empty(h.numel() + ROOM).resize_(h.shape)  # the gradient gets its memory
        torch.native_batch_norm(
            h[None], None, None, mean, rstd.pow(-2), False, 0.0, 0.0, out=(x_hat[None], no_statistics, no_statistics)
        )
        return torch.ops.aten.native_batch_norm_backward.default(
            dy, x_hat, None, None, None, zeros, ones, True, 0.0, [False, True, True]
        )[1:]
    sums = [zeros, zeros]
    for block in row_blocks(rows, columns, SUMMED_NUMBERS):
        _, *summands = torch.ops.aten.native_layer_norm_backward.default(
            dy[block].float(), h[block].float(), gain.shape, mean[block, None], rstd[block, None], gain, gain,
            [False, True, True],
        )  # fmt: skip
        sums = [total + summand for total, summand in zip(sums, summands)]
    return sums


@lru_cache(maxsize=64)
def _constants(columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros and ones (columns,), and no numbers at all, for results that there are none of; fp32."""
    with torch.inference_mode(False):
        zeros = torch.zeros(columns, dtype=torch.float32, device=device)
        return zeros, torch.ones_like(zeros), zeros.new_empty(0)


def _sums(sums: list[Tensor], rstd: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A and B in `dtype`, empty where it is None."""
    return (rstd.new_empty(0), rstd.new_empty(0)) if dtype is None else (sums[0].to(dtype), sums[1].to(dtype))


def explain(columns: int, itemsize: int, mixed_residual: bool, heavy: bool, alone: bool) -> list[str]:
    """How rows of this width are done, in words."""
    rows = max(1, BLOCK_NUMBERS // max(1, columns))
    return [f"PyTorch's layer norm kernel where it does the job in fp32; all else in fp32, {rows} rows at a time"]
