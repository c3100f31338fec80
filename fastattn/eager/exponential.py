"""exp on a CPU where it may underflow: there PyTorch's own takes 50 to 170 times as long."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_EXPONENT = -87.0  # e^-87 is the least power that is a normal number in fp32, and lost in any sum of probabilities


def exp_(x: Tensor, far: bool) -> Tensor:
    """exp(x) over x (fp32); `far`: much of it may underflow, and becomes 0 below about e^-87."""
    if not (far and x.is_cpu):
        return x.exp_()
    return torch.threshold_(x.clamp_min_(LEAST_EXPONENT).exp_(), 2e-38, 0.0)


def exp(x: Tensor, far: bool) -> Tensor:
    """exp(x), differentiable by any of torch's means; over x and as `exp_` where nothing is differentiated."""
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    if x.requires_grad or transformed or torch.compiler.is_compiling():
        return torch.exp(x)
    return exp_(x, far)
