"""Bounds on the speed of a loop, from the cycles that each pipe needs for one iteration of one thread block.

With T the cycles of the tensor work at the architecture's dense peak, a loop with tensor instructions gets three bounds
on tensor-core utilisation:

* overlapped    T / (busiest pipe): every pipe overlaps perfectly with the others, also across warps and blocks;
* alternating   T / (tensor pipe + busiest other pipe): tensor and other work take turns, the realistic one;
* serial        T / (sum of all pipes): nothing overlaps.

A loop without tensor work (or a whole kernel without a loop) gets pipe_per_dram instead: busiest pipe ÷ cycles that
DRAM needs for the bytes the instructions ask for. Below 1 the code can keep up with DRAM.

Every block of the body counts as executed. Not modelled: latencies, bank conflicts, L2 hits, power limits, bytes
moved by TMA, warp specialisation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from bench.codegen.hardware import Multiprocessor
from bench.codegen.pipes import access_bytes, cost
from bench.codegen.sass import Program

_GLOBAL_KINDS = ("global load", "global store")
_ISSUE_CYCLES = 0.25  # four schedulers, one instruction per clock each


@dataclass(frozen=True)
class LoopReport:
    """One loop (or `whole kernel`) per iteration of one block. `global_widths` counts accesses by bytes per lane."""

    is_whole_kernel: bool
    instructions: int
    kinds: dict[str, int]
    cycles: dict[str, float]
    tensor_flops: float
    ideal_tensor_cycles: float
    dram_cycles: float
    global_widths: dict[int, int]

    @property
    def busiest(self) -> str:
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def overlapped(self) -> float | None:
        return self._share(max(self.cycles.values()))

    @property
    def alternating(self) -> float | None:
        others = [value for pipe, value in self.cycles.items() if pipe != "tensor"]
        return self._share(self.cycles.get("tensor", 0.0) + max(others))

    @property
    def serial(self) -> float | None:
        return self._share(sum(value for pipe, value in self.cycles.items() if pipe != "issue"))

    @property
    def pipe_per_dram(self) -> float | None:
        if self.ideal_tensor_cycles or not self.dram_cycles:
            return None
        return max(value for pipe, value in self.cycles.items() if pipe != "L2") / self.dram_cycles

    @property
    def bytes_per_global_access(self) -> float | None:
        accesses = sum(self.global_widths.values())
        return self._global_bytes() / accesses if accesses else None

    @property
    def wide_share(self) -> float | None:
        """Of the bytes of global accesses, those in accesses of 16 bytes (or more) a lane."""
        total = self._global_bytes()
        return self._global_bytes(at_least=16) / total if total else None

    def _global_bytes(self, at_least: int = 0) -> int:
        return sum(size * count for size, count in self.global_widths.items() if size >= at_least)

    def _share(self, cycles: float) -> float | None:
        return self.ideal_tensor_cycles / cycles if self.ideal_tensor_cycles else None

    def as_json(self) -> dict[str, Any]:
        return {
            "is_whole_kernel": self.is_whole_kernel,
            "instructions": self.instructions,
            "kinds": self.kinds,
            "cycles": {pipe: round(value, 2) for pipe, value in self.cycles.items()},
            "busiest": self.busiest,
            "tensor_flops": self.tensor_flops,
            "overlapped": self.overlapped,
            "alternating": self.alternating,
            "serial": self.serial,
            "pipe_per_dram": self.pipe_per_dram,
            "bytes_per_global_access": self.bytes_per_global_access,
            "wide_share": self.wide_share,
            "global_widths": {str(size): count for size, count in sorted(self.global_widths.items())},
        }


def report_loop(
    program: Program, indices: tuple[int, ...], processor: Multiprocessor, warps: int, is_whole_kernel: bool
) -> LoopReport:
    """Add up the costs of the instructions at `indices`, each executed once by every warp of a block."""
    kinds: Counter[str] = Counter()
    cycles: defaultdict[str, float] = defaultdict(float)
    widths: Counter[int] = Counter()
    multiply_adds = ideal_tensor_cycles = global_bytes = 0.0
    for index in indices:
        price = cost(program, index, processor, warps)
        kinds[price.kind] += 1
        cycles["issue"] += _ISSUE_CYCLES * warps
        for pipe, value in price.cycles.items():
            cycles[pipe] += value * warps
        multiply_adds += price.multiply_adds * warps
        ideal_tensor_cycles += price.ideal_tensor_cycles * warps
        global_bytes += price.global_bytes * warps
        if price.kind in _GLOBAL_KINDS:
            widths[access_bytes(program.instructions[index])] += 1
    fp32_lanes, multiply_lanes = cycles.pop("fp32 lanes", 0.0), cycles.pop("multiply lanes", 0.0)
    if fp32_lanes or multiply_lanes:
        cycles["fma"] = max(multiply_lanes / processor.integer, (fp32_lanes + multiply_lanes) / processor.fp32)
    return LoopReport(
        is_whole_kernel=is_whole_kernel,
        instructions=len(indices),
        kinds=dict(kinds.most_common()),
        cycles=dict(sorted(cycles.items(), key=lambda item: -item[1])),
        tensor_flops=2 * multiply_adds,
        ideal_tensor_cycles=ideal_tensor_cycles,
        dram_cycles=global_bytes / processor.dram,
        global_widths=dict(widths),
    )
