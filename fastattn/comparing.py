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
    like = next(module.parameters())
    if like.is_meta:
        return "its parameters are on the meta device: load them first"
    original = type(module)
    cls = adapted(adapter, original)
    try:
        with probing(module, like.device):
            for inputs, training in product(adapter.probes(module, like), (False, True)):
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
    except Exception as error:  # whatever a stranger's forward may raise
        return f"looks like a known structure, but raised {type(error).__name__} when compared"
    finally:
        module.__class__ = original
    return ""


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
    """Without gradients and autocast; what is inside is in evaluation mode, no nn.Dropout drops, and no draw counts."""
    shares = [(m, m.p) for m in module.modules() if isinstance(m, _DropoutNd)]
    generators = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    try:
        for dropout, _ in shares:
            dropout.p = 0.0
        with evaluating(module), torch.no_grad(), torch.autocast(device.type, enabled=False), generators:
            yield
    finally:
        for dropout, share in shares:
            dropout.p = share


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]
