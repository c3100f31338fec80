"""Tables of what a GPU would run: for the terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastattn.kernels.targets import find_target

Row = dict[str, Any]  # {"case": ..., **KernelReport.as_json()}
HEADER = (
    "case", "kernel", "registers", "spills", "shared KB", "blocks/SM", "warps", "limit", "loop", "busiest pipe",
    "alternating", "overlapped", "pipe/DRAM", "of DRAM", "least KB", "B/access", "16 B",
)  # fmt: skip
LEGEND = """\
spills: bytes per thread. shared KB: of the device's limit. blocks/SM, warps: resident, and what limits them. loop:
instructions of the hottest loop (* the whole kernel: it has no loop). alternating, overlapped: predicted share of the
tensor cores' peak when tensor and other work take turns, and when everything overlaps. pipe/DRAM: for kernels without
tensor work, busiest pipe ÷ cycles of the DRAM traffic; below 1 the code can keep up with memory. of DRAM: the share of its
bandwidth that this allows. least KB: of all tensors, each element touched once (at the small shapes that are compiled).
B/access: bytes per lane of a global load or store; 16 B: the share of the bytes that go 16 at a time.
These are predictions from machine code, not measurements."""


def cells(row: Row) -> list[str]:
    """One line of the table."""
    resources, occupancy = row["resources"], row["occupancy"]
    loop = row["loops"][0] if row["loops"] else None
    limit = find_target(resources["target"]).shared_bytes

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        row["case"],
        resources["kernel"],
        str(resources["registers"]),
        str(resources["spill_bytes"]),
        f"{resources['shared_bytes'] / 1024:.0f}/{limit // 1024}",
        str(occupancy["blocks"]) if occupancy else "",
        f"{occupancy['warps']}/{occupancy['max_warps']}" if occupancy else str(resources["num_warps"]),
        occupancy["limited_by"] if occupancy else "",
        f"{loop['instructions']}{'*' if loop['is_whole_kernel'] else ''}" if loop else "",
        loop["busiest"] if loop else "",
        percent(loop["alternating"]) if loop else "",
        percent(loop["overlapped"]) if loop else "",
        number(loop["pipe_per_dram"], 2) if loop else "",
        percent(min(1.0, 1.0 / loop["pipe_per_dram"]) if loop["pipe_per_dram"] else None) if loop else "",
        f"{row['minimum_bytes'] / 1024:.0f}",
        number(loop["bytes_per_global_access"], 1) if loop else "",
        percent(loop["wide_share"]) if loop else "",
    ]


def terminal_table(rows: Sequence[Row]) -> str:
    """Aligned columns, one block per target."""
    lines = []
    for target, chosen in _by_target(rows).items():
        table = [list(HEADER), *(cells(row) for row in chosen)]
        widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
        lines.append(f"\n{target} ({find_target(target).product})")
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        lines += [f"  ! {violation}" for row in chosen for violation in row["violations"]]
    return "\n".join([*lines, "", LEGEND])


def markdown_table(rows: Sequence[Row]) -> str:
    """The same as Markdown, one section per target."""
    lines = ["# What the GPU would run", "", LEGEND, ""]
    for target, chosen in _by_target(rows).items():
        lines += [f"## {target} ({find_target(target).product})", "", _line(HEADER), _line(["---"] * len(HEADER))]
        lines += [*(_line(cells(row)) for row in chosen), ""]
        lines += [f"- **{violation}**" for row in chosen for violation in row["violations"]]
    return "\n".join(lines).rstrip() + "\n"


def summary_table(rows: Sequence[Row]) -> str:
    """Markdown, a line per kernel and a column per target: the bound, then registers and resident warps; ! where it spills, or
    does not fit otherwise."""
    targets = list(_by_target(rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        resources, occupancy = row["resources"], row["occupancy"]
        loop = row["loops"][0] if row["loops"] else {"alternating": None, "pipe_per_dram": None}
        bound = "-"
        if loop["alternating"] is not None:
            bound = f"{loop['alternating']:.0%}"
        elif loop["pipe_per_dram"] is not None:
            bound = f"{loop['pipe_per_dram']:.2f} of DRAM"
        needs = f" ({resources['registers']}, {occupancy['warps']})" if occupancy else f" ({resources['registers']})"
        kernel = lines.setdefault((row["case"], resources["kernel"].strip("_")), {})
        kernel.setdefault(resources["target"], bound + needs + " !" * bool(row["violations"]))
    header = ["case", "kernel", *(f"{target} {find_target(target).product}" for target in targets)]
    body = [[case, kernel, *(found.get(t, "") for t in targets)] for (case, kernel), found in lines.items()]
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, body)])


def write_report(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write report.md, report.json and, with matplotlib, the plots into `directory`; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    markdown, data = directory / "report.md", directory / "report.json"
    markdown.write_text(markdown_table(rows))
    data.write_text(json.dumps(list(rows), indent=1) + "\n")
    if find_spec("matplotlib") is None:
        return [markdown, data]
    from bench.codegen.plots import plot_bounds, plot_occupancy

    return [markdown, data, *plot_bounds(rows, directory), *plot_occupancy(rows, directory)]


def _by_target(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["resources"]["target"], []).append(row)
    return groups


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
