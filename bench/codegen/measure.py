"""Measured against predicted, launch by launch, on a machine that has a GPU: `python -m bench.codegen --measure`.

The predictions come from a process that compiles for this GPU without running anything (`timeline.predict`), the
measurements from PyTorch's profiler over real runs of the same functions. Both see the same launches in the same order.
Without a GPU there are only predictions, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

import torch

from bench.codegen import cases, timeline
from bench.codegen.worker import CompileWorker

WARM_UP, RUNS = 3, 20


@dataclass(frozen=True)
class Workload:
    """A function of `bench.codegen.cases` at sizes that fill a GPU."""

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        getattr(cases, self.function)(**self.arguments)


_LONG = {"batch": 4, "heads": 16, "kv_heads": 16, "queries": 4096, "keys": 4096}
WORKLOADS = (
    Workload("attention D64 causal", "attention", {**_LONG, "head_dim": 64, "flags": ("causal",)}),
    Workload("attention D128 causal", "attention", {**_LONG, "head_dim": 128, "flags": ("causal",)}),
    Workload("attention D128", "attention", {**_LONG, "head_dim": 128}),
    Workload("feed-forward 8192 x 1024 to 4096", "feed_forward", {"rows": 8192, "width": 1024, "hidden": 4096}),
    Workload("layer norm 16384 x 4096", "normalization", {"rows": 16384, "width": 4096}),
    Workload("cross entropy 4096 x 50304", "cross_entropy", {"rows": 4096, "classes": 50304}),
    Workload("training step", "training_step"),
    Workload("decode step", "decode_step"),
)


@dataclass(frozen=True)
class Comparison:
    """A launch; times in microseconds, `measured` is None without a GPU."""

    workload: str
    kernel: str
    predicted: float
    measured: float | None


def predictions(workload: Workload, target: str) -> list[dict[str, Any]]:
    """`timeline.predict` of each launch, in order."""
    with CompileWorker() as worker:
        rows = worker.reports(f"{cases.__name__}:{workload.function}", target, **workload.arguments)
    return [timeline.predict(row) for row in rows]


def measurements(run: Callable[[], object], kernels: Sequence[str]) -> list[float]:
    """Median microseconds of each launch of `kernels` (names in launch order) in a run on this machine's GPU."""
    from torch.profiler import ProfilerActivity, profile

    with torch.device("cuda"):
        for _ in range(WARM_UP):
            run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(RUNS):
                run()
            torch.cuda.synchronize()
    events = sorted(profiler.events() or (), key=lambda event: event.time_range.start)
    return launch_medians([(event.name, event.time_range.elapsed_us()) for event in events], kernels)


def launch_medians(events: Sequence[tuple[str, float]], kernels: Sequence[str]) -> list[float]:
    """Of events (name, microseconds) of whole runs, one after the other: the median of each launch of a run.

    Raises:
        ValueError: the events that bear one of the names are not repetitions of `kernels`.
    """
    ours = [event for event in events if event[0] in kernels]
    runs = [ours[start : start + len(kernels)] for start in range(0, len(ours), len(kernels))]
    for number, run in enumerate(runs):
        if [name for name, _ in run] != list(kernels):
            raise ValueError(f"run {number} launched {[name for name, _ in run]}, predicted were {list(kernels)}")
    return [median(times) for times in zip(*([time for _, time in run] for run in runs))]


def compare(workload: Workload, target: str, on_gpu: bool) -> list[Comparison]:
    steps = predictions(workload, target)
    kernels = [step["kernel"] for step in steps]
    measured: Sequence[float | None] = measurements(workload.run, kernels) if on_gpu else [None] * len(steps)
    return [Comparison(workload.name, step["kernel"], step["predicted"], time) for step, time in zip(steps, measured)]


def table(comparisons: Sequence[Comparison]) -> str:
    """A line per kernel of a workload, its launches added up, and the mean of the ratios."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.workload, comparison.kernel), []).append(comparison)
    lines = ["| workload | kernel | launches | predicted µs | measured µs | measured ÷ predicted |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    ratios = []
    for (workload, kernel), launches in groups.items():
        predicted = sum(launch.predicted for launch in launches)
        start = f"| {workload} | {kernel.lstrip('_')} | {len(launches)} | {predicted:.1f} |"
        times = [launch.measured for launch in launches if launch.measured is not None]
        if times:
            ratios.append(sum(times) / predicted)
            lines.append(f"{start} {sum(times):.1f} | {ratios[-1]:.2f} |")
        else:
            lines.append(f"{start} | |")
    if ratios:
        lines.append(f"\nmeasured ÷ predicted: {geometric_mean(ratios):.2f} (geometric mean of {len(ratios)} kernels)")
    else:
        lines.append("\nNothing was measured: this machine has no GPU. With one, `make gpu` fills in the last columns.")
    return "\n".join(lines)
