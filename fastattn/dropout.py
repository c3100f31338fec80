"""What dropout is decided by on every backend: a seed and a threshold."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(device: torch.device) -> Tensor:
    """A new seed, int64 (1,), from torch's generator."""
    return torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)


def dropout_threshold(p: float) -> int:
    """The least of 16 random bits that keep an element, of which 1 - p of all 2¹⁶ are as many, to the nearest."""
    return min(round(p * 2**16), 2**16 - 1) if p else 0
