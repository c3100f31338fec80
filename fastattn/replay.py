"""The gradient of a gradient, by automatic differentiation of an op's plain definition: what makes double backward work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def replay(
    definition: Callable[..., Sequence[Tensor]],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Differentiate the first gradient of `definition`.

    With (y_1, ...) = definition(x_1, ...) and g = Σ_k dy_k · ∂y_k/∂x, the first gradient, this returns the derivatives of
    Σ_i grad_grads_i · g_i with respect to every dy_k and every x_i that needs one.

    Args:
        needs: which of `tensors` the first gradient was taken for.
        grad_outputs: dy_k, or None where an output had no gradient.
        tensors: x_i, or None for an absent optional one.
        grad_grads: the incoming gradient of g_i, or None.

    Returns:
        (gradients of grad_outputs, gradients of tensors), None where there is none.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        xs = [t if t is None or not t.is_floating_point() else t.view_as(t).requires_grad_(True) for t in tensors]
        dys = [None if dy is None else dy.view_as(dy).requires_grad_(True) for dy in grad_outputs]
        ys = definition(*xs)
        pairs = [(y, dy) for y, dy in zip(ys, dys) if dy is not None and y.requires_grad]
        wanted = [i for i, (need, x) in enumerate(zip(needs, xs)) if need and x is not None]
        inputs = [x for i in wanted if (x := xs[i]) is not None]
        first = torch.autograd.grad(
            [y for y, _ in pairs], inputs, [dy for _, dy in pairs], create_graph=True, allow_unused=True
        )
        used = [(g, gg) for g, i in zip(first, wanted) if g is not None and (gg := grad_grads[i]) is not None]
        used = [(g, gg) for g, gg in used if g.requires_grad]
        targets = [t for t in (*dys, *xs) if t is not None and t.requires_grad]
        second: Sequence[Tensor | None] = [None] * len(targets)
        if used:
            second = torch.autograd.grad(
                [g for g, _ in used], targets, [gg for _, gg in used], create_graph=again, allow_unused=True
            )
    found = iter(second)
    spread = [None if t is None or not t.requires_grad else next(found) for t in (*dys, *xs)]
    return spread[: len(dys)], spread[len(dys) :]
