"""Cross entropy of logits in Triton, forward and backward, on its own and as a step of `linear_cross_entropy`.

For a row of logits x over V classes, with z = c·tanh(x / c) under a softcap c (else z = x), target y, smoothing ε, class
weights w (or 1) with sum W, and z-loss λ:

    ℓ = a·lse + λ·lse² - (1 - ε) w_y z_y - (ε / V) Σ w_v z_v,    lse = log Σ exp(z),   a = (1 - ε) w_y + ε W / V
    ∂ℓ/∂x_v = (1 - (z_v / c)²) · ((a + 2 λ lse) exp(z_v - lse) - (1 - ε) w_y [v = y] - (ε / V) w_v)

A row whose target is `ignore_index` has ℓ = 0 and no gradient. One program takes a row and reads it once for the loss
(the sum of exponentials is rescaled as the maximum grows) and once more for the gradient, if that is wanted at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.config import CHUNK_LOGITS, cross_entropy_config
from fastattn.kernels.launch import launch
from fastattn.kernels.masks import capped_score, capped_score_derivative


@triton.jit
def load_logits(LOGITS, column, classes, softcap):
    """z of a block of classes in fp32, -inf beyond the last class."""
    mask = column < classes
    z = tl.load(LOGITS + column, mask=mask, other=-float("inf")).to(tl.float32)
    if softcap is not None:
        z = tl.where(mask, capped_score(z, 1.0, softcap), -float("inf"))
    return z


@triton.jit
def class_weights(CLASS_WEIGHT, column, classes):
    """w of a block of classes in fp32."""
    w = tl.full(column.shape, 1.0, tl.float32)
    if CLASS_WEIGHT is not None:
        w = tl.load(CLASS_WEIGHT + column, mask=column < classes, other=0.0).to(tl.float32)
    return w


@triton.jit
def target_weight(CLASS_WEIGHT, target, classes):
    """w_y; 0 for a target that is no class."""
    w = 1.0
    if CLASS_WEIGHT is not None:
        w = tl.load(CLASS_WEIGHT + target, mask=(target >= 0) & (target < classes), other=0.0).to(tl.float32)
    return w


@triton.jit
def lse_factor(WEIGHT_SUM, w_target, classes, label_smoothing):
    """a = (1 - ε) w_y + ε W / V"""
    mean = 1.0
    if WEIGHT_SUM is not None:
        mean = tl.load(WEIGHT_SUM) / classes
    return (1.0 - label_smoothing) * w_target + label_smoothing * mean


@triton.jit
def gradient_of_logits(
    z, column, target, lse, CLASS_WEIGHT, w_target, factor, classes, label_smoothing, z_loss, softcap
):
    """∂ℓ/∂x of a block of classes."""
    smooth = (label_smoothing / classes) * class_weights(CLASS_WEIGHT, column, classes)
    gradient = (factor + 2.0 * z_loss * lse) * tl.exp(z - lse) - smooth
    gradient = tl.where(column == target, gradient - (1.0 - label_smoothing) * w_target, gradient)
    if softcap is not None:
        gradient *= capped_score_derivative(z, softcap)
    return gradient


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    LOGITS, TARGET, CLASS_WEIGHT, WEIGHT_SUM, TOKEN_WEIGHT, LOSSES, LSE, PREDICTIONS,
    stride_row, classes, ignore_index, label_smoothing, z_loss, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ℓ of a row; with TOKEN_WEIGHT, that times ∂ℓ/∂x is written over the logits."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride_row
    target = tl.load(TARGET + row)
    valid = target != ignore_index
    w_target = target_weight(CLASS_WEIGHT, target, classes)
    factor = lse_factor(WEIGHT_SUM, w_target, classes, label_smoothing)
    in_range = (target >= 0) & (target < classes)
    z_target = tl.load(LOGITS + target, mask=in_range, other=0.0).to(tl.float32)
    if softcap is not None:
        z_target = capped_score(z_target, 1.0, softcap)

    maximum, total = -float("inf"), 0.0
    sums = tl.zeros([BLOCK], tl.float32)
    best, where = tl.full([BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = load_logits(LOGITS, column, classes, softcap)  # [BLOCK]
        larger = tl.maximum(maximum, tl.max(z, 0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger), 0)
        maximum = larger
        sums += tl.where(column < classes, z * class_weights(CLASS_WEIGHT, column, classes), 0.0)
        if PREDICTIONS is not None:
            where = tl.where(z > best, column, where)
            best = tl.maximum(best, z)
    lse = maximum + tl.log(total)
    loss = factor * lse + z_loss * lse * lse - (1.0 - label_smoothing) * w_target * z_target
    loss -= (label_smoothing / classes) * tl.sum(sums, 0)
    tl.store(LOSSES + row, tl.where(valid, loss, 0.0))
    if LSE is not None:
        tl.store(LSE + row, lse)
    if PREDICTIONS is not None:  # the first of the largest
        tl.store(PREDICTIONS + row, tl.min(tl.where(best == maximum, where, classes), 0).to(tl.int64))
    if TOKEN_WEIGHT is not None:
        scale = tl.where(valid, tl.load(TOKEN_WEIGHT + row).to(tl.float32), 0.0)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = load_logits(LOGITS, column, classes, softcap)  # [BLOCK]
            gradient = scale * gradient_of_logits(
                z, column, target, lse, CLASS_WEIGHT, w_target, factor, classes, label_smoothing, z_loss, softcap
            )
            tl.store(LOGITS + column, gradient.to(LOGITS.dtype.element_ty), mask=column < classes)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward_kernel(
    LOGITS, LSE, TARGET, CLASS_WEIGHT, WEIGHT_SUM, GRAD_LOSSES, GRADIENT,
    stride_row, stride_gradient, classes, ignore_index, label_smoothing, z_loss, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ∂L/∂x of BLOCK classes of a row; GRADIENT may be LOGITS."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(TARGET + row)
    w_target = target_weight(CLASS_WEIGHT, target, classes)
    factor = lse_factor(WEIGHT_SUM, w_target, classes, label_smoothing)
    scale = tl.where(target != ignore_index, tl.load(GRAD_LOSSES + row).to(tl.float32), 0.0)
    z = load_logits(LOGITS + row * stride_row, column, classes, softcap)  # [BLOCK]
    gradient = scale * gradient_of_logits(
        z, column, target, tl.load(LSE + row), CLASS_WEIGHT, w_target, factor, classes, label_smoothing, z_loss, softcap
    )
    pointers = GRADIENT + row * stride_gradient + column
    tl.store(pointers, gradient.to(GRADIENT.dtype.element_ty), mask=column < classes)


def chunk_rows(classes: int) -> int:
    """How many rows of logits `linear_cross_entropy` computes at a time."""
    return max(16, CHUNK_LOGITS // max(classes, 1))


def _launch_forward(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    keep_lse: bool,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    lse = logits.new_empty(rows if keep_lse else 0, dtype=torch.float32)
    predictions = logits.new_empty(rows if predict else 0, dtype=torch.int64)
    block, num_warps = cross_entropy_config(classes)
    launch(
        cross_entropy_kernel,
        (rows,),
        *(logits, target.contiguous(), class_weight, _sum(class_weight)),
        *(None if token_weight is None else token_weight.contiguous(), losses),
        *(lse if keep_lse else None, predictions if predict else None),
        *(logits.stride(0), classes, ignore_index, label_smoothing, z_loss, softcap or None),
        BLOCK=block,
        num_warps=num_warps,
    )
    return losses, lse, predictions


def losses_and_gradient(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    predict: bool,
) -> tuple[Tensor, Tensor]:
    """(ℓ, predictions) of one chunk of logits; with `token_weight`, ∂(Σ token_weight · ℓ)/∂x overwrites the logits."""
    losses, _, predictions = _launch_forward(
        logits, target, token_weight, class_weight, ignore_index, label_smoothing, z_loss, softcap, False, predict
    )
    return losses, predictions


def forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ℓ, lse, predictions) of logits (rows, classes) with unit stride along a row."""
    return _launch_forward(
        logits, target, None, class_weight, ignore_index, label_smoothing, z_loss, softcap, True, predict
    )


def backward(
    grad_losses: Tensor,
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace: bool,
) -> Tensor:
    """∂L/∂x in the dtype of the logits, which it overwrites if `inplace`."""
    rows, classes = logits.shape
    gradient = logits if inplace else logits.new_empty(rows, classes)
    block, num_warps = cross_entropy_config(classes)
    launch(
        cross_entropy_backward_kernel,
        (rows, triton.cdiv(classes, block)),
        *(logits, lse, target.contiguous(), class_weight, _sum(class_weight), grad_losses.contiguous(), gradient),
        *(logits.stride(0), gradient.stride(0), classes, ignore_index, label_smoothing, z_loss, softcap or None),
        BLOCK=block,
        num_warps=num_warps,
    )
    return gradient


def _sum(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else class_weight.sum(dtype=torch.float32)


def explain(classes: int) -> list[str]:
    """The chunks and blocks of logits over this many classes."""
    block, num_warps = cross_entropy_config(classes)
    return [
        f"a program takes a row, {block} classes a step, {num_warps} warps",
        f"linear_cross_entropy: {chunk_rows(classes)} rows of logits at a time",
    ]
