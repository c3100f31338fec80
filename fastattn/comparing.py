"""Whether a module and what would replace it compute the same, on random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastattn.adapters import Adapter, adapted
from fastattn.nn.modes import evaluating
from fastattn.nn.plain import is_plain_linear

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a sequence's largest element


def difference(module: nn.Module, adapter: type[Adapter]) -> str:
    """Why the adapter does not compute what `module` computes; "" where it does."""
    for name in adapter.linears:
        if not is_plain_linear(getattr(module, name)):
            return f"{name} is no plain linear layer, or has hooks: it has to be called"
    like = next(module.parameters(), None)
    if like is None:
        return "it holds no parameters (FSDP1's are flat): patch before it is sharded"
    if like.is_meta:
        return "its parameters are on the meta device: load them first"
    original = type(module)
    try:
        with probing(module, like.device):
            with _redrawn(module):
                difference = _compared(module, adapter, redrawn=True)
            return difference or _compared(module, adapter, redrawn=False)
    except Exception as error:  # whatever a stranger's forward may raise
        return f"has the parameters of a known structure, but takes other inputs ({type(error).__name__} when compared)"
    finally:
        module.__class__ = original


def _compared(module: nn.Module, adapter: type[Adapter], *, redrawn: bool) -> str:
    """As `difference`, with the parameters that the module has now; `redrawn` ones say nothing about training."""
    like, original = next(module.parameters()), type(module)
    cls = adapted(adapter, original)
    for inputs, training in product(adapter.probes(module, like), (False,) if redrawn else (False, True)):
        module.training = training
        state = _random_state(like.device)
        expected = original.forward(module, *inputs)
        if not all(map(torch.equal, state, _random_state(like.device))):
            return "draws random numbers that are not those of an nn.Dropout inside"
        module.__class__ = cls
        got = cls.forward(module, *inputs)
        module.__class__ = original
        if not isinstance(expected, Tensor) or expected.dtype != got.dtype or expected.shape != got.shape:
            return "looks like a known structure, but its result is of another shape or dtype"
        if error := error_of(got, expected, max(TOLERANCE[inputs[0].dtype], TOLERANCE[expected.dtype])):
            when = " in training" if training else ""
            return f"looks like a known structure, but computes something else{when} (by {error:.1e})"
    return ""


@contextmanager
def _redrawn(module: nn.Module) -> Iterator[None]:
    """With random parameters in fp32: initial zeros and ones hide what they are multiplied with, one large element hides
    all others, and 16 bits hide small differences."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    kept = [(part, part._parameters.copy()) for part in module.modules()]
    try:
        for part, parameters in kept:
            drawn = {name: _draw(p, generator) for name, p in parameters.items() if p is not None}
            part._parameters.update(drawn)
        yield
    finally:
        for part, parameters in kept:
            part._parameters.update(parameters)


def _draw(like: Tensor, generator: torch.Generator) -> nn.Parameter:
    """Normally distributed, in fp32; large ones repeat a part of a prime length, for drawing takes longer than comparing."""
    part = torch.randn(min(like.numel(), 65521), generator=generator, device=like.device)
    part *= like.shape[-1] ** -0.5 if like.ndim > 1 else 1.0
    repeated = part.repeat(-(-like.numel() // max(part.numel(), 1)))
    return nn.Parameter(repeated[: like.numel()].view(like.shape), requires_grad=False)


def error_of(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error among the sequences where it is not within tolerance; 0.0 where all are.

    Each is measured by its own largest element, for each has a scale of its own. Where `expected` overflows, there is
    nothing to compare; where the smallest normal number is as large as the error, neither.
    """
    floor = torch.finfo(expected.dtype).tiny
    finite = expected.isfinite()
    got, expected = (torch.where(finite, x, 0.0).double().flatten(1) for x in (got, expected))
    error, size = (got - expected).abs().amax(1), expected.abs().amax(1)
    return max([0.0, *error[~(error <= tolerance * size + floor)].nan_to_num(nan=torch.inf).tolist()])


@contextmanager
def probing(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and TF32; what is inside is in evaluation mode, no nn.Dropout drops, and no draw counts."""
    matmul, precision = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    shares = [(m, m.p) for m in module.modules() if isinstance(m, _DropoutNd)]
    generators = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    try:
        for dropout, _ in shares:
            dropout.p = 0.0
        matmul.fp32_precision = "ieee"  # its rounding is not the same everywhere
        with evaluating(module), torch.no_grad(), torch.autocast(device.type, enabled=False), generators:
            yield
    finally:
        matmul.fp32_precision = precision
        for dropout, share in shares:
            dropout.p = share


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]
