"""The public functions on another device: the tests whose inputs and definitions are on the CPU prove them there, too."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dropout
from fastattn.ops import attention, feed_forward, normalization

FUNCTIONS = (
    "attention",
    "attention_with_kv_cache",
    "cross_entropy",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "varlen_attention",
)


def install(monkeypatch: pytest.MonkeyPatch, device: str, back: str = "cpu") -> None:
    """Every function takes copies of its tensors to `device` and returns its results on `back`; seeds stay the CPU's."""
    for name in FUNCTIONS:
        monkeypatch.setattr(fastattn, name, on(getattr(fastattn, name), device, back))
    draw = dropout.draw_seed
    for module in (attention, feed_forward, normalization):
        monkeypatch.setattr(module, "draw_seed", lambda there: draw(torch.device("cpu")).to(there))


def on(function: Callable[..., Any], device: str, back: str) -> Callable[..., Any]:
    in_place = function is fastattn.attention_with_kv_cache

    @wraps(function)
    def elsewhere(*arguments: Any, **options: Any) -> Any:
        moved = [_moved(argument, device) for argument in arguments]
        result = function(*moved, **{name: _moved(option, device) for name, option in options.items()})
        if in_place:
            for cache, written in zip(arguments[1:3], moved[1:3]):
                cache.copy_(written)
        return tuple([y.to(back) for y in result]) if isinstance(result, tuple) else result.to(back)

    return elsewhere


def _moved(argument: Any, device: str) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(device, copy=True)
    return argument.to(device) if isinstance(argument, fastattn.BlockMask) else argument
