"""Cross entropy of logits, and what it shares with `linear_cross_entropy`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import checks
from fastattn.backend import device_guard, implementation
from fastattn.eager.loss import definition
from fastattn.loss_rules import IGNORE_INDEX, LossRules
from fastattn.ops.library import call, define, differentiate, in_batch, needs_composite, observed
from fastattn.replay import replay

REDUCTIONS = ("mean", "sum", "none")


@overload
def cross_entropy(
    input: Tensor, target: Tensor, *,
    class_weight: Tensor | None = ..., ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ...,
    softcap: float | None = ..., reduction: str = ..., inplace: bool = ..., return_predictions: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, *,
    class_weight: Tensor | None = ..., ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ...,
    softcap: float | None = ..., reduction: str = ..., inplace: bool = ..., return_predictions: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    return_predictions: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of logits over their last dimension, in one pass over the classes, in fp32 for every dtype.

    With z = input, or softcap · tanh(input / softcap), V classes, target y, class weights w (or 1) and smoothing ε:

        ℓ = (1 - ε) w_y (lse - z_y) + (ε / V) Σ_v w_v (lse - z_v) + z_loss · lse²,    lse = log Σ_v exp(z_v)

    That is `torch.nn.functional.cross_entropy` with label smoothing (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567),
    plus z-loss (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311) and softcap (https://arxiv.org/abs/2408.00118).

    Args:
        input: (..., V), fp32, fp16 or bf16: the logits.
        target: (...), int64: the class of each token, or `ignore_index`. On the CPU other values are an error; on a GPU,
            where a check would make the host wait, they give a meaningless but finite loss.
        class_weight: (V,), fp32, fp16 or bf16, without gradient: w.
        ignore_index: tokens with this target have loss 0 and no gradient.
        label_smoothing: ε, in [0, 1]: the share of the target that is spread evenly over the classes.
        z_loss: at least 0: how much a large lse costs.
        softcap: more than 0, or None: the bound of the logits.
        reduction: "mean" (Σ ℓ / Σ w_y over the tokens that are not ignored; NaN if there is none), "sum" or "none".
        inplace: the backward writes the gradient over `input`, which saves a tensor of that size. `input` must not be a leaf;
            whatever needs its values afterwards, and a second backward, raises an error. (No effect where gradients are themselves
            differentiated, under `torch.compile`, and in transforms.)
        return_predictions: also return the class of the largest logit of each token (the first of equals), int64 (...).

    Returns:
        fp32: a scalar, or with "none" the shape of `target`; with `return_predictions`, (that, predictions).

    Raises:
        TypeError: dtypes that are not supported, an option that is no number (a tensor would get no gradient).
        ValueError: shapes that do not match, options out of range, targets out of range (CPU).

    Example:
        >>> cross_entropy(torch.zeros(3, 10), torch.tensor([1, 2, 3]))
        tensor(2.3026)
    """
    checks.check_tensor("input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input must have shape (..., classes) with at least 1 class, got {tuple(input.shape)}")
    check_targets(target, tuple(input.shape[:-1]), "input without its last dimension")
    rules = check_options(input.shape[-1], reduction, class_weight, ignore_index, label_smoothing, z_loss, softcap)
    checks.check_same_device(input=input, target=target, class_weight=class_weight)
    base = input if input._base is None else input._base
    if inplace and base.requires_grad and base.is_leaf:
        raise ValueError("inplace must be False: input is a leaf that needs a gradient, or a view of one")
    logits, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    if needs_composite(logits, labels):
        losses, predictions = definition(logits, labels, rules), logits.argmax(1)
    else:
        losses, _, predictions = call(cross_entropy_op, logits, labels, *rules, return_predictions, inplace)
    loss = reduce(losses.sum() if reduction != "none" else losses, labels, rules, reduction)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, predictions.view(target.shape)) if return_predictions else loss


