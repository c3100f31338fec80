"""A stand-in for Triton's GPU driver: `kernel[grid](...)` compiles for a chosen GPU, is recorded, and is not executed.

Everything up to the launch is the real thing: argument specialisation, choice of configuration, the grid, the compiler.
Only an autotuner cannot measure: it takes its first configuration that the GPU has the memory for.

    with stand_in("sm_90") as launches:
        fastattn.attention(query, key, value)       # CPU tensors; the result holds whatever the memory held
    print(launches[0].kernel, launches[0].grid)

The process must not run under TRITON_INTERPRET=1: an interpreted kernel never reaches a driver.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
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
    if isinstance(getattr(value, "base", None), torch.Tensor):  # a tensor descriptor
        return describe_argument(value.base)
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [describe_argument(item) for item in value]
    return getattr(value, "__name__", str(value))


def count_registers(binary: bytes) -> int:
    """Registers per thread of the kernel in a cubin or hsaco, as its loader would say; 0 where the file does not."""
    # an attribute of .nv.info (04 2f: REGCOUNT, 8 bytes: a symbol and the number), or a msgpack number of AMD's metadata
    nvidia = [
        int.from_bytes(found, "little") for found in re.findall(rb"\x04\x2f\x08\0.{4}(.{2}\0\0)", binary, re.DOTALL)
    ]
    amd = [found[-1] if len(found) < 3 else int.from_bytes(found[1:], "big")
           for found in re.findall(rb"\.vgpr_count([\0-\x7f]|\xcc.|\xcd..)", binary, re.DOTALL)]  # fmt: skip
    return max(nvidia or amd or [0])


class _DeviceUtils:
    """What Triton asks of a device before the first launch of a kernel."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        module = function = 1
        spills = 0  # Triton only stores it; `resources` reads the true number from the binary
        return module, function, count_registers(binary), spills, self.target.max_threads

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
        """Nothing can be timed: the first call that the GPU has the memory for is the fastest, those after it are not tried."""
        fitted = False

        def bench(kernel_call: Callable[[], object], quantiles: Sequence[float] = (0.5,), **kwargs: Any) -> list[float]:
            nonlocal fitted
            if fitted:
                return [2.0] * len(quantiles)
            before = len(self.launches)
            try:
                kernel_call()
            finally:
                del self.launches[before:]
            fitted = True
            return [1.0] * len(quantiles)

        return bench

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}
        files = {Path(path).suffix[1:]: Path(path) for path in group.values()}

        def record(x: int, y: int, z: int, stream: int, *runtime_and_arguments: Any) -> None:
            values = runtime_and_arguments[-len(source.fn.arg_names) :]
            arguments = {name: describe_argument(value) for name, value in zip(source.fn.arg_names, values)}
            self.launches.append(Launch(metadata.name, self.target, (x, y, z), arguments, metadata, files))

        return record


@contextlib.contextmanager
def _choosing_for(stand_in_driver: StandInDriver) -> Iterator[None]:
    """Let autotuners choose anew at each launch, and keep, in memory and on disk, only what they measured on a real GPU."""
    real = Autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = {"cache": {}, "cache_results": False, "do_bench": stand_in_driver.get_benchmarker()}
        known = {name: vars(self)[name] for name in changed if name in vars(self)}
        vars(self).update(changed)
        try:
            return real(self, *args, **kwargs)
        finally:
            for name in changed:
                del vars(self)[name]
            vars(self).update(known)

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = real


_drivers = {name: StandInDriver(target) for name, target in TARGETS.items()}


@contextlib.contextmanager
def stand_in(target_name: str) -> Iterator[list[Launch]]:
    """Let Triton compile for `target_name` inside the block; yields the list that fills with the launches."""
    stand_in_driver = _drivers[find_target(target_name).name]
    previous = driver._active
    stand_in_driver.launches = []
    driver.set_active(stand_in_driver)
    try:
        with _choosing_for(stand_in_driver):
            yield stand_in_driver.launches
    finally:
        driver._active = previous
