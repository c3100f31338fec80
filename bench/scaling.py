"""How the cost of attention grows with the length N: time and memory, and the exponent fitted to them.

    python -m bench.scaling            N 512 to 16384, full, causal and windowed attention; a few minutes on two CPU cores

Expected: memory 1.0 for all, time 2.0 for full and causal, 1.0 for a window.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastattn
from bench import machine
from bench.memory import growth, in_child

WINDOW = 256
KINDS: dict[str, dict[str, object]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (WINDOW, 0)},
}


def exponent(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of log(cost) against log(length) by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def step(kind: str, n: int, heads: int, dim: int, backward: bool) -> Callable[[], object]:
    """One forward, or forward and backward, over fp32 inputs of its own."""
    tensors = [torch.randn(1, heads, n, dim, device=machine.device(), requires_grad=backward) for _ in range(3)]

    def run() -> object:
        out = fastattn.attention(*tensors, **KINDS[kind])  # type: ignore[call-overload]
        return torch.autograd.grad(out, tensors, torch.ones_like(out)) if backward else out

    return run


def seconds(kind: str, n: int, heads: int, dim: int, backward: bool, runs: int = 3) -> float:
    """Of the fastest of several runs: the others were disturbed."""
    run, taken = step(kind, n, heads, dim, backward), []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def peak(kind: str, n: int, heads: int, dim: int, backward: bool) -> int:
    """Bytes on top of the inputs, at most; to be called in a process of its own."""
    step(kind, 512, heads, dim, backward)()  # what threads and libraries set up once does not count
    run = step(kind, n, heads, dim, backward)
    if not torch.cuda.is_available():
        return growth(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=16384, help="largest N (%(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="attention heads (%(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="head dimension (%(default)s)")
    parser.add_argument("--backward", action="store_true", help="forward and backward instead of forward alone")
    parser.add_argument("--out", type=Path, help="folder for scaling.png; default: bench/results/<machine>")
    arguments = parser.parse_args(argv)
    lengths = [n for n in (512 * 2**i for i in range(20)) if n <= arguments.longest]
    if len(lengths) < 3:
        parser.error(f"--longest must be at least 2048, got {arguments.longest}")
    where = arguments.heads, arguments.dim, arguments.backward
    print(
        f"{'forward+backward' if arguments.backward else 'forward'}, fp32, {arguments.heads} heads of {arguments.dim}"
    )
    curves = {}
    for kind in KINDS:
        times = [seconds(kind, n, *where) for n in lengths]
        memory = [
            in_child(peak, kind, n, *where) if machine.device().type == "cpu" else peak(kind, n, *where)
            for n in lengths
        ]
        curves[kind] = times, memory
        for n, t, m in zip(lengths, times, memory):
            print(f"  {kind:8} N {n:6}  {1e3 * t:10.2f} ms  {m / 2**20:8.2f} MiB")
        half = len(lengths) // 2  # the short ones are dominated by the constant cost of a call
        print(
            f"  {kind:8} exponents: time {exponent(lengths[half:], times[half:]):.2f}, "
            f"memory {exponent(lengths[half:], memory[half:]):.2f}",
            flush=True,
        )
    folder = arguments.out or Path(__file__).parent / "results" / machine.slug()
    _plot(lengths, curves, folder)
    print(f"plot: {folder / 'scaling.png'}")
    return 0


def _plot(lengths: list[int], curves: dict[str, tuple[list[float], list[int]]], folder: Path) -> None:
    from bench.report import pyplot

    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, (times, memory) in curves.items():
        panels[0].plot(lengths, [1e3 * t for t in times], marker="o", label=kind)
        panels[1].plot(lengths, [m / 2**20 for m in memory], marker="o", label=kind)
    for panel, label in zip(panels, ("time (ms)", "memory growth (MiB)")):
        panel.set(xscale="log", yscale="log", xlabel="length N", ylabel=label)
        panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
