"""Linear projection and cross entropy in one: the logits exist for a chunk of tokens at a time only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import checks
from fastattn.backend import device_guard, eager_on_cpu, implementation
from fastattn.eager.loss import definition
from fastattn.eager.products import emulates, fuses, product
from fastattn.loss_rules import IGNORE_INDEX, LossRules
from fastattn.ops.library import call, define, differentiate, in_batch, needs_composite, observed
from fastattn.ops.loss import check_options, check_target_range, check_targets, counted
from fastattn.replay import replay

ROW_MULTIPLE = 64  # rows of logits start at whole cache lines, which matrix products and kernels read faster


@overload
def linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, *,
    bias: Tensor | None = ..., class_weight: Tensor | None = ..., ignore_index: int = ..., label_smoothing: float = ...,
    z_loss: float = ..., softcap: float | None = ..., reduction: str = ..., return_predictions: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, *,
    bias: Tensor | None = ..., class_weight: Tensor | None = ..., ignore_index: int = ..., label_smoothing: float = ...,
    z_loss: float = ..., softcap: float | None = ..., reduction: str = ..., return_predictions: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_predictions: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy` of the logits input · weightᵀ + bias, without ever holding all of them.

    The loss and its options are those of `fastattn.cross_entropy`. With "mean" and "sum" the forward computes the
    gradients too, chunk by chunk, and keeps only them; with "none" the backward computes the logits again. The gradient
    of the weight accumulates in fp32 and is rounded once, to the weight's own dtype; under autocast the products alone
    are taken in autocast's dtype. The host never waits for the device.

    On top of the weight's gradient in fp32 and the input's, a call needs one chunk of logits: 8 to 32 MB on a CPU. A CPU without
    instructions for the 16-bit dtype multiplies an fp32 copy of the weight.

    Args:
        input: (..., features), fp32, fp16 or bf16.
        weight: (classes, features), dtype of `input` (under autocast, any).
        target: (...), int64: the class of each token, or `ignore_index`.
        bias: (classes,), or None; dtype of `input` (under autocast, any).
        class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, return_predictions: see
            `fastattn.cross_entropy`.

    Returns:
        fp32: a scalar, or with "none" the shape of `target`; with `return_predictions`, (that, predictions).

    Raises:
        TypeError: dtypes that are not supported or differ, an option that is no number.
        ValueError: shapes that do not match, options out of range, targets out of range (CPU).

    Example:
        >>> linear_cross_entropy(torch.zeros(3, 4), torch.zeros(10, 4), torch.tensor([1, 2, 3]))
        tensor(2.3026)
    """
    _check(input, weight, target, bias)
    rules = check_options(weight.shape[0], reduction, class_weight, ignore_index, label_smoothing, z_loss, softcap)
    checks.check_same_device(input=input, weight=weight, target=target, bias=bias, class_weight=class_weight)
    x, labels = input.reshape(math.prod(target.shape), weight.shape[1]), target.reshape(-1)
    token_weight = (labels != rules.ignore_index).float()
    if reduction == "mean":
        count = counted(labels, rules)
        token_weight = token_weight / torch.where(count != 0, count, 1.0)
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if checks.autocasts(input.device) else input.dtype
    if needs_composite(x, weight, bias, labels):
        logits = _logits(x, weight, bias, dtype)
        losses, predictions = definition(logits, labels, rules), logits.argmax(1)
        total = (losses * token_weight).sum()
    else:
        # (a traced graph is used with gradients and without)
        now = torch.is_grad_enabled() and reduction != "none" and not torch.jit.is_tracing()
        needs = [now and t is not None and t.requires_grad for t in (x, weight, bias)]
        tensors = (x, weight, bias, token_weight)
        total, losses, predictions, *_ = call(
            linear_cross_entropy_op, *tensors, labels, *rules, dtype, return_predictions, *needs
        )
    loss = losses.view(target.shape).clone() if reduction == "none" else total  # the backward keeps the losses
    loss = torch.where(count != 0, loss, torch.nan) if reduction == "mean" else loss
    return (loss, predictions.view(target.shape)) if return_predictions else loss


