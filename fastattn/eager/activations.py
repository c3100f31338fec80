"""Activations and their gradients in PyTorch; the formulas stand in `fastattn/kernels/activations.py`.

`ACTIVATIONS` can be differentiated by any of torch's means. `activate` and `gradient` are for launchers. They use what is
fastest on a CPU, which for GELU's tanh form is not PyTorch's own kernel: tanh(u) = 2 σ(2u) - 1 makes it z · σ(w), the value
and the gradient share σ(w), and all is done on blocks that stay in the cache (`python -m bench.report feed_forward`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

# GELU's tanh form is z · σ(w) with w = z (LINEAR + CUBIC z²).
LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
CUBIC = 0.044715 * LINEAR
_BLOCK = (
    1 << 19
)  # numbers of a block: few enough to stay near the cores, enough for few waits of one core for the other
_FEW = 1 << 13  # numbers that are not worth more than one call


def activate(z: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """act(z), written over z where that is allowed: a new tensor of this size costs the CPU as much as the activation."""
    if not _in_blocks(z, activation):
        return (_IN_PLACE if overwrite else ACTIVATIONS)[activation](z)
    value = z if overwrite else torch.empty_like(z)
    for x, s, y in _blocks(z, 1, value):
        s = y if y.dtype == x.dtype and not overwrite else s
        _gelu_sigmoid(x, s, s).mul_(x)
        if s is not y:
            y.copy_(s)
    return value


def gradient(
    dy: Tensor, z: Tensor, activation: str, *, overwrite: bool = False, need_value: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(dY · act'(z), act(z) where needed); the first may be written over dY where that is allowed."""
    if not (dy.is_contiguous() and _in_blocks(z, activation)):
        value = ACTIVATIONS[activation](z) if need_value else None
        into = {"grad_input": dy} if overwrite and activation in _INTO else {}
        return _GRADIENTS[activation](dy, z, **into), value
    dz, value = dy if overwrite else torch.empty_like(dy), torch.empty_like(z) if need_value else None
    for x, s, w, g, d, *y in _blocks(z, 2, dy, dz, *(() if value is None else (value,))):
        _gelu_sigmoid(x, s, w)
        w.sub_(x, alpha=2.0 * LINEAR / 3.0)  # z w'(z) = 3 w - 2 LINEAR z
        for part in y:
            if part.dtype == x.dtype:
                torch.mul(s, x, out=part)
            else:
                part.copy_(x.mul_(s))
        aten.sigmoid_backward(w, s, grad_input=w)
        s.add_(w, alpha=3.0)  # act'(z) = σ + z w' σ (1 - σ)
        if d.dtype == s.dtype:
            torch.mul(s, g, out=d)
        else:
            d.copy_(s.mul_(x.copy_(g)))
    return dz, value


def _gelu_sigmoid(x: Tensor, s: Tensor, w: Tensor) -> Tensor:
    """σ(w) into s, w into w, which may be the same."""
    torch.addcmul(x.new_full((1,), LINEAR), x, x, value=CUBIC, out=w)
    return torch.sigmoid(w.mul_(x), out=s)


def _in_blocks(z: Tensor, activation: str) -> bool:
    return activation == "gelu_tanh" and z.is_cpu and z.is_contiguous() and z.numel() > _FEW


def _blocks(z: Tensor, scratch: int, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of z in fp32, as many more for other use, and blocks of the others, flat."""
    size = min(_BLOCK, z.numel())
    work = z.new_empty(scratch + (z.dtype != torch.float32), size, dtype=torch.float32)
    flat = [tensor.view(-1) for tensor in (z, *others)]
    for start in range(0, z.numel(), size):
        x, *parts = (tensor[start : start + size] for tensor in flat)
        room = [w[: len(x)] for w in work]
        if z.dtype != torch.float32:
            x = room.pop().copy_(x)
        yield (x, *room, *parts)
