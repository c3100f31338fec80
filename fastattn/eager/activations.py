"""Activations and their gradients in PyTorch; the formulas stand in `fastattn/kernels/activations.py`.

`ACTIVATIONS` can be differentiated by any of torch's means. `activate` and `gradient` are for launchers, which know what may be
overwritten. Each is one call of PyTorch's and not one per block that fits into the cache: at the end of each call the cores wait
for the slowest of them, which is long where another process uses one.

The value of GELU's tanh form is oneDNN's, which computes it faster than PyTorch's own kernel (`python -m bench.report feed_forward`).
oneDNN applies it only to the result of a product; the product here, which changes nothing, is a convolution of each column with 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.eager.products import onednn_takes

aten = torch.ops.aten
_convolution: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_LEAST_BY_ONEDNN = 1 << 17  # numbers: from here on its call of 60 µs is worth it

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


@cache
def _by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes GELU's tanh form of this dtype, with code of its own for this CPU."""
    vector = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return _convolution is not None and vector and onednn_takes(dtype)


def _gelu_tanh(z: Tensor) -> Tensor | None:
    """GELU's tanh form of (rows, columns) by oneDNN, as a new tensor; None where that does not pay."""
    large = z.is_cpu and z.dim() == 2 and z.numel() >= _LEAST_BY_ONEDNN
    if not (large and z.is_contiguous() and torch.backends.mkldnn.enabled and _by_onednn(z.dtype)):
        return None
    (rows, columns), alone = z.shape, [1, 1]
    image, ones = z.view(1, rows, 1, columns).permute(0, 3, 1, 2), z.new_ones(columns, 1, 1, 1)
    y = _convolution(image, ones, None, [0, 0], alone, alone, columns, "gelu", [], "tanh")
    return y.permute(0, 2, 3, 1).view(z.shape)


def activate(z: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """act(z), written over z where that is allowed: a new tensor of this size costs the CPU as much as most activations."""
    value = _gelu_tanh(z) if activation == "gelu_tanh" else None
    return (_IN_PLACE if overwrite else ACTIVATIONS)[activation](z) if value is None else value


def gradient(
    dy: Tensor, z: Tensor, activation: str, *, overwrite: bool = False, need_value: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(dY · act'(z), act(z) where needed); the first may be written over dY where that is allowed."""
    value = activate(z, activation) if need_value else None
    into = {"grad_input": dy} if overwrite and activation in _INTO else {}
    return _GRADIENTS[activation](dy, z, **into), value
