"""Activations and their gradients in PyTorch; the formulas stand in `fastattn/kernels/activations.py`.

`ACTIVATIONS` can be differentiated by any of torch's means. `activate` and `gradient` are for launchers, which know what may be
overwritten. Each is one call of PyTorch's: the value and the gradient of GELU's tanh form share a sigmoid, and blocks that stay
in the cache made them a fifth faster on quiet cores, but with another process on one of them a core waits for the other at
the end of each call, for milliseconds, and there were 18 times as many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}

# dY · act'(z), of dY and z; those in _INTO take an output tensor as well.
_INTO = ("gelu", "gelu_tanh", "silu")
_GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda dy, z: aten.threshold_backward(dy, z, 0),
    "relu2": lambda dy, z: dy * 2 * F.relu(z),
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
    "silu": aten.silu_backward,
    "sigmoid": lambda dy, z: aten.sigmoid_backward(dy, torch.sigmoid(z)),
    "tanh": lambda dy, z: aten.tanh_backward(dy, torch.tanh(z)),
    "identity": lambda dy, z: dy,
}

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu2": lambda z: torch.relu_(z).square_(),
    "gelu": aten.gelu_,
    "gelu_tanh": partial(aten.gelu_, approximate="tanh"),
    "silu": partial(F.silu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "identity": lambda z: z,
}


def activate(z: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """act(z), written over z where that is allowed: a new tensor of this size costs the CPU as much as the activation."""
    return (_IN_PLACE if overwrite else ACTIVATIONS)[activation](z)


def gradient(
    dy: Tensor, z: Tensor, activation: str, *, overwrite: bool = False, need_value: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(dY · act'(z), act(z) where needed); the first may be written over dY where that is allowed."""
    value = ACTIVATIONS[activation](z) if need_value else None
    into = {"grad_input": dy} if overwrite and activation in _INTO else {}
    return _GRADIENTS[activation](dy, z, **into), value
