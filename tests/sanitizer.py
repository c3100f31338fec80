"""Checks every memory access of an interpreted kernel: within the tensors passed in, and free of races. And its integers' overflow.

The programs of a grid run in any order and at the same time on a GPU, but one after the other in the interpreter, so
that a race gives the right answer in every test. `install()` makes each launch keep, for every element of every tensor
argument, which program stored to it, read it and updated it atomically, and raises

* `OutOfBounds` for an access outside the elements of all tensor arguments. The elements are those that shape and
  strides reach: the gaps between the rows of a strided view are out of bounds, too;
* `Race` when two programs touch one element and at least one of them stores (two atomic updates are fine), or when one
  store writes an element twice;
* `AssertionError` for an integer of up to 32 bits that overflows where the kernel does not say that it may
  (`sanitize_overflow=False`). Triton's interpreter drops this check unless asked to debug.

The state starts anew with each launch: launches are ordered on a stream. What a single program stores and reads back
itself is not checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
NOBODY, SEVERAL = -1, -2  # the other values of the state arrays are program numbers


class SanitizerError(Exception):
    """A kernel did what would be undefined on a GPU."""


class OutOfBounds(SanitizerError):
    """An access outside the elements of the tensors that were passed to the kernel."""


class Race(SanitizerError):
    """Two programs, or one store twice, touch the same element without an order between them."""


@dataclass
class Memory:
    """The stretch of one storage that the tensor arguments reach, in cells of the smallest element size among them."""

    start: int
    cell_bytes: int
    in_bounds: np.ndarray
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    updater: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer, self.reader, self.updater = np.full((3, self.in_bounds.size), NOBODY, dtype=np.int32)

    @property
    def stop(self) -> int:
        return self.start + self.in_bounds.size * self.cell_bytes

    @classmethod
    def of(cls, views: list[torch.Tensor]) -> Memory:
        start = min(view.data_ptr() for view in views)
        stop = max(view.data_ptr() + _span(view) * view.element_size() for view in views)
        cell_bytes = min(view.element_size() for view in views)
        in_bounds = np.zeros((stop - start) // cell_bytes, dtype=bool)
        for view in views:
            cells = view.element_size() // cell_bytes
            first = (view.data_ptr() - start) // cell_bytes
            elements = np.lib.stride_tricks.as_strided(
                in_bounds[first:], (*view.shape, cells), (*(stride * cells for stride in view.stride()), 1)
            )
            elements[...] = True
        return cls(start, cell_bytes, in_bounds)

    def cells(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = (addresses - np.uint64(self.start)).view(np.int64) // self.cell_bytes
        if size == self.cell_bytes:
            return first
        return (first[:, None] + np.arange(size // self.cell_bytes)).ravel()

    def read(self, cells: np.ndarray, program: int) -> None:
        self._refuse_others(self.writer, cells, program, "reads an element that another program stores")
        self._refuse_others(self.updater, cells, program, "reads an element that another program updates")
        reader = self.reader[cells]
        self.reader[cells] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def write(self, cells: np.ndarray, program: int) -> None:
        if np.unique(cells).size != cells.size:
            raise Race(f"program {program} writes one element twice in a single store")
        self._refuse_others(self.writer, cells, program, "stores to an element that another program stores to")
        self._refuse_others(self.reader, cells, program, "stores to an element that another program reads")
        self._refuse_others(self.updater, cells, program, "stores to an element that another program updates")
        self.writer[cells] = program

    def update(self, cells: np.ndarray, program: int) -> None:
        self._refuse_others(self.writer, cells, program, "atomically updates an element that another program stores to")
        self._refuse_others(self.reader, cells, program, "atomically updates an element that another program reads")
        updater = self.updater[cells]
        self.updater[cells] = np.where((updater == NOBODY) | (updater == program), program, SEVERAL)

    def _refuse_others(self, state: np.ndarray, cells: np.ndarray, program: int, what: str) -> None:
        holder = state[cells]
        conflict = (holder != NOBODY) & (holder != program)
        if conflict.any():
            cell, other = cells[conflict][0], holder[conflict][0]
            other_name = "several programs" if other == SEVERAL else f"program {other}"
            raise Race(f"program {program} {what} (cell {cell} of the tensor at {self.start:#x}, {other_name})")


class Launch:
    """The memory of one launch and the program that runs at the moment."""

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.program = 0

    def register(self, arguments: Any) -> None:
        storages: dict[int, list[torch.Tensor]] = {}
        for tensor in _tensors(arguments):
            if tensor.numel() > 0:
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.memories = [Memory.of(views) for views in storages.values()]

    def access(self, kind: str, pointers: TensorHandle, mask: Any) -> None:
        addresses = np.asarray(pointers.data, dtype=np.uint64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(getattr(mask, "data", mask), addresses.shape)]
        addresses = addresses.ravel()
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lowest, highest = int(addresses.min()), int(addresses.max()) + size
        for memory in self.memories:
            if memory.start <= lowest and highest <= memory.stop:
                cells = memory.cells(addresses, size)
                if not memory.in_bounds[cells].all():
                    break
                getattr(memory, kind)(cells, self.program)
                return
        self._refuse(kind, addresses, size)

    def _refuse(self, kind: str, addresses: np.ndarray, size: int) -> None:
        """Name the first address of a bad access; the tile may still begin in one tensor and end in another."""
        for address in addresses:
            memory = next((m for m in self.memories if m.start <= address and int(address) + size <= m.stop), None)
            if memory is None or not memory.in_bounds[memory.cells(np.atleast_1d(address), size)].all():
                extents = ", ".join(f"[{m.start:#x}, {m.stop:#x})" for m in self.memories)
                raise OutOfBounds(f"program {self.program}: {kind} at {int(address):#x} is in no tensor: {extents}")
            getattr(memory, kind)(memory.cells(np.atleast_1d(address), size), self.program)


def _span(view: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride()))


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)
    elif isinstance(argument, torch.Tensor):
        yield argument
    elif hasattr(argument, "base"):  # a tensor descriptor or a reinterpreted tensor
        yield from _tensors(argument.base)


_current: Launch | None = None


def _watch(method_name: str, kind: str, mask_position: int | None) -> None:
    original = getattr(InterpreterBuilder, method_name)
    pointer_position = 1 if method_name == "create_atomic_rmw" else 0

    @functools.wraps(original)
    def watched(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        if _current is not None:
            mask = None if mask_position is None else args[mask_position]
            _current.access(kind, args[pointer_position], mask)
        return original(self, *args, **kwargs)

    setattr(InterpreterBuilder, method_name, watched)


def _refuse_overflow(self: TritonSemantic, lhs: Any, rhs: Any, binary_op: Callable) -> None:
    integer, name = lhs.dtype, binary_op.__name__
    if integer.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    exact = _EXACTLY[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    fits = exact.min() >= integer.get_int_min_value() and exact.max() <= integer.get_int_max_value()
    assert fits, f"int{integer.int_bitwidth} overflow detected for operation {name}"


def install() -> None:
    """Watch every interpreted launch of this process; calling it again does nothing. Import `fastattn` before."""
    if getattr(InterpreterBuilder, "is_watched", False):
        return
    InterpreterBuilder.is_watched = True
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    _watch("create_masked_load", "read", mask_position=1)
    _watch("create_masked_store", "write", mask_position=2)
    _watch("create_atomic_rmw", "update", mask_position=3)
    _watch("create_atomic_cas", "update", mask_position=None)

    original_launch, original_copy, original_program = (
        GridExecutor.__call__,
        GridExecutor._init_args_hst,
        InterpreterBuilder.set_grid_idx,
    )

    @functools.wraps(original_launch)
    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        global _current
        _current = Launch()
        try:
            return original_launch(self, *args, **kwargs)
        finally:
            _current = None

    def copy_arguments(self: GridExecutor, args: Any, kwargs: dict[str, Any]) -> Any:
        host_args, host_kwargs = original_copy(self, args, kwargs)
        if _current is not None:
            _current.register([*host_args, *host_kwargs.values()])
        return host_args, host_kwargs

    def set_program(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        if _current is not None:
            _, size_y, size_z = self.grid_dim
            _current.program = (x * size_y + y) * size_z + z
        original_program(self, x, y, z)

    GridExecutor.__call__ = launch
    GridExecutor._init_args_hst = copy_arguments
    InterpreterBuilder.set_grid_idx = set_program
