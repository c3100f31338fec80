"""Tolerances from the error that plain PyTorch makes at the same dtype."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

FACTOR = 3.0  # how much larger than plain PyTorch's error ours may be
OTHER_DRAWS = 8


def max_error(got: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinities must agree in place and sign."""
    got, truth = got.detach().double(), truth.detach().double()
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    infinite = torch.isinf(truth)
    assert torch.equal(got[infinite], truth[infinite]), "infinities differ"
    finite = (got - truth)[~infinite]
    assert torch.isfinite(finite).all(), "NaN or infinity where the truth is finite"
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_close(
    name: str,
    got: Tensor,
    truth: Tensor,
    plain: Tensor,
    relative: float = 0.0,
    others: Callable[[], Iterable[float]] = tuple,
) -> None:
    """|got - truth| <= FACTOR · (|plain - truth| + relative · |truth|) + one rounding, each of the largest element.

    Inputs are of order 1 and a result may be a difference of sums of them that is exactly 0 (a softmax over one key has no
    gradient), so a truth below 4 counts as 4. `relative` is an error that the
    algorithm itself has by design. A result of few numbers may by luck hold little of plain PyTorch's error: `others` gives
    its errors in other draws of the same case, and is asked only if the one at hand does not suffice.
    """
    size = truth.detach()[torch.isfinite(truth)].abs()
    largest = max(4.0, size.max().item() if size.numel() else 0.0)
    error, rounding = max_error(got, truth), torch.finfo(got.dtype).eps * largest
    allowed = FACTOR * (max_error(plain, truth) + relative * largest) + rounding
    if error > allowed:
        allowed = max(allowed, FACTOR * (max(others(), default=0.0) + relative * largest) + rounding)
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def value_and_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of all the floating inputs), with fresh leaves in the inputs' own dtypes and strides."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = list(function(*leaves))
    used = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, grad_outputs) if dy is not None]
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in used], wanted, [dy for _, dy in used], allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, wanted)]