def _check(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    checks.check_tensor("input", input)
    same = checks.FLOAT_DTYPES if checks.autocasts(input.device) else (input.dtype,)
    checks.check_tensor("weight", weight, same)
    checks.check_rank("weight", weight, 2, "(classes, features)")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have shape (..., {weight.shape[1]}) (features), got {tuple(input.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least 1 class, got shape {tuple(weight.shape)}")
    check_targets(target, tuple(input.shape[:-1]), "input without its last dimension")
    if bias is not None:
        checks.check_tensor("bias", bias, same)
        checks.check_shape("bias", bias, (weight.shape[0],), "classes")


@checks.without_autocast
def _logits(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _chunk(x: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    """X Wᵀ + b, in `room` unless a faster way brings its own memory."""
    if x.dtype == torch.float32 and fuses(x, weight):
        return product(x, weight, bias)
    return torch.mm(x, weight.t(), out=room) if bias is None else torch.addmm(bias, x, weight.t(), out=room)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weight: Tensor,
    target: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(Σ token_weight · ℓ, ℓ, predictions, and of the first by input, weight and bias where `needs` says so).

    16-bit products are of gradients relative to the largest token weight, which the fp32 sums are multiplied with before they are
    rounded. In fp16, where a chunk's sum over its rows may overflow, it is their mean.
    """
    rules, (dtype, predict, *needs) = LossRules(*rest[:5]), rest[5:]
    rows, classes = input.shape[0], weight.shape[0]
    check_target_range(target, rules.ignore_index, classes)
    losses = input.new_empty(rows, dtype=torch.float32)
    predictions = input.new_empty(rows if predict else 0, dtype=torch.int64)
    grad_input = input.new_empty(input.shape if needs[0] else 0)
    new = weight.new_empty if rows else weight.new_zeros  # the first chunk overwrites
    grad_weight = new(weight.shape if needs[1] else 0, dtype=torch.float32)
    grad_bias = weight.new_zeros(classes if needs[2] else 0, dtype=torch.float32)
    x, w, b = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if input.is_cpu and eager_on_cpu() and emulates(dtype):
        x, w, b, dtype = x.float(), w.float(), None if b is None else b.float(), torch.float32
    unit = _largest(token_weight) if dtype != torch.float32 and rows and any(needs) else None
    relative = token_weight if unit is None else token_weight / unit
    with device_guard(input.device):
        launcher = implementation("loss", input.device)
        step = min(launcher.chunk_rows(classes), rows)
        buffer = x.new_empty(step, -(-classes // ROW_MULTIPLE) * ROW_MULTIPLE)
        buffer[:, classes:].zero_()  # PyTorch's bf16 product on a CPU reads beyond such a row, and NaN · 0 is NaN
        part = x.new_empty(grad_weight.shape if dtype != torch.float32 else 0)
        mean = 1 << step.bit_length() if dtype == torch.float16 else 1
        for start in range(0, rows, max(step, 1)):
            chunk = slice(start, min(start + step, rows))
            logits = _chunk(x[chunk], w, b, buffer[: chunk.stop - start, :classes])
            scale = relative[chunk] if any(needs) else None
            losses[chunk], best = launcher.losses_and_gradient(logits, target[chunk], scale, rules, predict)
            if predict:
                predictions[chunk] = best
            if needs[0]:
                of_rows = launcher.times_weight(logits, w)
                grad_input[chunk] = of_rows if unit is None else of_rows.float().mul_(unit)
            if needs[1] and dtype == torch.float32:
                torch.addmm(grad_weight, logits.t(), x[chunk], beta=start > 0, out=grad_weight)
            elif needs[1]:
                part = torch.addmm(part, logits.t(), x[chunk], beta=0, alpha=1 / mean, out=part)
                launcher.add_to(grad_weight, part) if start else grad_weight.copy_(part)
            if needs[2]:
                grad_bias += logits.sum(0, dtype=torch.float32)
            del logits  # its memory may be the next chunk's
    if unit is not None:
        grad_weight.mul_(unit * mean)
        grad_bias.mul_(unit)
    grad_bias = grad_bias if bias is None else grad_bias.to(bias.dtype)
    total = (losses * token_weight).sum()
    return total, losses, predictions, grad_input, grad_weight.to(weight.dtype), grad_bias


def _largest(token_weight: Tensor) -> Tensor:
    """The largest absolute value, or 1 where all are 0."""
    most = token_weight.abs().amax()
    return torch.where(most > 0, most, 1.0)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    rows, (predict, *needs) = input.shape[0], rest[-4:]
    return (
        input.new_empty((), dtype=torch.float32),
        input.new_empty(rows, dtype=torch.float32),
        input.new_empty(rows if predict else 0, dtype=torch.int64),
        input.new_empty(input.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=torch.float32 if bias is None else bias.dtype),
    )


linear_cross_entropy_op = define(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor token_weight, Tensor target, "
    "Tensor? class_weight, int ignore_index, float label_smoothing, float z_loss, float softcap, ScalarType dtype, "
    "bool predict, bool need_input, bool need_weight, bool need_bias) "
    "-> (Tensor total, Tensor losses, Tensor predictions, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _forward,
    _fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Of the total by the gradients that the op returned; of the losses by the op itself, with other weights."""
    of_total, of_losses, _, *of_gradients = grad_outputs
    tensors, (token_weight, target, *rules, dtype, _), computed = arguments[:3], arguments[3:-3], arguments[-3:]
    _, losses, _, *gradients = outputs
    wanted = list(needs[:3])
    grads: list[Tensor | None] = [None] * 4
    if of_total is not None and all(have or not want for have, want in zip(computed, wanted)):
        grads[:3] = [_scaled(g, of_total) if want else None for g, want in zip(gradients, wanted)]
    elif of_total is not None:
        of_losses = of_total * token_weight if of_losses is None else of_losses + of_total * token_weight
    if of_total is not None and needs[3]:
        grads[3] = of_total * losses
    if of_losses is not None:
        _, _, _, *again = call(linear_cross_entropy_op, *tensors, of_losses, target, *rules, dtype, False, *wanted)
        grads[:3] = [_sum(g, a if want else None) for g, a, want in zip(grads, again, wanted)]
    if any(g is not None for g in of_gradients):

        def total(x: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> tuple[Tensor]:
            return ((definition(_logits(x, w, b, dtype), target, LossRules(*rules)) * t).sum(),)

        one = losses.new_ones(())
        _, second = replay(total, [*computed, False], [one], [*tensors, token_weight], [*of_gradients, None])
        grads = [_sum(g, s) for g, s in zip(grads, second)]
    return [g if need else None for g, need in zip(grads, needs)]


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """factor · gradient; where this is its last use, in its own memory: the weight's gradient is the largest tensor here."""
    factor = factor.to(gradient.dtype)
    # (in this order: while a compiler looks on, there is no graph task to ask)
    shared = torch.is_grad_enabled() or observed((gradient,)) or in_batch()
    if shared or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    return gradient if gradient.is_cpu and factor.item() == 1.0 else gradient.mul_(factor)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


differentiate(linear_cross_entropy_op, _gradient, keep_outputs=(1, 3, 4, 5))


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options).arguments
    return implementation("loss", given["input"].device).explain(given["weight"].shape[0], projected=True)
