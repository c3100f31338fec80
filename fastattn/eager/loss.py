"""Cross entropy of a projection in plain PyTorch: the differentiable definition, and the CPU backend.

The launchers have the signatures of `fastattn/kernels/loss.py`; the equations stand there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_NUMBERS = 1 << 23  # logits alive at a time: 32 MB of fp32


def definition(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(Σ w · ℓ, ℓ) with all the logits in memory; input (rows, features), target and ℓ (rows,)."""
    logits = F.linear(input, weight, bias).float()
    losses = F.cross_entropy(
        logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return (losses * token_weight).sum(), losses


def chunk_rows(classes: int) -> int:
    """How many rows of logits are computed at a time."""
    return max(16, CHUNK_NUMBERS // max(classes, 1))


def losses_and_gradient(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(ℓ, ∂(Σ w · ℓ) / ∂logits in their dtype) of one chunk; the logits may be overwritten."""
    z, classes, valid = logits.float(), logits.shape[1], target != ignore_index
    index = torch.where(valid, target, 0)[:, None]
    lse = torch.logsumexp(z, 1, keepdim=True)
    losses = lse - (1.0 - label_smoothing) * z.gather(1, index)
    if label_smoothing:
        losses -= label_smoothing * z.mean(1, keepdim=True)
    losses = torch.where(valid, losses[:, 0], 0.0)
    if not need_gradient:
        return losses, logits
    scale = torch.where(valid, token_weight, 0.0)[:, None]
    gradient = z.sub_(lse).exp_()
    if label_smoothing:
        gradient -= label_smoothing / classes
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, label_smoothing - 1.0)).mul_(scale)
    return losses, gradient.to(logits.dtype)


def explain(classes: int) -> str:
    """The chunks of logits over this many classes, in words."""
    return f"PyTorch, {chunk_rows(classes)} rows of logits at a time"
