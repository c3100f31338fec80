"""Make Triton's interpreter (`TRITON_INTERPRET=1`) compute what a GPU computes.

Triton's interpreter stores a bfloat16 tile as bit patterns in uint16 and then calculates with these integers, so that a
bf16 kernel returns garbage without a warning. `install()` repairs what can be repaired and forbids the rest:

* casts between bf16 and the other types round to nearest even (or towards zero, where the kernel asks for it);
* `tl.dot` multiplies bf16 values exactly and accumulates in fp32; it rounds fp32 operands to TF32 where its
  `input_precision` says so;
* any other arithmetic, comparison or reduction of a bf16 tile raises `TypeError`: a kernel loads, upcasts to fp32,
  computes, and casts down only for a dot or a store;
* floating-point exceptions stay silent, as they do on a GPU;
* an error inside a kernel reaches the caller as it was raised, not wrapped once per device function.

Works with Triton 3.7 to 3.9. Only `fastattn.kernels` imports this module, and only under the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from fastattn.kernels import interpreter_speed

# What may touch a bf16 tile: moving its bits, converting them, and the dot, which is defined below.
_ALLOWED_ON_BFLOAT16 = frozenset(
    [
        "create_load",
        "create_store",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_load",
        "create_atomic_store",
        "create_tensor_pointer_load",
        "create_tensor_pointer_store",
        "create_make_block_ptr",
        "create_advance",
        "create_make_tensor_descriptor",
        "create_descriptor_load",
        "create_descriptor_store",
        "create_descriptor_gather",
        "create_descriptor_scatter",
        "create_fp_to_fp",
        "create_fp_ext",
        "create_fp_trunc",
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_bitcast",
        "create_int_to_ptr",
        "create_ptr_to_int",
        "create_dot",
        "create_select",
        "create_reshape",
        "create_trans",
        "create_expand_dims",
        "create_broadcast",
        "create_cat",
        "create_join",
        "create_split",
        "create_splat",
        "create_unsplat",
        "create_gather",
        "create_print",
    ]
)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns (uint16); exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray, *, towards_zero: bool = False) -> np.ndarray:
    """The bf16 bit patterns (uint16) of fp32 `values`, rounded to nearest even; a NaN becomes the quiet NaN 0x7FC0."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    if not towards_zero:
        last_kept_bit = (bits >> np.uint32(16)) & np.uint32(1)
        bits = bits + np.uint32(0x7FFF) + last_kept_bit
    rounded = (bits >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def round_to_tfloat32(values: np.ndarray) -> np.ndarray:
    """fp32 `values` with TF32's 10 mantissa bits, rounded to nearest, ties away from zero (PTX `cvt.rna.tf32`)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _is_bfloat16(value: Any) -> bool:
    return type(value) is TensorHandle and value.dtype.scalar.name == "bf16"  # (the name: `==` takes longer)


def _forbid_bfloat16(method: Callable, operation: str) -> Callable:
    @functools.wraps(method)
    def checked(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        if any(map(_is_bfloat16, args)):
            raise TypeError(
                f"{operation} on a bfloat16 tile: upcast with .to(tl.float32), cast back only for a dot or a store"
            )
        return method(self, *args, **kwargs)

    return checked


def _forbid_bfloat16_reduction(method: Callable) -> Callable:
    @functools.wraps(method)
    def checked(self: Any, inputs: tuple) -> Any:
        if any(tile.dtype == tl.bfloat16 for tile in inputs):
            raise TypeError("reduction or scan of a bfloat16 tile: upcast with .to(tl.float32)")
        return method(self, inputs)

    return checked


def _patch_casts() -> None:
    original_cast, original_rounding_cast = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast(
        self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, towards_zero: bool = False
    ) -> TensorHandle:
        target = target.scalar
        if source.dtype.scalar == target and source.data.dtype == triton_interpreter._get_np_dtype(target):
            return source  # (a comparison's handle has its operands' type, but holds booleans)
        if _is_bfloat16(source):
            source = TensorHandle(bfloat16_to_float32(source.data), tl.float32)
            return source if target == tl.float32 else cast(self, source, target)
        if target == tl.bfloat16:
            values = source.data.astype(np.float32)
            return TensorHandle(float32_to_bfloat16(values, towards_zero=towards_zero), tl.bfloat16)
        return original_cast(self, source, target)

    def rounding_cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any) -> TensorHandle:
        is_fp8 = 8 in (source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth)
        if is_fp8 and target.scalar == tl.bfloat16:
            return cast(self, original_rounding_cast(self, source, tl.float32, rounding), tl.bfloat16)
        if is_fp8 and _is_bfloat16(source):
            return original_rounding_cast(self, cast(self, source, tl.float32), target, rounding)
        if _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return cast(self, source, target, towards_zero="RTZ" in str(rounding))
        return original_rounding_cast(self, source, target, rounding)

    def bfloat16_constant(self: InterpreterBuilder, value: float) -> TensorHandle:
        return cast(self, self.get_fp32(value), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = rounding_cast
    InterpreterBuilder.get_bf16 = bfloat16_constant


def _patch_dot() -> None:
    original_dot = InterpreterBuilder.create_dot

    def dot(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        acc: TensorHandle,
        input_precision: Any,
        max_imprecise: Any,
    ) -> TensorHandle:
        def operand(tile: TensorHandle) -> np.ndarray:
            if _is_bfloat16(tile):
                return bfloat16_to_float32(tile.data)
            if tile.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
                return round_to_tfloat32(tile.data)
            return tile.data.astype(acc.data.dtype, copy=False)

        if _is_bfloat16(acc):
            raise TypeError("tl.dot with a bfloat16 accumulator: accumulate in tl.float32")
        if a.dtype.scalar not in (tl.bfloat16, tl.float16, tl.float32):
            return original_dot(self, a, b, acc, input_precision, max_imprecise)
        product = np.matmul(operand(a), operand(b)) + acc.data
        return TensorHandle(product.astype(acc.data.dtype, copy=False), acc.dtype.scalar)

    InterpreterBuilder.create_dot = dot


def _patch_arithmetic() -> None:
    for name in dir(InterpreterBuilder):
        if name.startswith("create_") and name not in _ALLOWED_ON_BFLOAT16:
            operation = name.removeprefix("create_")
            setattr(InterpreterBuilder, name, _forbid_bfloat16(getattr(InterpreterBuilder, name), operation))
    for operations in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
        operations.apply_impl = _forbid_bfloat16_reduction(operations.apply_impl)


def _patch_launch() -> None:
    original_launch = GridExecutor.__call__

    @functools.wraps(original_launch)
    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        try:
            with np.errstate(all="ignore"):
                return original_launch(self, *args, **kwargs)
        except triton_interpreter.InterpreterError as error:
            root: BaseException = error
            while isinstance(root, triton_interpreter.InterpreterError) and root.__cause__ is not None:
                root = root.__cause__
            raise root from None

    GridExecutor.__call__ = launch


def _patch_language_once_per_launch() -> None:
    """Triton swaps the whole of `tl` at every call of a device function, 0.2 ms each; once per launch is enough."""
    original_patch = triton_interpreter._patch_lang
    patched: set[str] = set()
    language_modules: dict[Any, frozenset[str]] = {}

    def patch(function: Any) -> Any:
        if function not in language_modules:
            used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
            language_modules[function] = frozenset(module.__name__ for module in used)
        modules = language_modules[function]
        if modules and modules <= patched:
            return triton_interpreter._LangPatchScope()  # nothing to restore
        scope = original_patch(function)
        patched.update(modules)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            patched.clear()

        scope.restore = restore_and_forget
        return scope

    triton_interpreter._patch_lang = patch


def install() -> None:
    """Repair the interpreter of this process; calling it again does nothing."""
    if getattr(InterpreterBuilder, "computes_like_a_gpu", False):
        return
    _patch_casts()
    _patch_dot()
    _patch_arithmetic()
    _patch_launch()
    _patch_language_once_per_launch()
    interpreter_speed.install()
    InterpreterBuilder.computes_like_a_gpu = True
