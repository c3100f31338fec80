"""A stand-in for Triton's GPU driver: `kernel[grid](...)` compiles for a chosen GPU, is recorded, and is not executed.

Everything up to the launch is the real thing: argument specialisation, choice of configuration, the grid, the compiler.

    with stand_in("sm_90") as launches:
        fastattn.attention(query, key, value)       # CPU tensors; the result holds whatever the memory held
    print(launches[0].kernel, launches[0].grid)

The process must not run under TRITON_INTERPRET=1: an interpreted kernel never reaches a driver.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from fastattn.kernels.targets import TARGETS, Target, find_target


@dataclass(frozen=True)
class Launch:
    """One launch. `arguments` holds shapes and strides for tensors, values for scalars, constexprs included."""

    kernel: str
    target: Target
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    metadata: Any
    files: dict[str, Path]

    def text(self, stage: str) -> str:
        """The compiler's text at `stage`: ttir, ttgir, llir, ptx or amdgcn."""
        return self.files[stage].read_text()

    @property
    def binary(self) -> bytes:
        return self.files["cubin" if self.target.is_nvidia else "hsaco"].read_bytes()


def describe_argument(value: Any) -> Any:
    """A JSON-able summary of a kernel argument."""
    if isinstance(value, torch.Tensor):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "itemsize": value.element_size(),
            "shape": [*value.shape],
            "strides": [*value.stride()],
        }
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [describe_argument(item) for item in value]
    return getattr(value, "__name__", str(value))


class _DeviceUtils:
    """What Triton asks of a device before the first launch of a kernel."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        module = function = 1
        registers = spills = 0  # Triton only stores these two; `resources` reads the true numbers from the binary
        return module, function, registers, spills, self.target.max_threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.shared_bytes,
            "multiprocessor_count": self.target.multiprocessors,
            "max_num_regs": self.target.registers_per_multiprocessor,
            "warpSize": self.target.warp_size,
        }


class StandInDriver:
    """Answers like the driver of a machine with one GPU of the kind `target`, and appends launches to `launches`."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = _DeviceUtils(target)
        self.launches: list[Launch] = []

    def get_current_target(self) -> GPUTarget:
        return self.target.triton

    def get_current_device(self) -> int:
        return -1 - [*TARGETS].index(self.target.name)  # kernels are cached by this number, which must be no real GPU's

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return type_name

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Nothing can be timed, so that an autotuner takes its first configuration."""
        return lambda kernel_call, quantiles=(0.5,), **kwargs: [1.0] * len(quantiles)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}
        files = {Path(path).suffix[1:]: Path(path) for path in group.values()}

        def record(x: int, y: int, z: int, stream: int, *runtime_and_arguments: Any) -> None:
            values = runtime_and_arguments[-len(source.fn.arg_names) :]
            arguments = {name: describe_argument(value) for name, value in zip(source.fn.arg_names, values)}
            self.launches.append(Launch(metadata.name, self.target, (x, y, z), arguments, metadata, files))

        return record


_drivers = {name: StandInDriver(target) for name, target in TARGETS.items()}


@contextlib.contextmanager
def stand_in(target_name: str) -> Iterator[list[Launch]]:
    """Let Triton compile for `target_name` inside the block; yields the list that fills with the launches."""
    stand_in_driver = _drivers[find_target(target_name).name]
    previous = driver._active
    stand_in_driver.launches = []
    driver.set_active(stand_in_driver)
    try:
        yield stand_in_driver.launches
    finally:
        driver._active = previous
