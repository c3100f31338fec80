"""Plots of a report: predicted bounds per kernel, and registers against resident warps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot_bounds(rows: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """bounds.png: the predicted share of tensor peak of each kernel, alternating (solid) to overlapped (light)."""
    bars = [
        (f"{row['case']} · {row['resources']['kernel'].strip('_')}", row["resources"]["target"], row["loops"][0])
        for row in rows
        if row["loops"] and row["loops"][0]["alternating"] is not None
    ]
    if not bars:
        return []
    targets = sorted({target for _, target, _ in bars})
    figure, all_axes = pyplot.subplots(
        1, len(targets), figsize=(4 + 3 * len(targets), 1 + 0.28 * len(bars) / len(targets)), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for axes, target in zip(all_axes[0], targets):
        chosen = [(label, loop) for label, of, loop in bars if of == target][::-1]
        labels = [label for label, _ in chosen]
        axes.barh(labels, [100 * loop["overlapped"] for _, loop in chosen], color="#c6dbef", label="all overlaps")
        axes.barh(labels, [100 * loop["alternating"] for _, loop in chosen], color="#3182bd", label="in turns")
        axes.set(title=target, xlabel="predicted % of tensor peak", xlim=(0, 100))
        axes.tick_params(axis="y", labelsize=7)
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside upper right", fontsize=7, ncols=2)
    return [_save(figure, directory / "bounds.png")]


def plot_occupancy(rows: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """occupancy.png: registers per thread against resident warps; kernels that spill are marked."""
    points = [row for row in rows if row["occupancy"]]
    if not points:
        return []
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for target in sorted({row["resources"]["target"] for row in points}):
        chosen = [row for row in points if row["resources"]["target"] == target]
        registers = [row["resources"]["registers"] for row in chosen]
        axes.scatter(registers, [row["occupancy"]["warps"] for row in chosen], label=target, alpha=0.7)
    spilled = [row for row in points if row["resources"]["spill_bytes"]]
    positions = [(row["resources"]["registers"], row["occupancy"]["warps"]) for row in spilled]
    if positions:
        axes.plot(*zip(*positions), "x", color="red", markersize=10, label="spills")
    axes.set(title="a point is a kernel", xlabel="registers per thread", ylabel="resident warps per multiprocessor")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return [_save(figure, directory / "occupancy.png")]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
