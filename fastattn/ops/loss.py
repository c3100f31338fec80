"""Linear projection and cross entropy in one: the logits exist for a chunk of tokens at a time only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backend import device_guard, implementation
from fastattn.eager.loss import definition
from fastattn.ops import checks
from fastattn.ops.library import call, define, differentiate, needs_composite
from fastattn.replay import replay

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the logits input · weightᵀ + bias, without ever holding all of them.

    The meaning is that of `torch.nn.functional.cross_entropy(linear(input, weight, bias), target, ...)` over the last
    dimension; label smoothing is that of Szegedy et al., 2016 (https://arxiv.org/abs/1512.00567). With "mean" and "sum"
    the forward computes the gradients too, chunk by chunk, and keeps only them; with "none" the backward computes the
    logits again. The gradient of the weight accumulates in fp32. Nothing waits for the device.

    Args:
        input: (..., features), fp32, fp16 or bf16.
        weight: (classes, features), dtype of `input` (autocast casts both).
        target: (...), int64: the class of each token, or `ignore_index`. On the CPU other values are an error; on a GPU,
            where a check would wait, they give a meaningless but finite loss.
        bias: (classes,), or None.
        ignore_index: tokens with this target have loss 0, no gradient, and are not counted by "mean".
        label_smoothing: in [0, 1]: the share of the target that is spread evenly over the classes.
        reduction: "mean" (over the tokens that are not ignored; NaN if there is none), "sum" or "none".

    Returns:
        fp32: a scalar, or with "none" the shape of `target`.

    Raises:
        TypeError: dtypes that are not supported or differ.
        ValueError: shapes that do not match, another reduction, targets out of range (CPU).

    Example:
        >>> linear_cross_entropy(torch.zeros(3, 4), torch.zeros(10, 4), torch.tensor([1, 2, 3]))
        tensor(2.3026)
    """
    input, weight, bias = checks.autocast(input, weight, bias)  # type: ignore[assignment]
    _check(input, weight, target, bias, label_smoothing, reduction)
    x, labels = input.reshape(math.prod(target.shape), weight.shape[1]), target.reshape(-1)
    token_weight = (labels != ignore_index).float()
    tensors, constants = (x, weight, bias, token_weight, labels), (ignore_index, label_smoothing)
    if needs_composite(*tensors):
        total, losses = definition(*tensors, *constants)
    else:
        now = torch.is_grad_enabled() and reduction != "none"
        needs = [now and t is not None and t.requires_grad for t in (x, weight, bias)]
        total, losses, *_ = call(LINEAR_CROSS_ENTROPY, *tensors, *constants, needs)
    if reduction == "none":
        return losses.view(target.shape)
    count = token_weight.sum()
    return total if reduction == "sum" else torch.where(count > 0, total / count.clamp(min=1.0), torch.nan)


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    checks.check_tensor("input", input)
    checks.check_tensor("weight", weight, (input.dtype,))
    checks.check_tensor("target", target, (torch.int64,))
    checks.check_rank("weight", weight, 2, "(classes, features)")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have shape (..., {weight.shape[1]}) (features), got {tuple(input.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least 1 class, got shape {tuple(weight.shape)}")
    checks.check_shape("target", target, tuple(input.shape[:-1]), "input without its last dimension")
    if bias is not None:
        checks.check_tensor("bias", bias, (input.dtype,))
        checks.check_shape("bias", bias, (weight.shape[0],), "classes")
    checks.check_same_device(input=input, weight=weight, target=target, bias=bias)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    classes = weight.shape[0]
    if target.device.type == "cpu":
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            raise ValueError(
                f"target must be in [0, {classes}) or ignore_index = {ignore_index}, got {wrong[0].item()}"
            )
    losses = input.new_empty(input.shape[0], dtype=torch.float32)
    grad_input = input.new_empty(input.shape if needs[0] else 0)
    grad_weight = weight.new_zeros(weight.shape if needs[1] else 0, dtype=torch.float32)
    grad_bias = weight.new_zeros(classes if needs[2] else 0, dtype=torch.float32)
    with device_guard(input.device):
        launcher = implementation("loss", input.device)
        step = launcher.chunk_rows(classes)
        for start in range(0, input.shape[0], step):
            chunk = slice(start, start + step)
            x = input[chunk]
            logits = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            losses[chunk], gradient = launcher.losses_and_gradient(
                logits, target[chunk], token_weight[chunk], ignore_index, label_smoothing, any(needs)
            )
            if needs[0]:
                grad_input[chunk] = torch.mm(gradient, weight)
            if needs[1] and input.dtype == torch.float32:
                grad_weight.addmm_(gradient.t(), x)
            elif needs[1]:
                grad_weight += torch.mm(gradient.t(), x)
            if needs[2]:
                grad_bias += gradient.sum(0, dtype=torch.float32)
    total = (losses * token_weight).sum()
    return total, losses, grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        input.new_empty((), dtype=torch.float32),
        input.new_empty(input.shape[0], dtype=torch.float32),
        input.new_empty(input.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


LINEAR_CROSS_ENTROPY = define(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor token_weight, Tensor target, "
    "int ignore_index, float label_smoothing, bool[] needs) "
    "-> (Tensor total, Tensor losses, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _forward,
    _fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Of the total by the gradients that the op returned; of the losses by the op itself, with other weights."""
    of_total, of_losses, *of_gradients = grad_outputs
    *tensors, token_weight, target, ignore_index, label_smoothing, computed = arguments
    _, losses, *gradients = outputs
    wanted = list(needs[:3])
    grads: list[Tensor | None] = [None] * 4
    if of_total is not None and all(have or not want for have, want in zip(computed, wanted)):
        grads[:3] = [g * of_total.to(g.dtype) if want else None for g, want in zip(gradients, wanted)]
    elif of_total is not None:
        of_losses = of_total * token_weight if of_losses is None else of_losses + of_total * token_weight
    if of_total is not None and needs[3]:
        grads[3] = of_total * losses
    if of_losses is not None:
        _, _, *again = call(LINEAR_CROSS_ENTROPY, *tensors, of_losses, target, ignore_index, label_smoothing, wanted)
        grads[:3] = [_sum(g, a if want else None) for g, a, want in zip(grads, again, wanted)]
    if any(g is not None for g in of_gradients):

        def total(x: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> tuple[Tensor]:
            return (definition(x, w, b, t, target, ignore_index, label_smoothing)[0],)

        one = losses.new_ones(())
        _, second = replay(total, [*computed, False], [one], [*tensors, token_weight], [*of_gradients, None])
        grads = [_sum(g, s) for g, s in zip(grads, second)]
    return [g if need else None for g, need in zip(grads, needs)] + [None] * 4


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


differentiate(LINEAR_CROSS_ENTROPY, _gradient, keep_outputs=(1, 2, 3, 4))


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options).arguments
    return [implementation("loss", given["input"].device).explain(given["weight"].shape[0])]
