"""Comparisons as a table for people: a line a provider, in Markdown, which reads as plain text as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS = "fastattn"
COLUMNS = (
    "case",
    "provider",
    "time / ours",
    "bounds",
    "ms",
    "limit ms",
    "TFLOP/s",
    "GB/s",
    "share of limit",
    "memory MiB",
    "memory / ours",
)


def text(comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """{case: {provider: figures}} as an aligned table."""
    rows = [COLUMNS]
    for case, providers in comparisons.items():
        ours = providers.get(OURS, {}).get("memory_MiB")
        for provider, figures in providers.items():
            memory = figures.get("memory_MiB")
            ratio = f"{memory / ours:.2f}" if memory is not None and ours else ""
            rows.append((case if provider == next(iter(providers)) else "", provider, *_cells(figures), ratio))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    def cell(name: str, form: str) -> str:
        return format(figures[name], form) if figures.get(name) is not None else ""

    def milliseconds(name: str) -> str:
        return f"{1e3 * figures[name]:.3g}" if name in figures else ""

    bounds = f"{figures['times_ours_low']:.2f}-{figures['times_ours_high']:.2f}" if "times_ours" in figures else ""
    shares = [figures[name] for name in ("share_of_matmul", "share_of_copy") if name in figures]
    return (
        cell("times_ours", ".2f"),
        bounds,
        milliseconds("seconds"),
        milliseconds("limit_seconds"),
        cell("TFLOP/s", ".3g"),
        cell("GB/s", ".3g"),
        f"{max(shares):.0%}" if shares else "",
        cell("memory_MiB", ".1f"),
    )
