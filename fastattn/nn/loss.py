"""Cross entropy as modules: torch's constructors and parameters, over our ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.loss_rules import IGNORE_INDEX
from fastattn.nn.plain import is_plain_linear
from fastattn.ops.linear_loss import linear_cross_entropy
from fastattn.ops.loss import REDUCTIONS, cross_entropy

_OPTIONS = ("reduction", "ignore_index", "label_smoothing", "z_loss", "softcap")


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` over `fastattn.cross_entropy`, with z-loss and softcap.

    Classes are dimension 1 of the input, as in torch (0 of an unbatched one); targets that are class probabilities
    are handed to torch's own loss.

    Args:
        weight, ignore_index, reduction, label_smoothing: torch's.
        z_loss, softcap: see `fastattn.cross_entropy`.

    Raises:
        ValueError: z_loss or softcap with class probabilities; otherwise as `fastattn.cross_entropy`.

    Example:
        >>> CrossEntropyLoss(z_loss=1e-4)(torch.zeros(3, 10), torch.tensor([1, 2, 3]))
        tensor(2.3031)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        _check_reduction(reduction)
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(N, C), (N, C, d1, ...) or (C,), and the target without C → a scalar or the target's shape."""
        if target.is_floating_point():
            if self.z_loss or self.softcap is not None:
                raise ValueError("target must be int64 class indices with z_loss or softcap, got class probabilities")
            return super().forward(input, target)
        return cross_entropy(
            input.movedim(1, -1) if input.dim() > 2 else input,
            target,
            class_weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
        )


class LinearCrossEntropyLoss(nn.Module):
    """Cross entropy of a linear layer's outputs over `fastattn.linear_cross_entropy`: the logits never exist as a whole.

    The constructor, parameters (linear.weight, linear.bias, the buffer weight) and initialisation are those of
    `torch.nn.LinearCrossEntropyLoss`, for a single output; unlike there, everything can be differentiated twice and
    transformed, and the backward repeated.

    Args:
        in_features: features of the input.
        num_classes: classes.
        bias: whether the linear layer has one.
        reduction, label_smoothing: see `fastattn.cross_entropy`.
        weight: (num_classes,), the class weights.
        ignore_index: targets with this value do not count; None means -100.
        z_loss, softcap: see `fastattn.cross_entropy`.

    Example:
        >>> LinearCrossEntropyLoss(4, 10)(torch.zeros(3, 4), torch.tensor([1, 2, 3])).detach()
        tensor(2.3026)
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must have shape ({num_classes},) (num_classes), got {tuple(weight.shape)}")
        self.register_buffer("weight", weight)
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.ignore_index = IGNORE_INDEX if ignore_index is None else ignore_index
        self.z_loss, self.softcap = z_loss, softcap
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(..., in_features) and (...) → a scalar or the target's shape, fp32.

        A linear layer with hooks, adapters or wrappers is called, and its logits exist.
        """
        options: dict[str, Any] = {name: getattr(self, name) for name in _OPTIONS}
        if not is_plain_linear(self.linear):
            return cross_entropy(self.linear(input), target, class_weight=self.weight, **options)
        return linear_cross_entropy(
            input, self.linear.weight, target, bias=self.linear.bias, class_weight=self.weight, **options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _OPTIONS)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
