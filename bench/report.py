"""Run the benchmarks, and write what they found: JSON, CSV, Markdown tables and plots. Or compare two such results.

    python -m bench.report                                   the default suites, under 10 minutes on two CPU cores
    python -m bench.report attention normalization --all     chosen suites, every size
    python -m bench.report --compare old.json new.json       what became slower or faster, and whether that is noise

Results are written to bench/results/<machine>/: results.json (everything, every round), results.csv, results.md, *.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.arguments import count, folder, seconds
from bench.contest import Estimate, fast_ratio
from bench.table import OURS, text

SUITES = ("attention", "varlen", "decode", "normalization", "feed_forward", "rotary", "loss", "modules", "models")
FLAGGED = 1.05  # a change that may be smaller gets no verdict

SHARES = (
    "`limit ms` is the time that the case would take at the speed of this machine's matrix product or of its copy of a large "
    "array, whichever is longer; `share of limit` is the case's own speed relative to that. Above 100 % is no error: data "
    "that stays in the caches, as that of small cases does, moves faster than a large array is copied."
)

Rows = list[dict[str, Any]]


def run(suites: list[str], everything: bool, seconds: float, memory: bool, threads: int | None) -> dict[str, Any]:
    """Run the suites in pytest; {"machine": ..., "rows": one per case and provider, with the seconds of every round}."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "benchmark.json"
        command = [
            *(sys.executable, "-m", "pytest", *(f"bench/bench_{suite}.py" for suite in suites)),
            *("-q", "-m", "slow or not slow" if everything else "not slow", f"--benchmark-json={found}"),
            *("--benchmark-columns=min,median,iqr,rounds", "--benchmark-quiet", f"--seconds={seconds}"),
            *("-o", "console_output_style=classic"),  # no percentages between the cases that conftest.py names
            *([] if memory else ["--no-memory"]),
            *([] if threads is None else [f"--threads={threads}"]),
        ]
        status = subprocess.run(command, cwd=Path(__file__).parent.parent).returncode
        if not found.exists() or not found.stat().st_size:
            raise SystemExit(status or 1)
        data = json.loads(found.read_text())
    rows = [bench["extra_info"] for bench in data["benchmarks"]]
    return {"machine": data["machine_info"]["fastattn"], "failed": status != 0, "rows": rows}


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1))
    flat = [{k: v for k, v in row.items() if k != "rounds"} for row in result["rows"]]
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in flat for key in row}, key=_column_order))
        writer.writeheader()
        writer.writerows(flat)
    (folder / "results.md").write_text(_markdown(result))
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    _plot_bars(result["rows"], result["machine"], folder)
    _plot_lengths(result["rows"], folder)
    _plot_roofline(result["rows"], result["machine"], folder)


def _column_order(name: str) -> tuple[bool, str]:
    return name not in ("case", "provider"), name


