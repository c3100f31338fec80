"""Budgets: what each kernel needed when it was last judged good, in budgets.json, and what counts as worse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from bench.codegen.cases import CASES, Case
from bench.codegen.report import Row

FILE = Path(__file__).with_name("budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NAMES = (
    "attention bf16 D64 causal", "attention bf16 D128 causal", "attention bf16 D128 blocks", "kv cache bf16 D128",
    "norm bf16 768", "norm bf16 8192", "feed_forward bf16 gelu", "rotary bf16 D128", "linear cross entropy bf16",
    "cross entropy bf16 of 50304", "varlen bfloat16 D256 causal", "varlen bfloat16 D256 everything", "attention bf16 D64 dropout",
    "attention bf16 D64 large mask",
)  # fmt: skip
# How much worse a figure may become before a test fails: compilers move registers and instructions around a little.
MORE_REGISTERS, MORE_INSTRUCTIONS, LESS_SHARE, MORE_PER_DRAM = 8, 1.02, 0.01, 1.05

Budget = dict[str, Any]


def budget_cases() -> list[Case]:
    """What a transformer launches in training, and the widest packed heads, which leave the fewest registers."""
    return [case for case in CASES if case.name in NAMES]


def budget_of(row: Row) -> Budget:
    """The figures of a report's row that are kept; AMD's have those of the resources alone."""
    resources, loop = row["resources"], row["loops"][0] if row["loops"] else {}
    kept = ("instructions", "alternating", "overlapped", "pipe_per_dram", "bytes_per_global_access", "wide_share")
    return {
        "registers": resources["registers"],
        "spill_bytes": resources["spill_bytes"],
        "shared_bytes": resources["shared_bytes"],
        **{
            name: round(loop[name], 3) if isinstance(loop[name], float) else loop[name] for name in kept if name in loop
        },
    }


def budgets_of(rows: Sequence[Row]) -> dict[str, Budget]:
    """The budget of each different kernel; several of one name in one case and target are numbered."""
    found: dict[str, Budget] = {}
    for row in rows:
        key = f"{row['case']} | {row['resources']['target']} | {row['resources']['kernel']}"
        budget, number = budget_of(row), 1
        while found.get(name := f"{key} {number}" if number > 1 else key, budget) != budget:
            number += 1
        found[name] = budget
    return found


def regressions(now: Budget, before: Budget) -> list[str]:
    """In which figures `now` is worse than `before`."""
    limits = {
        "registers": before["registers"] + MORE_REGISTERS,
        "spill_bytes": before["spill_bytes"],
        "shared_bytes": before["shared_bytes"],
        "instructions": _times(before.get("instructions"), MORE_INSTRUCTIONS),
        "pipe_per_dram": _times(before.get("pipe_per_dram"), MORE_PER_DRAM),
    }
    floors = {
        "alternating": _minus(before.get("alternating"), LESS_SHARE),
        "overlapped": _minus(before.get("overlapped"), LESS_SHARE),
        "bytes_per_global_access": _minus(before.get("bytes_per_global_access"), LESS_SHARE),
        "wide_share": _minus(before.get("wide_share"), LESS_SHARE),
    }
    worse = []
    for name, limit in limits.items():
        if limit is not None and now[name] is not None and now[name] > limit:
            worse.append(f"{name} {now[name]:g}, was {before[name]:g}")
    for name, floor in floors.items():
        if floor is not None and (now[name] is None or now[name] < floor):
            worse.append(f"{name} {now[name]}, was {before[name]:g}")
    return worse


def read() -> dict[str, Any]:
    """{"triton": version, "budgets": {key: budget}}"""
    return json.loads(FILE.read_text())


def write(rows: Sequence[Row]) -> list[str]:
    """Replace the budgets by what `rows` say; returns the differences as lines."""
    old = read()["budgets"] if FILE.exists() else {}
    new = budgets_of(rows)
    budgets = ",\n".join(f"  {json.dumps(key)}: {json.dumps(budget)}" for key, budget in sorted(new.items()))
    FILE.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "budgets": {{\n{budgets}\n }}\n}}\n')
    lines = [f"- {key}" for key in sorted(old.keys() - new.keys())]
    lines += [f"+ {key}" for key in sorted(new.keys() - old.keys())]
    for key in sorted(old.keys() & new.keys()):
        changed = [f"{n} {old[key].get(n)} → {value}" for n, value in new[key].items() if old[key].get(n) != value]
        if changed:
            lines.append(f"{'!' if regressions(new[key], old[key]) else '~'} {key}: {', '.join(changed)}")
    return lines


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _minus(value: float | None, amount: float) -> float | None:
    return None if value is None else value - amount
