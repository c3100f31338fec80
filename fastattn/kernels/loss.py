"""Cross entropy of logits in Triton, with its gradient written over them.

For a row of logits z over V classes with target y, smoothing ε and weight w:

    ℓ = log Σ exp(z) - (1 - ε) z_y - ε mean(z)
    ∂(w ℓ)/∂z_v = w (softmax(z)_v - (1 - ε) [v = y] - ε / V)

A row whose target is `ignore_index` has ℓ = 0 and no gradient. One program takes a row and reads it twice: for the
maximum and the sum of exponentials (one pass, rescaled as the maximum grows), then for the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.config import CHUNK_LOGITS, cross_entropy_config
from fastattn.kernels.launch import launch


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    LOGITS, TARGET, TOKEN_WEIGHT, LOSSES, classes, ignore_index, label_smoothing,
    NEED_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    valid = target != ignore_index
    maximum, total, sum_z, z_target = -float("inf"), 0.0, 0.0, 0.0
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(LOGITS + row * classes + column, mask=column < classes, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(z, 0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger), 0)
        maximum = larger
        sum_z += tl.sum(tl.where(column < classes, z, 0.0), 0)
        z_target += tl.sum(tl.where(column == target, z, 0.0), 0)
    lse = maximum + tl.log(total)
    loss = lse - (1.0 - label_smoothing) * z_target - label_smoothing * (sum_z / classes)
    tl.store(LOSSES + row, tl.where(valid, loss, 0.0))
    if NEED_GRADIENT:
        scale = tl.where(valid, tl.load(TOKEN_WEIGHT + row).to(tl.float32), 0.0)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < classes
            z = tl.load(LOGITS + row * classes + column, mask=mask, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(z - lse) - label_smoothing / classes
            gradient = scale * tl.where(column == target, gradient - (1.0 - label_smoothing), gradient)
            tl.store(LOGITS + row * classes + column, gradient.to(LOGITS.dtype.element_ty), mask=mask)


def chunk_rows(classes: int) -> int:
    """How many rows of logits are computed at a time."""
    return max(16, CHUNK_LOGITS // max(classes, 1))


def losses_and_gradient(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(ℓ, ∂(Σ w · ℓ) / ∂logits in their dtype) of one chunk of contiguous logits, which the gradient overwrites."""
    rows, classes = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    block, num_warps = cross_entropy_config(classes)
    launch(
        cross_entropy_kernel,
        (rows,),
        *(logits, target.contiguous(), token_weight.contiguous(), losses, classes, ignore_index, label_smoothing),
        NEED_GRADIENT=need_gradient,
        BLOCK=block,
        num_warps=num_warps,
    )
    return losses, logits


def explain(classes: int) -> str:
    """The chunks and blocks of logits over this many classes."""
    block, num_warps = cross_entropy_config(classes)
    return f"{chunk_rows(classes)} rows of logits at a time, in blocks of {block} classes, {num_warps} warps"