def by_case(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """{case: {provider: row}}"""
    grouped: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        grouped[row["case"]][row["provider"]] = row
    return grouped


def _markdown(result: dict[str, Any]) -> str:
    about = result["machine"]
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    warning = "\n**The machine was noisy: trust the bounds, not the last digit.**\n" if about["noisy"] else ""
    return (
        "# Benchmarks\n\nTime relative to fastattn's, with the contestants in turn: above 1 is slower than fastattn. "
        f"Medians, with the bounds of 95 %.\n\n{SHARES}\n{warning}\n{text(by_case(result['rows']))}\n\n"
        f"## Machine\n\n{facts}\n"
    )


def pyplot() -> Any:
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    return plt


def _where(about: dict[str, Any]) -> str:
    return f"{about['device']}, {about['threads']} threads"


def label_plainly(axis: Any) -> None:
    """Ticks 0.5, 1, 2, 5 on a logarithmic axis, instead of powers of ten that overlap or are missing in a short range."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _plot_bars(rows: Rows, about: dict[str, Any], folder: Path) -> None:
    """peers.png: the time of every peer relative to ours, with its bounds."""
    plt, cases = pyplot(), by_case([row for row in rows if "times_ours" in row])
    peers = [(case, row) for case, found in cases.items() for name, row in found.items() if name != OURS]
    if not peers:
        return
    names = sorted({row["provider"] for _, row in peers})
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.22 * len(peers)), layout="constrained")
    for place, (_, row) in enumerate(peers):
        middle, low, high = row["times_ours"], row["times_ours_low"], row["times_ours_high"]
        color = f"C{names.index(row['provider'])}"
        axes.barh(place, middle, color=color, xerr=[[middle - low], [high - middle]], error_kw={"elinewidth": 0.8})
    axes.set_yticks(range(len(peers)), [f"{case}, {row['provider']}" for case, row in peers], fontsize=6)
    axes.set_ylim(len(peers) - 0.4, -0.6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="its time / fastattn's, with 95 % bounds (right of 1: fastattn is faster)")
    axes.set_title(f"Time of others relative to fastattn's\n{_where(about)}", fontsize=10)
    label_plainly(axes.xaxis)
    figure.savefig(folder / "peers.png", dpi=120)
    plt.close(figure)


def _plot_lengths(rows: Rows, folder: Path) -> None:
    """attention_<what>.png: time and memory against the length, for cases measured at several lengths."""
    plt = pyplot()
    curves: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found = re.fullmatch(r"(attention .*) N(\d+)", row["case"])
        if found:
            curves[found[1]][row["provider"]].append((int(found[2]), row))
    for title, providers in curves.items():
        if len(providers.get(OURS, ())) < 2:
            continue
        with_memory = any(row.get("memory_MiB") for points in providers.values() for _, row in points)
        labels = ("time (ms)", "memory growth (MiB)") if with_memory else ("time (ms)",)
        figure, axes = plt.subplots(1, len(labels), figsize=(5 * len(labels), 4), layout="constrained", squeeze=False)
        panels = axes[0]
        for provider, points in providers.items():
            points.sort(key=lambda point: point[0])
            lengths = [n for n, _ in points]
            panels[0].plot(lengths, [1e3 * row["seconds"] for _, row in points], marker="o", label=provider)
            if with_memory:
                memory = [row.get("memory_MiB") or None for _, row in points]
                panels[1].plot(lengths, memory, marker="o", label=provider)
        for panel, label in zip(panels, labels):
            panel.set(xscale="log", yscale="log", xlabel="length N", ylabel=label, title=title)
            panel.set_xticks(lengths, [str(n) for n in lengths])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[0].legend()
        figure.savefig(folder / f"{title.replace(' ', '_').replace('+', '_')}.png", dpi=120)
        plt.close(figure)


def _plot_roofline(rows: Rows, about: dict[str, Any], folder: Path) -> None:
    """roofline.png: operations a second against operations a byte, below what the machine's copy and products allow."""
    plt = pyplot()
    points = [row for row in rows if "TFLOP/s" in row and "GB/s" in row]
    if not points:
        return
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensity = [1e3 * row["TFLOP/s"] / row["GB/s"] for row in points]
    for i, name in enumerate(sorted({row["provider"] for row in points}, key=lambda name: (name != OURS, name))):
        places = [(x, 1e3 * row["TFLOP/s"]) for x, row in zip(intensity, points) if row["provider"] == name]
        size = 40 if name == OURS else 12
        axes.scatter(*zip(*places), s=size, color=f"C{i % 10}", marker="o" if i < 10 else "x", label=name)
    span = [min(intensity) / 2, max(intensity) * 2]
    for dtype, peak in about["matmul_GFLOP_per_s"].items():
        ridge = peak / about["copy_GB_per_s"]
        xs = [span[0], *([ridge] if span[0] < ridge < span[1] else []), span[1]]
        axes.plot(xs, [min(peak, x * about["copy_GB_per_s"]) for x in xs], color="black", linewidth=0.8)
        axes.annotate(
            dtype, (span[1], min(peak, span[1] * about["copy_GB_per_s"])), fontsize=7, ha="right", va="bottom"
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axes.set_title(f"Speed of each case below this machine's limits (lines)\n{_where(about)}", fontsize=10)
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
    figure.savefig(folder / "roofline.png", dpi=120)
    plt.close(figure)


def change(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> tuple[Estimate, str]:
    """How many times as long our side of a case takes as before, and against which peer that was measured.

    Each side is first divided by a peer of the same rounds, so that a slower machine does not count.
    """
    peer = next((name for name in new if name in old and name != OURS), None)
    pairs = [
        [*zip(side[OURS]["rounds"], side[peer]["rounds"] if peer else [1.0] * len(side[OURS]["rounds"]))]
        for side in (old, new)
    ]
    return Estimate.of(lambda before, after: fast_ratio(after) / fast_ratio(before), *pairs), peer or "the clock"


def read(path: Path) -> dict[str, Any]:
    """A results.json, or that of a folder.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    if path.is_dir():
        path /= "results.json"
    try:
        result = json.loads(path.read_text())
        if not all({"case", "provider", "rounds"} <= row.keys() and row["rounds"] for row in result["rows"]):
            raise ValueError("a row without case, provider or rounds")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a results.json of this benchmark ({error!r})") from error
    return dict(result)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, int]:
    """(Markdown table, number of cases that became slower). Raises ValueError where no case is in both."""
    lines = ["| case | new / old | 95 % within | against | verdict |", "|---|---|---|---|---|"]
    slower, before, after = 0, by_case(old["rows"]), by_case(new["rows"])
    for case in after:
        if OURS not in before.get(case, {}) or OURS not in after[case]:
            continue
        ratio, peer = change(before[case], after[case])
        verdict = ""
        if ratio.low > FLAGGED:
            verdict, slower = "SLOWER", slower + 1
        elif ratio.high < 1 / FLAGGED:
            verdict = "faster"
        lines.append(f"| {case} | {ratio.value:.2f} | {ratio.low:.2f}-{ratio.high:.2f} | {peer} | {verdict} |")
    if len(lines) == 2:
        raise ValueError("the two results have no case of fastattn's in common")
    return "\n".join(lines), slower


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all of them")
    parser.add_argument("--all", action="store_true", help="every size, and the providers that have to be compiled")
    parser.add_argument(
        "--seconds", type=seconds, default=1.5, help="about how long a comparison may take (%(default)s)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--threads", type=count, help="CPU threads; default: all cores")
    parser.add_argument("--out", type=folder, help="folder for the results; default: bench/results/<machine>")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two results.json, or their folders"
    )
    arguments = parser.parse_args(argv)
    unknown = [suite for suite in arguments.suites if suite not in SUITES]
    if unknown:
        parser.error(f"SUITE must be one of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if arguments.compare:
        try:
            table, slower = compare(*map(read, arguments.compare))
        except ValueError as error:
            parser.error(f"--compare: {error}")
        print(table)
        print(
            "\nnew / old: of fastattn's time ÷ that of the peer under 'against' in the same run; above 1 it became slower"
        )
        return 1 if slower else 0
    from bench import machine

    suites, memory = arguments.suites or list(SUITES), not arguments.no_memory
    result = run(suites, arguments.all, arguments.seconds, memory, arguments.threads)
    out = arguments.out or Path(__file__).parent / "results" / machine.slug()
    write(result, out)
    print(f"results.json, results.csv, results.md and plots are in {out}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
