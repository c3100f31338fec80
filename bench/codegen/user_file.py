"""Kernels from any file: `path/to/file.py:name`, where name is a function that launches kernels, or a kernel itself."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_POINTERS = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64, "i1": torch.bool,
    "i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
}  # fmt: skip
_ALIGNED_INTEGER = 1024  # divisible by 16, as sizes and strides usually are


def load(path: Path) -> ModuleType:
    """Import the file at `path`; it must not need a GPU to be imported."""
    specification = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    if specification is None or specification.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def find(place: str, signature: str, constants: str) -> Callable[[], object]:
    """What calls the function, or launches the kernel, at `place` ("file.py:name").

    Args:
        signature: for a kernel, its run-time arguments: "x=*bf16,n=i32,scale=fp32".
        constants: for a kernel, constexprs and launch options: "BLOCK=128,num_warps=8".

    Raises:
        ValueError: a malformed place or signature, a name that the file does not have, a kernel without a signature.
    """
    file, colon, name = place.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(f"{place!r} is not path/to/file.py:name of an existing file")
    module = load(Path(file))
    target = getattr(module, name, None)
    if target is None:
        raise ValueError(f"{file} has no {name!r}")
    if hasattr(target, "run") and hasattr(target, "__getitem__"):  # a kernel, possibly autotuned
        if not signature:
            raise ValueError(
                f"{name} is a kernel: its arguments are given by --signature 'x=*fp32,n=i32' and --constants"
            )
        values = {key: _literal(value, module) for key, value in _pairs(constants).items()}
        arguments = {key: _argument(key, kind) for key, kind in _pairs(signature).items()}
        return lambda: target[(1,)](**arguments, **values)
    if not callable(target):
        raise ValueError(f"{name!r} of {file} is neither a function nor a kernel, but {type(target).__name__}")
    return target  # type: ignore[no-any-return]


def launch(place: str, signature: str, constants: str) -> None:
    """Do what `find` finds."""
    find(place, signature, constants)()


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError(f"{text!r} is not NAME=VALUE,NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _literal(text: str, module: ModuleType) -> Any:
    """A Python literal, or the name of something in the module, such as a device function."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if hasattr(module, text):
            return getattr(module, text)
        raise ValueError(f"{text!r} is neither a literal nor a name of the file") from None


def _argument(name: str, kind: str) -> Any:
    if kind.startswith("*") and kind[1:] in _POINTERS:
        return torch.zeros(64, dtype=_POINTERS[kind[1:]])
    if re.fullmatch(r"[iu](8|16|32)", kind):
        return _ALIGNED_INTEGER
    if re.fullmatch(r"[iu]64", kind):
        return _ALIGNED_INTEGER << 32
    if re.fullmatch(r"fp(16|32|64)", kind):
        return 0.5
    raise ValueError(f"argument {name} has unknown type {kind!r}; pointers: *{', *'.join(_POINTERS)}; i32, i64, fp32")
