"""What the forward and the backward of the norms share: how rows are loaded and scaled."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_rows(POINTER, offs_m, offs_n, mask, stride):
    """[ROWS, COLUMNS] in fp32, zero where masked."""
    return tl.load(POINTER + offs_m[:, None] * stride + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gain(WEIGHT, SCALE, group, offs_n, mask_n, stride_scale, weight_offset):
    """∂y/∂x̂ = (1 + scale) · (offset + weight), [COLUMNS]."""
    gain = tl.full(offs_n.shape, 1.0, tl.float32)
    if WEIGHT is not None:
        gain = tl.load(WEIGHT + offs_n, mask=mask_n, other=0.0).to(tl.float32) + weight_offset
    if SCALE is not None:
        gain *= 1.0 + tl.load(SCALE + group * stride_scale + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return gain


def as_rows(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] with unit stride along a row: a view where there is one."""
    tensor = tensor.reshape(rows, columns)
    return tensor if tensor.stride(1) == 1 or columns == 1 else tensor.contiguous()
