"""The GPUs that kernels are compiled for, with the limits a launch has to keep."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU. `shared_bytes` is the most that one program may have, `multiprocessors` counts SMs or compute units."""

    name: str
    product: str
    multiprocessors: int
    shared_bytes: int
    registers_per_multiprocessor: int = 65536
    max_threads: int = 1024

    @property
    def is_nvidia(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def arch(self) -> int | str:
        return int(self.name.removeprefix("sm_")) if self.is_nvidia else self.name

    @property
    def warp_size(self) -> int:
        return 32 if self.is_nvidia else 64

    @property
    def triton(self) -> GPUTarget:
        return GPUTarget("cuda" if self.is_nvidia else "hip", self.arch, self.warp_size)


# Shared memory: CUDA programming guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide (LDS).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 108, 163 * KIB),
        Target("sm_86", "RTX A6000", 84, 99 * KIB),
        Target("sm_89", "L40S", 142, 99 * KIB),
        Target("sm_90", "H100", 132, 227 * KIB),
        Target("sm_100", "B200", 148, 227 * KIB),
        Target("sm_120", "RTX PRO 6000", 188, 99 * KIB),
        Target("gfx942", "MI300X", 304, 64 * KIB, registers_per_multiprocessor=131072),
    )
}
TENSOR_MEMORY_COLUMNS = 512  # of one sm_100 multiprocessor: PTX ISA, "Tensor Memory"


def find_target(name: str) -> Target:
    """The target called `name`; raises ValueError that lists the known ones."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
