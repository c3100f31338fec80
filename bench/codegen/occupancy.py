"""How many thread blocks one multiprocessor holds at a time, and what limits them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.codegen.hardware import MULTIPROCESSORS
from bench.codegen.resources import Resources
from fastattn.kernels.targets import TENSOR_MEMORY_COLUMNS

_REGISTER_UNIT = 256  # per warp: CUDA occupancy calculator, "register allocation unit size"
_SHARED_UNIT = 128  # bytes


@dataclass(frozen=True)
class Occupancy:
    """`limited_by` is "registers", "warps", "shared memory", "blocks" or "tensor memory"."""

    blocks: int
    warps: int
    max_warps: int
    limited_by: str


def occupancy(resources: Resources) -> Occupancy:
    """The residency of a kernel on an NVIDIA target."""
    processor = MULTIPROCESSORS[resources.target]
    registers_per_warp = _round_up(max(resources.registers, 1) * 32, _REGISTER_UNIT)
    warps_allocated = _round_up(resources.num_warps, 4)  # registers belong to one of four schedulers
    shared = _round_up(resources.shared_bytes, _SHARED_UNIT)
    limits = {
        "registers": processor.registers // registers_per_warp // warps_allocated,
        "warps": processor.max_warps // resources.num_warps,
        "shared memory": processor.shared_total // (shared + processor.reserved_shared_per_block),
        "blocks": processor.max_blocks,
    }
    if resources.tensor_memory_columns:
        limits["tensor memory"] = TENSOR_MEMORY_COLUMNS // resources.tensor_memory_columns
    limited_by = min(limits, key=lambda name: limits[name])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * resources.num_warps, processor.max_warps, limited_by)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
