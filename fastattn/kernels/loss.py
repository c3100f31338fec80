"""Cross entropy of logits in Triton, forward and backward, on its own and as a step of `linear_cross_entropy`.

For a row of logits x over V classes, with z = c·tanh(x / c) under a softcap c (else z = x), target y, smoothing ε, class
weights w (or 1) with sum W, and z-loss λ:

    ℓ = a·lse + λ·lse² - (1 - ε) w_y z_y - (ε / V) Σ w_v z_v,    lse = log Σ exp(z),   a = (1 - ε) w_y + ε W / V
    ∂ℓ/∂x_v = (1 - (z_v / c)²) · ((a + 2 λ lse) exp(z_v - lse) - (1 - ε) w_y [v = y] - (ε / V) w_v)

A row whose target is `ignore_index` has ℓ = 0 and no gradient. One program takes a row and reads it once for the loss
and once more for the gradient, if that is wanted at once. The classes that one thread holds follow a maximum and a sum of
exponentials of their own; only at the end do threads talk to each other. Exponentials are powers of two of z log₂e.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.config import CHUNK_LOGITS, cross_entropy_config
from fastattn.kernels.launch import contiguous, current_target, launch
from fastattn.kernels.masks import LN2, LOG2E, LOWEST, capped_score, capped_score_derivative
from fastattn.loss_rules import LossRules

START = tl.constexpr(LOWEST.value / 2)  # of a running maximum: times log₂e, still finite


@triton.jit
def aligned_start(row, stride, VECTOR: tl.constexpr):
    """(offset, shift): the last multiple of VECTOR up to where the row starts, and how far before the row it lies.

    Blocks count from there, so that a thread reads 16 bytes at a time whatever the number of classes.
    """
    offset = row * stride // VECTOR * VECTOR
    return offset, (row * stride - offset).to(tl.int32)


@triton.jit
def load_logits(POINTERS, column, classes, softcap, EDGE: tl.constexpr):
    """z of a block of classes in fp32. EDGE: some columns may be none, and are -inf."""
    if EDGE:
        inside = (column >= 0) & (column < classes)
        z = tl.load(POINTERS, mask=inside, other=0.0).to(tl.float32)
        if softcap is not None:
            z = capped_score(z, 1.0, softcap, True)
        z = tl.where(inside, z, -float("inf"))
    else:
        z = tl.load(POINTERS).to(tl.float32)
        if softcap is not None:
            z = capped_score(z, 1.0, softcap, True)
    return z


@triton.jit
def class_weights(CLASS_WEIGHT, column, classes):
    """w of a block of classes in fp32, 0 for what is no class."""
    return tl.load(CLASS_WEIGHT + column, mask=(column >= 0) & (column < classes), other=0.0).to(tl.float32)


@triton.jit
def row_constants(TARGET, CLASS_WEIGHT, WEIGHT_SUM, row, classes, label_smoothing):
    """(y, (1 - ε) w_y, a, ε / V); a target that is no class has weight 0 where there are weights."""
    target = tl.load(TARGET + row)
    w_target = 1.0
    mean = 1.0
    if CLASS_WEIGHT is not None:
        known = (target >= 0) & (target < classes)
        w_target = tl.load(CLASS_WEIGHT + target, mask=known, other=0.0).to(tl.float32)
        mean = tl.load(WEIGHT_SUM) / classes
    smooth = 0.0
    if label_smoothing is not None:
        smooth = label_smoothing
    w_target = (1.0 - smooth) * w_target
    return target, w_target, w_target + smooth * mean, smooth / classes


@triton.jit
def gradient_constants(valid, a, z_loss, lse):
    """(a + 2 λ lse, lse); of an ignored row (0, ∞), with which its gradient is 0 even where its lse is NaN."""
    return tl.where(valid, a + 2.0 * z_loss * lse, 0.0), tl.where(valid, lse, float("inf"))


@triton.jit
def block_columns(GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[GROUPS, LANES, VECTOR]: a block's columns; a thread has VECTOR neighbours (16 bytes) of each group."""
    group = tl.arange(0, GROUPS)[:, None, None] * (LANES * VECTOR)
    return group + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def base_2(x):
    """x log₂e, rounded: as a product, compilers make it part of the subtraction that follows, exact, and what the maximum lost to
    rounding becomes a factor of the sum with every block that leaves the maximum as it was."""
    return tl.fma(x, LOG2E, 0.0)


