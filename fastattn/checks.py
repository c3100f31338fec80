"""Argument checks shared by ops, modules and models: each names the argument, what came, and what is allowed."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_Function = TypeVar("_Function", bound=Callable[..., Any])

# what fp32, in which kernels take their numbers, tells from 0 and infinity
LEAST_NUMBER, LARGEST_NUMBER = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    """TypeError unless `value` is a strided tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        allowed = ", ".join(map(name_of, dtypes))
        raise TypeError(f"{name} has dtype {name_of(value.dtype)}; allowed: {allowed}")


def check_rank(name: str, value: Tensor, rank: int, layout: str) -> None:
    if value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(value.shape)}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} ({meaning}), got {tuple(value.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """ValueError unless all the tensors given are on the device of the first."""
    first, first_name = None, ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, first_name = tensor.device, name
        elif tensor.device != first:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first}")


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is a real number: a tensor's gradient would be lost, a string parsed."""
    if type(value) not in (float, int, torch.SymFloat, torch.SymInt) and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")


def is_integer(value: object) -> bool:
    """Whether `value` is an integer, NumPy's and a compiler's among them, and no bool."""
    return type(value) in (int, torch.SymInt) or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def as_int(value: int) -> int:
    """An integer of any kind as int; a compiler's stays symbolic."""
    return value if type(value) in (int, torch.SymInt) else int(value)


def check_integer(name: str, value: Any, least: int | None = 0) -> int:
    """`value` as int; TypeError unless it is an integer of any kind, ValueError below `least`."""
    if type(value) is not int:
        if not is_integer(value):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        value = as_int(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_pair(name: str, value: Any, allowed: str) -> None:
    """TypeError unless `value` is a tuple or list, ValueError unless it has two entries; `allowed` says so in words."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} {allowed}, got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name} {allowed}, got {value!r}")


def check_probability(name: str, value: float) -> None:
    if type(value) is not float and not isinstance(value, bool):
        check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_softcap(softcap: float | None) -> None:
    if softcap is None:
        return
    check_number("softcap", softcap)
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or > 0 and finite, got {softcap}")
    if not LEAST_NUMBER <= softcap <= LARGEST_NUMBER:
        raise ValueError(f"softcap must be a normal number of float32, in [1.2e-38, 3.4e38], got {softcap}")


def check_scale(scale: float | None) -> None:
    if scale is None:
        return
    check_number("scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be None or finite, got {scale}")
    if not -LARGEST_NUMBER <= scale <= LARGEST_NUMBER:
        raise ValueError(f"scale must be finite in float32, at most 3.4e38, got {scale}")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`; the meta device has none to ask for."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating tensors to autocast's dtype where autocast is on for the first's device; leave fp64 alone.

    What is no tensor is left to the checks that follow, which name the argument.
    """
    first = tensors[0]
    if not (torch._C._is_any_autocast_enabled() and isinstance(first, Tensor) and autocasts(first.device)):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOAT_DTYPES else t for t in tensors)


def without_autocast(function: _Function) -> _Function:
    """`function` of tensors that have the dtypes autocast wants, without autocast: on a CPU it would round the fp32 of products inside."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments, **options)
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext():
            return function(*arguments, **options)

    return run  # type: ignore[return-value]
