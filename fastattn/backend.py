"""Which implementation runs a call: Triton kernels or plain PyTorch ("eager").

The rule, in order:

1. `use(...)` in force, or else the environment variable `FASTATTN_BACKEND` (`auto`, `triton` or `eager`), read at import.
2. `auto`: Triton for tensors on a GPU, of NVIDIA's those that Triton is made for (compute capability 8.0, A100, and newer), and for
   CPU tensors when `TRITON_INTERPRET=1`; eager for all others.

Both implementations have the same launcher signatures: `fastattn/kernels/<op>.py` and `fastattn/eager/<op>.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastattn.interpreting import interpreting
from fastattn.tracing import constant_to_compilers

BACKENDS = ("auto", "triton", "eager")
LEAST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs: https://github.com/triton-lang/triton#compatibility


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


_override: str | None = None
_VARIABLE = os.environ.get("FASTATTN_BACKEND", "auto")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run the calls inside with one backend, process-wide: `with fastattn.backend.use("eager"): ...`.

    Args:
        backend: "auto", "triton" or "eager".

    Raises:
        ValueError: another name.
    """
    global _override
    previous, _override = _override, _checked(backend, "backend")
    try:
        yield
    finally:
        _override = previous


@cache
def triton_available() -> bool:
    """True where the package triton is installed (it is not imported to find out)."""
    return importlib.util.find_spec("triton") is not None


def choose(device: torch.device) -> tuple[str, str]:
    """The backend for tensors on `device`, and the reason in words.

    Returns:
        ("triton" | "eager", reason)

    Raises:
        RuntimeError: Triton was asked for and is not installed, or by the environment for tensors on the CPU, which its
            kernels do not take unless TRITON_INTERPRET=1.
    """
    return _choose(device.type, _override, too_old=_too_old(device))


@cache
def _too_old(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU that Triton is not made for: on a T4, say, kernels compile slowly and may not fit."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < LEAST_CAPABILITY


def eager_on_cpu() -> bool:
    """Whether CPU tensors run in PyTorch, asked without a device: calls of less than a millisecond ask it each time."""
    return _eager_on_cpu(_override)


@constant_to_compilers  # which would take the cache apart
def _eager_on_cpu(override: str | None) -> bool:
    return _choose("cpu", override, False)[0] == "eager"


@cache
def _choose(
    device_type: str, override: str | None, tensors_there: bool = True, too_old: bool = False
) -> tuple[str, str]:
    """See `choose`; without tensors on the device, that Triton could not take them is no error."""
    has_triton = triton_available()
    if override not in (None, "auto"):
        choice, reason = str(override), "set by fastattn.backend.use"
    else:
        choice, reason = "auto", ""
        if override is None:
            choice = _checked(_VARIABLE, "environment variable FASTATTN_BACKEND")
            reason = "set by the environment variable FASTATTN_BACKEND"
            compiled_on_cpu = choice == "triton" and has_triton and device_type == "cpu" and not interpreting()
            if compiled_on_cpu and tensors_there:
                raise RuntimeError(
                    "FASTATTN_BACKEND is 'triton', whose kernels take tensors on a GPU; for tensors on the CPU set "
                    "TRITON_INTERPRET=1 (slow), or FASTATTN_BACKEND to 'auto' or 'eager'"
                )
    if choice == "auto":
        if device_type == "cpu":
            interpreted = interpreting() and has_triton
            choice = "triton" if interpreted else "eager"
            reason = "TRITON_INTERPRET=1" if interpreted else "tensors on the CPU run in PyTorch"
        elif not has_triton:
            choice, reason = "eager", f"triton is not installed, so tensors on {device_type} run in PyTorch"
        elif too_old:
            oldest = ".".join(map(str, LEAST_CAPABILITY))
            choice = "eager"
            reason = f"Triton is made for GPUs from compute capability {oldest} on, and this one is older"
        else:
            choice, reason = "triton", f"tensors on {device_type} run in Triton"
    if choice == "triton" and not has_triton:
        raise RuntimeError(f"the Triton backend was {reason}, but triton is not installed: pip install triton")
    return choice, reason


@cache
def _module(backend: str, op: str) -> ModuleType:
    folder = {"triton": "kernels", "eager": "eager"}[backend]
    return importlib.import_module(f"fastattn.{folder}.{op}")


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module of launchers that runs `op` ("attention", "normalization", ...) for tensors on `device`."""
    return _module(choose(device)[0], op)


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current for the launches inside: a kernel for cuda:1 must not run on cuda:0."""
    if device.type == "cpu" or device.index is None or device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def input_precision(dtype: torch.dtype) -> str:
    """How fp32 tiles are multiplied: "ieee", or "tf32" where torch's settings, the old ones or the new, allow it for matmuls."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Says which implementation a call would run, why, and with which tiles or path. Nothing is computed.

    Args:
        function: one of the package's ops, such as `fastattn.attention`.
        args, options: the call's arguments.

    Raises:
        TypeError: `function` is not an op of this package.

    Example:
        >>> q = torch.zeros(1, 8, 1024, 64)
        >>> print(fastattn.explain(fastattn.attention, q, q, q, causal=True))
        attention on cpu: eager, because tensors on the CPU run in PyTorch
          PyTorch's fused CPU attention, one call (is_causal)
    """
    folder, _, name = str(getattr(function, "__module__", "")).rpartition(".")
    if folder != "fastattn.ops":
        raise TypeError(f"function must be one of fastattn's ops, such as fastattn.attention, got {function!r}")
    tensor = next((a for a in (*args, *options.values()) if isinstance(a, torch.Tensor)), None)
    if tensor is None:
        raise TypeError(f"the call of {function.__name__} has no tensor argument")
    backend, reason = choose(tensor.device)
    with device_guard(tensor.device):  # tiles are those of its GPU
        details = importlib.import_module(f"fastattn.ops.{name}").explain(function, *args, **options)
    return "\n  ".join([f"{function.__name__} on {tensor.device}: {backend}, because {reason}", *details])
