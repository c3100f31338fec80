"""All that the machine code of one launch says: resources, occupancy, and a report per loop."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from bench.codegen.bounds import LoopReport, report_loop
from bench.codegen.hardware import MULTIPROCESSORS
from bench.codegen.loops import find_loops
from bench.codegen.occupancy import Occupancy, occupancy
from bench.codegen.resources import Resources, read_resources
from bench.codegen.sass import disassemble
from fastattn.kernels.stand_in import Launch


@dataclass(frozen=True)
class KernelReport:
    """`loops` are the innermost loops, hottest first; a kernel without a loop has one entry, the whole kernel.

    For gfx942 there is no pipe model: `loops` is empty and `instruction_mix` counts the whole kernel's instructions.
    """

    resources: Resources
    occupancy: Occupancy | None
    loops: list[LoopReport]
    instruction_mix: dict[str, int]

    @property
    def hot_loop(self) -> LoopReport | None:
        return self.loops[0] if self.loops else None

    def as_json(self) -> dict[str, Any]:
        return {
            "resources": self.resources.as_json(),
            "violations": self.resources.violations(),
            "occupancy": asdict(self.occupancy) if self.occupancy else None,
            "loops": [loop.as_json() for loop in self.loops],
            "instruction_mix": self.instruction_mix,
        }


def analyse(launch: Launch) -> KernelReport:
    """Read the machine code behind `launch`."""
    resources = read_resources(launch)
    if not launch.target.is_nvidia:
        return KernelReport(resources, None, [], _amd_mix(launch.text("amdgcn")))
    program = disassemble(launch.binary)
    processor = MULTIPROCESSORS[launch.target.name]
    warps = resources.num_warps
    loops = [
        report_loop(program, loop.instructions, processor, warps, is_whole_kernel=False)
        for loop in find_loops(program)
        if loop.is_innermost
    ]
    loops.sort(key=lambda loop: (-loop.tensor_flops, loop.instructions if loop.tensor_flops else -loop.instructions))
    if not loops:
        everything = tuple(range(len(program.instructions)))
        loops = [report_loop(program, everything, processor, warps, is_whole_kernel=True)]
    mix = Counter(instruction.opcode for instruction in program.instructions)
    return KernelReport(resources, occupancy(resources), loops, dict(mix.most_common()))


def minimum_bytes(arguments: dict[str, Any]) -> int:
    """What DRAM moves if every element of the tensor arguments is touched once, in bytes."""
    total = 0
    for argument in arguments.values():
        if isinstance(argument, dict):
            elements = 1
            for size, stride in zip(argument["shape"], argument["strides"]):
                elements *= size if stride else 1  # a broadcast dimension
            total += elements * argument["itemsize"]
    return total


def _amd_mix(assembly: str) -> dict[str, int]:
    families = {"v_mfma": "mfma", "v_exp": "exp", "ds_": "lds", "global_": "global", "buffer_": "global",
                "scratch_": "scratch", "v_": "vector", "s_": "scalar"}  # fmt: skip
    mix: Counter[str] = Counter()
    for mnemonic in re.findall(r"^\s+([a-z]\w+)\s", assembly, re.MULTILINE):
        family = next((name for prefix, name in families.items() if mnemonic.startswith(prefix)), None)
        if family:
            mix[family] += 1
    return dict(mix.most_common())
