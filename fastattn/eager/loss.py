"""Cross entropy in plain PyTorch: the differentiable definition, and the CPU backend.

The launchers have the signatures of `fastattn/kernels/loss.py`; the equations stand there. They take some rows at a time,
which stay in the cache while the passes over them are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.eager.products import product_with_columns
from fastattn.eager.row_blocks import row_blocks
from fastattn.loss_rules import LossRules

BLOCK_NUMBERS = 1 << 20  # logits of a block of rows: 4 MB of fp32, few enough parallel regions where cores are shared
ADDED_NUMBERS = 1 << 20  # of a block of a sum: its copy stays near the cores
CHUNK_ROWS = 512  # rows of a chunk: enough to keep the matrix products busy, if the chunk's logits are
LEAST_PROBABILITY = 1e-25  # above it P has all its digits in fp32
PRODUCT_ROWS = 256  # rows of its gradient that are multiplied with the weight at a time
LEAST_CHUNK, LARGEST_CHUNK = 1 << 21, 1 << 23  # logits of a chunk: 8 to 32 MB of fp32


def definition(logits: Tensor, target: Tensor, rules: LossRules) -> Tensor:
    """ℓ with all the temporaries that automatic differentiation needs; logits (rows, classes), target and ℓ (rows,)."""
    z = _capped(logits.float(), rules.softcap)
    weight = None if rules.class_weight is None else rules.class_weight.float()
    losses = F.cross_entropy(z, target, weight, None, rules.ignore_index, None, "none", rules.label_smoothing)
    if not rules.z_loss:
        return losses
    return losses + rules.z_loss * torch.where(target != rules.ignore_index, torch.logsumexp(z, 1).square(), 0.0)


def chunk_rows(classes: int) -> int:
    """How many rows of logits `linear_cross_entropy` computes at a time."""
    classes = max(classes, 1)
    return max(16, min(max(CHUNK_ROWS, LEAST_CHUNK // classes), LARGEST_CHUNK // classes))


def losses_and_gradient(
    logits: Tensor, target: Tensor, token_weight: Tensor | None, rules: LossRules, predict: bool
) -> tuple[Tensor, Tensor]:
    """(ℓ, predictions) of one chunk of logits; with `token_weight`, ∂(Σ token_weight · ℓ)/∂x overwrites the logits."""
    losses, _, predictions = _pass(logits, target, token_weight, rules, predict)
    return losses, predictions


def forward(logits: Tensor, target: Tensor, rules: LossRules, predict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(ℓ, lse, predictions) of logits (rows, classes)."""
    return _pass(logits, target, None, rules, predict)