@triton.jit
def accumulate(
    m, l, found, sums,  # [LANES]
    LOGITS, CLASS_WEIGHT,  # one row, from where `aligned_start` says; (classes,), or None
    start, shift, classes, label_smoothing, softcap,
    GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds a block: each of LANES has its maximum m, l = Σ 2^(z log₂e - m log₂e), the block m was found in, and Σ w z."""
    local = block_columns(GROUPS, LANES, VECTOR)
    column = start - shift + local
    # [GROUPS, LANES, VECTOR]
    z = load_logits(LOGITS + start + local, column, classes, softcap, EDGE)
    larger = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    found = tl.where(larger > m, start, found)
    reference = base_2(larger)
    powers = tl.exp2(tl.fma(z, LOG2E, -reference[None, :, None]))
    l = l * tl.exp2(base_2(m) - reference) + tl.sum(tl.sum(powers, 2), 0)
    if label_smoothing is not None:
        weighted = z
        if CLASS_WEIGHT is not None:
            weighted = z * class_weights(CLASS_WEIGHT, column, classes)
        if EDGE:
            weighted = tl.where((column >= 0) & (column < classes), weighted, 0.0)
        sums += tl.sum(tl.sum(weighted, 2), 0)
    return larger, l, found, sums


@triton.jit
def write_gradient(
    LOGITS, OUT, CLASS_WEIGHT,  # one row each, from where `aligned_start` says; (classes,), or None
    start, shift, target, lse, scale, w_target, factor, spread, classes, label_smoothing, softcap,
    GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """scale · ∂ℓ/∂x of one block, with factor = a + 2 λ lse; OUT may be LOGITS."""
    local = block_columns(GROUPS, LANES, VECTOR)
    column = start - shift + local
    # [GROUPS, LANES, VECTOR]
    z = load_logits(LOGITS + start + local, column, classes, softcap, EDGE)
    gradient = scale * factor * tl.exp2((z - lse) * LOG2E)
    if label_smoothing is not None:
        if CLASS_WEIGHT is not None:
            gradient -= scale * spread * class_weights(CLASS_WEIGHT, column, classes)
        else:
            gradient -= scale * spread
    gradient = tl.where(local == target.to(tl.int32) + shift - start, gradient - scale * w_target, gradient)
    if softcap is not None:
        gradient *= capped_score_derivative(z, softcap)
    gradient = gradient.to(OUT.dtype.element_ty)
    if EDGE:
        tl.store(OUT + start + local, gradient, mask=(column >= 0) & (column < classes))
    else:
        tl.store(OUT + start + local, gradient)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    LOGITS,  # (rows, classes), unit stride along a row
    TARGET,  # int64 (rows,)
    CLASS_WEIGHT, WEIGHT_SUM,  # (classes,) and fp32 (), or None
    TOKEN_WEIGHT,  # (rows,), or None
    LOSSES, LSE,  # fp32 (rows,); LSE may be None
    PREDICTIONS,  # int64 (rows,), or None
    stride_row, classes, ignore_index, label_smoothing, z_loss, softcap,
    GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: ℓ of a row; with TOKEN_WEIGHT, that times ∂ℓ/∂x is written over the logits."""
    BLOCK: tl.constexpr = GROUPS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    target, w_target, factor, spread = row_constants(TARGET, CLASS_WEIGHT, WEIGHT_SUM, row, classes, label_smoothing)
    valid, is_class = target != ignore_index, (target >= 0) & (target < classes)
    z_target = tl.load(LOGITS + row * stride_row + target, mask=is_class, other=0.0).to(tl.float32)
    if softcap is not None:
        z_target = capped_score(z_target, 1.0, softcap, True)

    offset, shift = aligned_start(row, stride_row, VECTOR)
    LOGITS += offset
    end = classes + shift
    last = tl.maximum(end // BLOCK * BLOCK, BLOCK)  # the first block and the one that starts here are edges
    m, l = tl.full([LANES], START, tl.float32), tl.zeros([LANES], tl.float32)
    found, sums = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.float32)
    m, l, found, sums = accumulate(
        m, l, found, sums, LOGITS, CLASS_WEIGHT, 0, shift, classes, label_smoothing, softcap, GROUPS, LANES, VECTOR, True
    )  # fmt: skip
    for start in range(BLOCK, last, BLOCK):
        m, l, found, sums = accumulate(
            m, l, found, sums, LOGITS, CLASS_WEIGHT, start, shift, classes, label_smoothing, softcap,
            GROUPS, LANES, VECTOR, False,
        )  # fmt: skip
    if last < end:
        m, l, found, sums = accumulate(
            m, l, found, sums, LOGITS, CLASS_WEIGHT, last, shift, classes, label_smoothing, softcap,
            GROUPS, LANES, VECTOR, True,
        )  # fmt: skip
    maximum = tl.max(m, 0)
    reference = base_2(maximum)
    l = tl.sum(l * tl.exp2(base_2(m) - reference), 0)
    # l is relative to the rounded reference: what the rounding took is put back
    lse = maximum + (tl.log2(l) - tl.fma(maximum, LOG2E, -reference)) * LN2
    loss = factor * lse + z_loss * lse * lse - w_target * z_target - spread * tl.sum(sums, 0)
    tl.store(LOSSES + row, tl.where(valid, loss, 0.0))
    if LSE is not None:
        tl.store(LSE + row, lse)
    if PREDICTIONS is not None:  # the first of the largest, in the first block that has it
        start = tl.min(tl.where(m == maximum, found, end), 0)
        column = start - shift + block_columns(GROUPS, LANES, VECTOR)
        z = load_logits(LOGITS + shift + column, column, classes, softcap, True)
        best = tl.min(tl.min(tl.min(tl.where(z == maximum, column, classes - 1), 2), 0), 0)
        tl.store(PREDICTIONS + row, best.to(tl.int64))
    if TOKEN_WEIGHT is not None:
        scale = tl.where(valid, tl.load(TOKEN_WEIGHT + row).to(tl.float32), 0.0)
        factor, lse = gradient_constants(valid, factor, z_loss, lse)
        write_gradient(
            LOGITS, LOGITS, CLASS_WEIGHT, 0, shift, target, lse, scale, w_target, factor, spread, classes,
            label_smoothing, softcap, GROUPS, LANES, VECTOR, True,
        )  # fmt: skip
        for start in range(BLOCK, last, BLOCK):
            write_gradient(
                LOGITS, LOGITS, CLASS_WEIGHT, start, shift, target, lse, scale, w_target, factor, spread,
                classes, label_smoothing, softcap, GROUPS, LANES, VECTOR, False,
            )  # fmt: skip
        if last < end:
            write_gradient(
                LOGITS, LOGITS, CLASS_WEIGHT, last, shift, target, lse, scale, w_target, factor, spread,
                classes, label_smoothing, softcap, GROUPS, LANES, VECTOR, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward_kernel(
    LOGITS,  # (rows, classes), unit stride along a row
    LSE,  # fp32 (rows,)
    TARGET, CLASS_WEIGHT, WEIGHT_SUM,  # as in `cross_entropy_kernel`
    GRAD_LOSSES,  # (rows,)
    GRADIENT,  # (rows, classes)
    stride_row, classes, ignore_index, label_smoothing, z_loss, softcap,
    GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program: ∂L/∂x of one block of a row; GRADIENT has the strides of LOGITS, and may be it."""
    BLOCK: tl.constexpr = GROUPS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    target, w_target, factor, spread = row_constants(TARGET, CLASS_WEIGHT, WEIGHT_SUM, row, classes, label_smoothing)
    valid = target != ignore_index
    scale = tl.where(valid, tl.load(GRAD_LOSSES + row).to(tl.float32), 0.0)
    factor, lse = gradient_constants(valid, factor, z_loss, tl.load(LSE + row))
    offset, shift = aligned_start(row, stride_row, VECTOR)
    start = tl.program_id(1) * BLOCK
    if (start > 0) & (start + BLOCK <= classes + shift):
        write_gradient(
            LOGITS + offset, GRADIENT + offset, CLASS_WEIGHT, start, shift, target, lse, scale, w_target,
            factor, spread, classes, label_smoothing, softcap, GROUPS, LANES, VECTOR, False,
        )  # fmt: skip
    else:
        write_gradient(
            LOGITS + offset, GRADIENT + offset, CLASS_WEIGHT, start, shift, target, lse, scale, w_target,
            factor, spread, classes, label_smoothing, softcap, GROUPS, LANES, VECTOR, True,
        )  # fmt: skip


def chunk_rows(classes: int) -> int:
    """How many rows of logits `linear_cross_entropy` computes at a time."""
    return max(16, CHUNK_LOGITS // max(classes, 1))


def _launch_forward(
    logits: Tensor, target: Tensor, token_weight: Tensor | None, rules: LossRules, keep_lse: bool, predict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    lse = logits.new_empty(rows if keep_lse else 0, dtype=torch.float32)
    predictions = logits.new_empty(rows if predict else 0, dtype=torch.int64)
    groups, lanes, vector, num_warps = cross_entropy_config(current_target(), classes, logits.element_size())
    weight, weight_sum = _weights(rules.class_weight)
    launch(
        cross_entropy_kernel, (rows,),
        logits, target.contiguous(), weight, weight_sum,
        contiguous(token_weight), losses, lse if keep_lse else None, predictions if predict else None,
        logits.stride(0), classes, rules.ignore_index, rules.label_smoothing or None, rules.z_loss, rules.softcap or None,
        GROUPS=groups, LANES=lanes, VECTOR=vector, num_warps=num_warps,
    )  # fmt: skip
    return losses, lse, predictions


def losses_and_gradient(
    logits: Tensor, target: Tensor, token_weight: Tensor | None, rules: LossRules, predict: bool
) -> tuple[Tensor, Tensor]:
    """(ℓ, predictions) of one chunk of logits; with `token_weight`, ∂(Σ token_weight · ℓ)/∂x overwrites the logits."""
    losses, _, predictions = _launch_forward(logits, target, token_weight, rules, False, predict)
    return losses, predictions


def forward(logits: Tensor, target: Tensor, rules: LossRules, predict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(ℓ, lse, predictions) of logits (rows, classes) with unit stride along a row."""
    return _launch_forward(logits, target, None, rules, True, predict)


def backward(
    grad_losses: Tensor, logits: Tensor, lse: Tensor, target: Tensor, rules: LossRules, inplace: bool
) -> Tensor:
    """∂L/∂x in the dtype of the logits, which are contiguous; it overwrites them if `inplace`."""
    rows, classes = logits.shape
    gradient = logits if inplace else logits.new_empty(rows, classes)
    groups, lanes, vector, num_warps = cross_entropy_config(current_target(), classes, logits.element_size())
    weight, weight_sum = _weights(rules.class_weight)
    launch(
        cross_entropy_backward_kernel, (rows, triton.cdiv(classes + vector - 1, groups * lanes * vector)),
        logits, lse, target.contiguous(), weight, weight_sum, grad_losses.contiguous(), gradient,
        classes, classes, rules.ignore_index, rules.label_smoothing or None, rules.z_loss, rules.softcap or None,
        GROUPS=groups, LANES=lanes, VECTOR=vector, num_warps=num_warps,
    )  # fmt: skip
    return gradient


def times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂x · W of a chunk of logits: (rows, classes) and (classes, in)."""
    return gradient @ weight


def add_to(total: Tensor, part: Tensor) -> None:
    """total += part, one kernel of PyTorch's."""
    total += part


def _weights(class_weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(w, W)"""
    return (None, None) if class_weight is None else (class_weight.contiguous(), class_weight.sum(dtype=torch.float32))


def explain(classes: int, projected: bool) -> list[str]:
    """The blocks of logits over this many classes, and the chunks of those that are the result of a projection."""
    groups, lanes, vector, num_warps = cross_entropy_config(current_target(), classes, 2)
    blocks = f"a program takes a row, {groups * lanes * vector} classes a step, {num_warps} warps"
    return [blocks, f"up to {chunk_rows(classes)} rows of logits at a time"] if projected else [blocks]
