"""Kernels from any file: `path/to/file.py:name`, where name is a function that launches kernels, or a kernel itself."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_POINTERS = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64, "i1": torch.bool,
    "i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "u16": torch.uint16, "i32": torch.int32, "u32": torch.uint32,
    "i64": torch.int64, "u64": torch.uint64, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz, "fp8e5b16": torch.float8_e5m2fnuz,
}  # fmt: skip
_NEXT = re.compile(r",(?=\s*\w+\s*=)")  # the comma before a name: a value may have commas of its own
_ALIGNED_INTEGER = 1024  # divisible by 16, as sizes and strides usually are


def load(path: Path) -> ModuleType:
    """Import the file at `path`; it must not need a GPU to be imported.

    As when Python runs it, what lies beside the file can be imported from it; a file of a package is imported as a part of it.
    """
    folder, name = path.resolve().parent, path.stem
    while (folder / "__init__.py").is_file():
        folder, name = folder.parent, f"{folder.name}.{name}"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    if "." in name:
        found = importlib.import_module(name.removesuffix(".__init__"))
        if found.__file__ is None or not path.samefile(found.__file__):
            raise ValueError(f"{path} is {name} to Python, which has another of that name: {found.__file__}")
        return found
    name = path.stem.replace("-", "_")
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(specification)
    if name not in sys.modules:  # where dataclasses and pickle look for it; never in place of another module
        sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def find(place: str, signature: str, constants: str) -> Callable[[], object]:
    """What calls the function, or launches the kernel, at `place` ("file.py:name").

    Args:
        signature: for a kernel, its run-time arguments: "x=*bf16,n=i32,scale=fp32".
        constants: for a kernel, constexprs and launch options: "BLOCK=128,num_warps=8"; also arguments of one value, "bias=None".
            What an autotuner would choose is taken from here instead.

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
        if values.keys() & {key for config in getattr(target, "configs", ()) for key in config.all_kwargs()}:
            target = target.fn
        return lambda: target[(1,)](**arguments, **values)
    if not callable(target):
        raise ValueError(f"{name!r} of {file} is neither a function nor a kernel, but {type(target).__name__}")
    return target  # type: ignore[no-any-return]


def launch(place: str, signature: str, constants: str) -> None:
    """Do what `find` finds."""
    find(place, signature, constants)()


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in _NEXT.split(text.strip(", ")) if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError(f"{text!r} is not NAME=VALUE,NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _literal(text: str, module: ModuleType) -> Any:
    """A Python literal, or the name of something in the module, such as a device function or `tl.float16`."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return operator.attrgetter(text)(module)
        except AttributeError:
            raise ValueError(f"{text!r} is neither a literal (text has quotes) nor a name of the file") from None


def _argument(name: str, kind: str) -> Any:
    if kind.startswith("*") and kind[1:] in _POINTERS:
        return torch.zeros(64, dtype=_POINTERS[kind[1:]])
    if re.fullmatch(r"[iu](8|16|32)", kind):
        return _ALIGNED_INTEGER
    if re.fullmatch(r"[iu]64", kind):
        return _ALIGNED_INTEGER << 32
    if re.fullmatch(r"fp(16|32|64)", kind):
        return 0.5
    if kind == "i1":
        return True
    raise ValueError(
        f"argument {name} has unknown type {kind!r}; pointers: *{', *'.join(_POINTERS)}; i1, i32, i64, fp32; a value, such as "
        "None, is one of --constants; descriptors and tuples need a function that launches the kernel"
    )
