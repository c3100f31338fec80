"""The launches of a whole step in order, with the time that the model predicts for each.

    compute   FLOP ÷ (peak of the tensor cores · the kernel's alternating bound)
    memory    bytes of the tensor arguments, each touched once ÷ peak of DRAM
    predicted max(compute ÷ (share of the last wave of blocks that is filled), memory)

FLOP are the analytic count of the launch's shapes, visible pairs only. Work that PyTorch does between the launches
(weight gradients, embeddings, loss, optimizer), launch latency and L2 hits are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.codegen.hardware import MULTIPROCESSORS
from bench.codegen.report import Row
from fastattn.kernels.targets import find_target

Arguments = dict[str, Any]


def visible_pairs(queries: int, keys: int, left: int | None, right: int | None) -> int:
    """Pairs (row, column) with row + shift - left <= column <= row + shift + right, shift = keys - queries."""
    shift = keys - queries
    total = 0
    for row in range(queries):
        first = 0 if left is None else max(0, row + shift - left)
        last = keys - 1 if right is None else min(keys - 1, row + shift + right)
        total += max(0, last - first + 1)
    return total


def _attention(products_of_query_width: int, products_of_value_width: int) -> Callable[[Arguments], int]:
    def flops(arguments: Arguments) -> int:
        batch, heads, queries, head_dim = arguments["q_ptr"]["shape"]
        keys, value_dim = arguments["v_ptr"]["shape"][2:]
        pairs = visible_pairs(queries, keys, arguments["left"], arguments["right"])
        return 2 * batch * heads * pairs * (products_of_query_width * head_dim + products_of_value_width * value_dim)

    return flops


def _product(gate: str | None) -> Callable[[Arguments], int]:
    def flops(arguments: Arguments) -> int:
        products = 2 if gate and arguments[gate] is not None else 1
        return 2 * products * arguments["rows"] * arguments["columns"] * arguments["depth"]

    return flops


# q kᵀ, p v; q kᵀ, do vᵀ, ds k; k qᵀ, p do, v doᵀ, ds q
FLOPS: dict[str, Callable[[Arguments], int]] = {
    "attention_forward": _attention(1, 1),
    "attention_backward_query": _attention(2, 1),
    "attention_backward_key": _attention(2, 2),
    "linear_kernel": _product("GATE_WEIGHT"),
    "hidden_backward_kernel": _product(None),
    "input_backward_kernel": _product("GATE_WEIGHT"),
}


def predict(row: Row) -> dict[str, Any]:
    """{"kernel", "grid", "flops", "bytes", "compute", "memory", "predicted"}, times in microseconds."""
    resources, loop = row["resources"], row["loops"][0]
    target, processor = find_target(resources["target"]), MULTIPROCESSORS[resources["target"]]
    flops = FLOPS[resources["kernel"]](row["arguments"]) if resources["kernel"] in FLOPS else 0
    cycles_per_microsecond = processor.clock_ghz * 1e3 * target.multiprocessors
    compute = 0.0
    if flops and loop["alternating"]:
        compute = flops / (2 * processor.tensor * loop["alternating"] * cycles_per_microsecond)
    memory = row["minimum_bytes"] / (processor.dram * cycles_per_microsecond)
    waves = math.prod(resources["grid"]) / (target.multiprocessors * max(1, row["occupancy"]["blocks"]))
    filled = waves / math.ceil(waves)
    return {
        "kernel": resources["kernel"],
        "grid": resources["grid"],
        "flops": flops,
        "bytes": row["minimum_bytes"],
        "compute": compute,
        "memory": memory,
        "predicted": max(compute / filled, memory),
    }


def table(steps: Sequence[dict[str, Any]]) -> str:
    """One line per launch, in order."""
    lines = ["kernel                       blocks     GFLOP        MB   compute    memory  predicted µs"]
    for step in steps:
        blocks = math.prod(step["grid"])
        work = f"{step['flops'] / 1e9:9.3f} {step['bytes'] / 1e6:9.2f}"
        times = f"{step['compute']:9.1f} {step['memory']:9.1f} {step['predicted']:13.1f}"
        lines.append(f"{step['kernel']:26} {blocks:8} {work} {times}")
    total = sum(step["predicted"] for step in steps)
    return "\n".join([*lines, f"{len(steps)} launches, {total:.1f} µs predicted (the package's own kernels only)"])


def plot(steps: Sequence[dict[str, Any]], path: Path) -> Path:
    """A bar per launch along the time axis, coloured by kernel."""
    from matplotlib import pyplot

    kernels = list(dict.fromkeys(step["kernel"] for step in steps))
    figure, axes = pyplot.subplots(figsize=(11, 0.4 * len(kernels) + 1.2))
    start = 0.0
    for step in steps:
        lane = kernels.index(step["kernel"])
        axes.barh(lane, step["predicted"], left=start, color=f"C{lane % 10}")
        start += step["predicted"]
    axes.set_yticks(range(len(kernels)), kernels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("predicted time, µs")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