def check_targets(target: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    checks.check_tensor("target", target, (torch.int64,))
    checks.check_shape("target", target, shape, meaning)


def check_options(
    classes: int,
    reduction: str,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> LossRules:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    ignore_index = checks.check_integer("ignore_index", ignore_index, None)
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index must be an int64, as the targets, got {ignore_index}")
    checks.check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    checks.check_number("z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    checks.check_softcap(softcap)
    if class_weight is not None:
        checks.check_tensor("class_weight", class_weight)
        checks.check_shape("class_weight", class_weight, (classes,), "classes")
        if class_weight.requires_grad:
            raise ValueError("class_weight must not need a gradient: it is a constant")
    return LossRules(class_weight, ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))


def check_target_range(target: Tensor, ignore_index: int, classes: int) -> None:
    """ValueError for a target that is no class, where looking does not wait for a device."""
    if target.device.type != "cpu" or not target.numel():
        return
    least, most = torch.aminmax(target)
    if least.item() >= 0 and most.item() < classes:
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise ValueError(f"target must be in [0, {classes}) or ignore_index = {ignore_index}, got {wrong[0].item()}")


def reduce(value: Tensor, target: Tensor, rules: LossRules, reduction: str) -> Tensor:
    """The losses themselves, their sum, or from that their mean, Σ ℓ / Σ w_y; NaN where no token counts, as in PyTorch."""
    if reduction != "mean":
        return value
    total = counted(target, rules)
    return torch.where(total != 0, value / torch.where(total != 0, total, 1.0), torch.nan)


def counted(target: Tensor, rules: LossRules) -> Tensor:
    """Σ w_y over the tokens that are not ignored, or their number."""
    valid, weight = target != rules.ignore_index, rules.class_weight
    if weight is None:
        return valid.sum(dtype=torch.float32)
    return torch.where(valid, weight.float()[target.clamp(0, weight.shape[0] - 1)], 0.0).sum()


def _forward(input: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rules, predict = LossRules(*rest[:5]), rest[5]
    check_target_range(target, rules.ignore_index, input.shape[1])
    with device_guard(input.device):
        return implementation("loss", input.device).forward(input.contiguous(), target, rules, predict)


def _forward_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, predict = input.shape[0], rest[-2]
    losses, lse = (input.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return losses, lse, input.new_empty(rows if predict else 0, dtype=torch.int64)


cross_entropy_op = define(
    "cross_entropy(Tensor input, Tensor target, Tensor? class_weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, bool predict, bool inplace) -> (Tensor losses, Tensor lse, Tensor predictions)",
    _forward,
    _forward_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    input, target, *rules, _, inplace = arguments
    if grad_outputs[0] is None or not needs[0]:
        return []
    tensors = (grad_outputs[0], input, outputs[1])
    if inplace and not torch.is_grad_enabled() and not observed(tensors) and not in_batch():
        gradient = _backward(*tensors, target, *rules, inplace=True)
        torch.autograd.graph.increment_version(input)  # a kernel's writes are invisible to autograd
        return [gradient.detach()]
    return [call(cross_entropy_backward_op, *tensors, target, *rules)]


def _backward(
    grad_losses: Tensor, input: Tensor, lse: Tensor, target: Tensor, *rules: Any, inplace: bool = False
) -> Tensor:
    with device_guard(input.device):
        launcher = implementation("loss", input.device)
        return launcher.backward(grad_losses, input.contiguous(), lse, target, LossRules(*rules), inplace)


def _backward_fake(grad_losses: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(input.shape)


cross_entropy_backward_op = define(
    "cross_entropy_backward(Tensor grad_losses, Tensor input, Tensor lse, Tensor target, Tensor? class_weight, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor",
    _backward,
    _backward_fake,
)


def _second_gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad_losses, input, _, target, *rules = arguments

    def losses(x: Tensor) -> tuple[Tensor]:
        return (definition(x, target, LossRules(*rules)),)

    of_grads, of_input = replay(losses, [True], [grad_losses], [input], [grad_outputs[0]])
    return [*of_grads, *of_input]


differentiate(cross_entropy_op, _gradient, keep_outputs=(1,))
differentiate(cross_entropy_backward_op, _second_gradient)


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options).arguments
    return implementation("loss", given["input"].device).explain(given["input"].shape[-1], projected=False)