def _pass(
    logits: Tensor, target: Tensor, token_weight: Tensor | None, rules: LossRules, predict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(ℓ, lse, predictions), block by block; with `token_weight` the gradient overwrites the logits."""
    rows, classes = logits.shape
    losses, lse = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    predictions = logits.new_empty(rows if predict else 0, dtype=torch.int64)
    for block in row_blocks(rows, classes, BLOCK_NUMBERS):
        z = _capped(logits[block].float(), rules.softcap)
        targets = _targets(target[block], classes, rules)
        p, of_rows = (None, _lse(z, targets.index)) if token_weight is None else _softmax(z, targets.index)
        losses[block], lse[block] = _losses(z, of_rows, targets, rules), of_rows
        if predict:
            predictions[block] = z.argmax(1)
        if p is not None and token_weight is not None:
            _gradient(logits[block], token_weight[block], p, z, of_rows, targets, rules)
    return losses, lse, predictions


def backward(
    grad_losses: Tensor, logits: Tensor, lse: Tensor, target: Tensor, rules: LossRules, inplace: bool
) -> Tensor:
    """∂L/∂x in the dtype of the logits, which it overwrites if `inplace`."""
    rows, classes = logits.shape
    gradient = logits if inplace else logits.new_empty(rows, classes)
    for block in row_blocks(rows, classes, BLOCK_NUMBERS):
        z = _capped(logits[block].float(), rules.softcap)
        targets = _targets(target[block], classes, rules)
        _gradient(gradient[block], grad_losses[block], z.softmax(1), z, lse[block], targets, rules)
    return gradient


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


@dataclass(frozen=True)
class _Targets:
    """What a block of rows is asked for.

    Attributes:
        valid: bool (rows,), whether the target counts.
        index: int64 (rows, 1), the target; one that is ignored counts as class 0.
        weight: (1 - ε) w_y of the rows as a column.
        total: a of the rows as a column, or 1.
    """

    valid: Tensor
    index: Tensor
    weight: Tensor
    total: Tensor | float


def _targets(target: Tensor, classes: int, rules: LossRules) -> _Targets:
    valid, smoothing, class_weight = target != rules.ignore_index, rules.label_smoothing, rules.class_weight
    index = torch.where(valid, target, 0)[:, None]
    if class_weight is None:
        return _Targets(valid, index, torch.full_like(index, 1.0 - smoothing, dtype=torch.float32), 1.0)
    weight = (1.0 - smoothing) * class_weight.float()[index]
    return _Targets(valid, index, weight, weight + smoothing * class_weight.sum(dtype=torch.float32) / classes)


def _softmax(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(P, lse) of a block of rows. PyTorch's softmax is one pass, and lse = z_v - log P_v of any class v: of the target's where
    its P can be told from 0, else of the largest's, which takes two more passes.
    """
    p = z.softmax(1)
    of_target = p.gather(1, index)
    if not (z.is_cpu and bool((of_target > LEAST_PROBABILITY).all())):  # (a GPU would have to be waited for)
        return p, z.amax(1) - p.amax(1).log_()
    return p, (z.gather(1, index) - of_target.log_())[:, 0]


def _lse(z: Tensor, index: Tensor) -> Tensor:
    """lse of a block of rows, found in the same way from log P (`torch.logsumexp` makes five passes)."""
    log_p = z.log_softmax(1)
    of_target = log_p.gather(1, index)
    if not (z.is_cpu and bool((of_target > math.log(LEAST_PROBABILITY)).all())):
        return z.amax(1) - log_p.amax(1)
    return (z.gather(1, index) - of_target)[:, 0]


def _losses(z: Tensor, lse: Tensor, targets: _Targets, rules: LossRules) -> Tensor:
    """ℓ of a block of rows."""
    lse, weight = lse[:, None], rules.class_weight
    losses = targets.total * lse - targets.weight * z.gather(1, targets.index)
    if rules.z_loss:
        losses += rules.z_loss * lse.square()
    if rules.label_smoothing:
        mean = z.mean(1, keepdim=True) if weight is None else (z @ weight.float())[:, None] / z.shape[1]
        losses -= rules.label_smoothing * mean
    return torch.where(targets.valid, losses[:, 0], 0.0)


def _gradient(
    out: Tensor, grad_losses: Tensor, p: Tensor, z: Tensor, lse: Tensor, targets: _Targets, rules: LossRules
) -> None:
    """Writes ∂L/∂x of a block of rows to `out`, which may be z's memory where there is no softcap; in fp32 until then, over P."""
    scale = torch.where(targets.valid, grad_losses, 0.0)[:, None]
    factor = scale * (targets.total + 2.0 * rules.z_loss * lse[:, None]) if rules.z_loss else scale * targets.total
    gradient = torch.mul(p, factor, out=out if out.dtype == p.dtype else p)
    if rules.label_smoothing:
        smooth, weight = rules.label_smoothing / z.shape[1], rules.class_weight
        gradient -= scale * smooth if weight is None else scale * (smooth * weight.float())
    gradient.scatter_add_(1, targets.index, -scale * targets.weight)
    if rules.softcap:
        gradient.mul_(1.0 - (z / rules.softcap).square_())
    if gradient is not out:
        out.copy_(gradient)


def times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂x · W of a chunk of logits: (rows, classes) and (classes, in).

    A few rows at a time in bf16: with 512 or 1024 of them and many classes oneDNN falls to 60 % of its rate at 256.
    """
    if gradient.dtype != torch.bfloat16:
        return product_with_columns(gradient, weight)
    return torch.cat([rows @ weight for rows in gradient.split(PRODUCT_ROWS)])


def add_to(total: Tensor, part: Tensor) -> None:
    """total += part. PyTorch's sum of two dtypes makes a copy of the whole first."""
    if part.dtype == total.dtype:
        total += part
        return
    flat, flat_part = total.view(-1), part.view(-1)
    room = flat.new_empty(min(ADDED_NUMBERS, len(flat)))
    for start in range(0, len(flat), len(room)):
        block = flat[start : start + len(room)]
        block += room[: len(block)].copy_(flat_part[start : start + len(room)])


def explain(classes: int, projected: bool) -> list[str]:
    """The chunks of logits over this many classes where they are the result of a projection, in words."""
    return [
        f"PyTorch, up to {chunk_rows(classes)} rows of logits at a time"
        if projected
        else "PyTorch, a block of rows after the other"
    ]
