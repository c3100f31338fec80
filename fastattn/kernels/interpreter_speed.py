"""Triton's interpreter in half the time: what it works out at every operation, worked out once or more directly.

A kernel's tiles are small in tests, so that the interpreter spends its time on types, shapes and checks in Python, not in NumPy.
Nothing here changes a result:

* a shape's `tl.tuple`, its size and its text are made once per shape, not three times per operation;
* two operands of one type and shape need no promotion and no broadcast;
* NumPy's type of a Triton type is looked up, not found in a table that is built anew;
* whether integers overflow, ten of Triton's operations whose result it drops unless asked to debug, is worked out only then.

Only `interpreter.install()` calls this, only under the interpreter. Works with Triton 3.7 to 3.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

_INTEGERS = {int}


def _patch_types() -> None:
    original_block, original_equal = tl.block_type.__init__, tl.dtype.__eq__
    shapes: dict[tuple[int, ...], tuple[tl.core.tuple, int, str]] = {}

    def block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        known = shapes.get(sizes)
        if known is None or not _INTEGERS.issuperset(map(type, sizes)):  # (16.0 is equal to 16)
            original_block(self, element_ty, shape)
            shapes[tuple(self.shape.values)] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known
        self.name = f"<{text}, {element_ty}>"

    def equal(self: tl.dtype, other: object) -> bool:
        if isinstance(other, tl.dtype):
            return self is other or self.name == other.name
        return original_equal(self, other)

    tl.block_type.__init__ = block
    tl.dtype.__eq__ = equal  # pointer_type and block_type have their own


def _patch_tensors() -> None:
    shapes: dict[tuple[int, ...], tuple[tl.core.tuple, tl.constexpr]] = {}

    def tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    tl.tensor.__init__ = tensor


def _patch_numpy_types() -> None:
    original = triton_interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def numpy_type(type: tl.dtype) -> np.dtype:
        name = type.scalar.name
        if name not in known:
            known[name] = original(type.scalar)
        return known[name]

    triton_interpreter._get_np_dtype = numpy_type


def _patch_operands() -> None:
    original: Callable = TritonSemantic.binary_op_type_checking_impl
    original_broadcast: Callable = TritonSemantic.broadcast_impl_value

    def operands(
        self: TritonSemantic,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[tl.tensor, tl.tensor]:
        alike = (
            isinstance(lhs, tl.tensor)
            and isinstance(rhs, tl.tensor)
            and lhs.dtype is rhs.dtype
            and lhs.shape is rhs.shape
            and not div_or_mod
            and not lhs.dtype.is_ptr()
        )
        if alike:
            return lhs, rhs
        return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def broadcast(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        return (lhs, rhs) if lhs.shape is rhs.shape else original_broadcast(self, lhs, rhs)

    TritonSemantic.binary_op_type_checking_impl = operands
    TritonSemantic.broadcast_impl_value = broadcast


def _patch_overflow() -> None:
    original: Callable = TritonSemantic.binary_op_sanitize_overflow_impl

    def overflow(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable) -> None:
        if self.builder.options.debug:
            original(self, lhs, rhs, binary_op)

    TritonSemantic.binary_op_sanitize_overflow_impl = overflow


def install() -> None:
    """Make the interpreter of this process faster."""
    _patch_types()
    _patch_tensors()
    _patch_numpy_types()
    _patch_operands()
    _patch_overflow()
