"""What a compiled kernel needs: registers, spills, shared and tensor memory; which tensor-core instructions it has."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from bench.codegen.sass import disassemble, run_nvidia_tool
from fastattn.kernels.stand_in import Launch
from fastattn.kernels.targets import TENSOR_MEMORY_COLUMNS, Target, find_target

_TTIR_DOT = re.compile(r"(tt\.dot .*): tensor<((?:\d+x)+)(\w+)> \*")

# Instructions that multiply matrices: the widest form of each architecture, and the warp-level form for small tiles.
_WARP_LEVEL = ("HMMA", "QMMA", "IMMA", "OMMA")
_WIDEST = {"sm_90": ("HGMMA", "QGMMA", "IGMMA"), "sm_100": ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")}


@dataclass(frozen=True)
class Resources:
    """`spill_bytes` is the stack of one thread; `dots` counts the tl.dot calls that a tensor core should run."""

    kernel: str
    target: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    dots: int
    largest_dot_rows: int
    tensor_instructions: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Resources:
        return cls(**{**values, "grid": tuple(values["grid"])})

    def violations(self) -> list[str]:
        """Why this kernel must not ship: spills, more memory than the GPU has, or a dot that no tensor core runs."""
        target = find_target(self.target)
        where = f"{self.kernel} on {self.target}"
        found = []
        if self.spill_bytes > 0:
            found.append(f"{where} spills {self.spill_bytes} bytes per thread")
        if self.shared_bytes > target.shared_bytes:
            found.append(f"{where} needs {self.shared_bytes} bytes of shared memory of {target.shared_bytes}")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(
                f"{where} needs {self.tensor_memory_columns} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}"
            )
        wanted = self._wanted_tensor_instructions(target)
        if wanted and not any(name in self.tensor_instructions for name in wanted):
            found.append(f"{where} has {self.dots} dots, but none of {', '.join(wanted)} in its machine code")
        return found

    def _wanted_tensor_instructions(self, target: Target) -> tuple[str, ...]:
        if self.dots == 0:
            return ()
        if not target.is_nvidia:
            return ("MFMA",)
        is_warpgroup_wide = self.largest_dot_rows >= 64 and self.num_warps >= 4
        if target.name in _WIDEST and is_warpgroup_wide:
            return _WIDEST[target.name]
        return _WARP_LEVEL


def read_resources(launch: Launch) -> Resources:
    """The resources of the kernel that `launch` would run."""
    read = _read_nvidia if launch.target.is_nvidia else _read_amd
    registers, spill_bytes, tensor_instructions = read(launch)
    dot_rows = _tensor_core_dots(launch.text("ttir"))
    return Resources(
        kernel=launch.kernel,
        target=launch.target.name,
        grid=launch.grid,
        num_warps=launch.metadata.num_warps,
        num_stages=launch.metadata.num_stages,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=launch.metadata.shared,
        tensor_memory_columns=getattr(launch.metadata, "tmem_size", None) or 0,
        dots=len(dot_rows),
        largest_dot_rows=max(dot_rows, default=0),
        tensor_instructions=tensor_instructions,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(match[1])


def _read_nvidia(launch: Launch) -> tuple[int, int, dict[str, int]]:
    usage = run_nvidia_tool("cuobjdump", "-res-usage", binary=launch.binary)
    registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    if "tt.dot" not in launch.text("ttir"):  # nothing for a tensor core; the disassembly takes a while
        return registers, stack, {}
    program = disassemble(launch.binary)
    counts = {name: program.count(name) for names in (_WARP_LEVEL, *_WIDEST.values()) for name in names}
    return registers, stack, {name: count for name, count in counts.items() if count}


def _read_amd(launch: Launch) -> tuple[int, int, dict[str, int]]:
    assembly = launch.text("amdgcn")
    registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = _number(r"; ScratchSize: (\d+)", assembly)
    matrix_instructions = len(re.findall(r"^\s+v_mfma_", assembly, re.MULTILINE))
    return registers, scratch, {"MFMA": matrix_instructions} if matrix_instructions else {}


def _tensor_core_dots(ttir: str) -> list[int]:
    """The row counts of the dots in `ttir`, less those of fp32 operands at IEEE precision, which run on FMA units."""
    rows = []
    for dot, shape, dtype in _TTIR_DOT.findall(ttir):
        if dtype not in ("f32", "f64") or "inputPrecision = tf32" in dot:
            rows.append(int(shape.split("x")[-3]))  # of "64x32x": rows, depth
    return rows
