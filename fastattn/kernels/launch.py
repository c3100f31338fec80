"""The one place where kernels are launched, and what the launchers ask of the device and of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from fastattn.interpreting import interpreting

INTERPRETING = interpreting()  # as Triton, which has just read it
TRITON_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Target:
    """What the configurations depend on.

    Attributes:
        backend: "cuda", "hip", "xpu", or "interpreter".
        arch: compute capability as in sm_90 → 90 on CUDA; 0 elsewhere.
        processors: streaming multiprocessors (compute units) of the device.
        tf32: whether products of fp32 may be asked for in TF32.
        triton_version: of the compiler, 3.7.1 as (3, 7).
    """

    backend: str
    arch: int
    processors: int
    tf32: bool = True
    triton_version: tuple[int, ...] = TRITON_VERSION

    @property
    def family(self) -> str:
        """Whose tiles it takes: "amd", "sm_80", "sm_90", "sm_100" (sm_103 as well), or "small": those for little shared memory."""
        if self.backend == "hip":
            return "amd"
        return {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(self.arch, "small")

    @property
    def has_newer_triton(self) -> bool:
        """3.8 or newer (compiled: 3.9.0), which leaves other values in registers and so asks for other tiles here and there."""
        return self.triton_version >= (3, 8)


MOST_ALONG_OTHER_AXES = 65_535  # programs along a grid's second and third axis, on NVIDIA's and AMD's GPUs

# Triton's own message is "0 active drivers ([]). There should only be one."
_NO_GPU = (
    "the Triton backend needs a GPU, and Triton finds none here; for tensors on the CPU set TRITON_INTERPRET=1 (slow), or "
    "take the backend 'auto' or 'eager'"
)


@cache
def _target(device: int) -> Target:
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(device)
    arch = int(target.arch) if target.backend == "cuda" else 0
    return Target(target.backend, arch, properties["multiprocessor_count"], has_tf32(target))


def has_tf32(target: GPUTarget) -> bool:
    """Of AMD's GPUs gfx942 alone has it; for the others Triton refuses a product that asks for it."""
    return "tf32" in make_backend(target).parse_options({}).allowed_dot_input_precisions


def current_target() -> Target:
    """The target that launches compile for now (under the interpreter: small blocks suffice).

    Raises:
        RuntimeError: there is no GPU.
    """
    if INTERPRETING:
        return Target("interpreter", 0, 4)
    try:
        driver = triton.runtime.driver.active
    except RuntimeError as error:
        raise RuntimeError(_NO_GPU) from error
    return _target(driver.get_current_device())


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """An optional tensor whose strides a kernel does not ask for."""
    return None if tensor is None else tensor.contiguous()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
    **constexprs: Any,
) -> None:
    """`kernel[grid](*args, **constexprs)`, unless the grid is empty. PRECISION "tf32" is "ieee" on a GPU without.

    What grows lies along the first axis. (Not so of a bias's gradient, whose kernel spills with one axis on gfx942.)

    FP fusion is always asked for: Triton 3.9 warns without, and 3.10 turns it off by default.
    """
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MOST_ALONG_OTHER_AXES:
        raise ValueError(
            f"{kernel.__name__} would need a grid of {grid}: GPUs take at most {MOST_ALONG_OTHER_AXES} along the second and third "
            "axis, so there are too many rows or keys"
        )
    if max_registers is not None and current_target().backend == "cuda":
        constexprs["maxnreg"] = max_registers
    if constexprs.get("PRECISION") == "tf32" and not current_target().tf32:  # which torch's settings allow, not ask for
        constexprs["PRECISION"] = "ieee"
    try:
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    except triton.OutOfResources as error:  # tiles are made for the GPUs that targets.py names, and like ones
        raise RuntimeError(
            f"{kernel.__name__} does not fit this GPU, which has {error.limit} of {error.name} where {error.required} are needed; "
            "take the backend 'eager'"
        ) from error
    except RuntimeError as error:
        if "0 active drivers" not in str(error):
            raise
        raise RuntimeError(_NO_GPU) from error
