"""How cost grows: attention's with the length N, the loss's with the vocabulary V; time and memory, and the exponents fitted to them.

    python -m bench.scaling            N 512 to 16384, full, causal and windowed attention, V 8192 to 131072: a few minutes
    python -m bench.scaling loss       the loss alone
    python -m bench.scaling --longest 2048    in seconds; the exponents of time are not judged below 8192

Each exponent is printed with what is expected of it: for attention memory 1 and time 2, or 1 with a window; for the loss time 1, and
memory between 0 and 1 (the weight's gradient grows with V, the chunk of logits does not).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastattn
from bench import machine
from bench.arguments import count, folder
from bench.memory import growth
from bench.processes import in_child

WINDOW = 256
TOLERANCE = 0.25  # by which a fitted exponent may exceed the expected one


@dataclass(frozen=True)
class Curve:
    """What grows with its size, and the exponents that time and memory should have for large ones."""

    letter: str
    sizes: tuple[int, ...]
    time: float
    memory: float
    options: dict[str, object] = field(default_factory=dict)


LENGTHS = tuple(512 * 2**i for i in range(6))
CURVES = {
    "full": Curve("N", LENGTHS, 2.0, 1.0),
    "causal": Curve("N", LENGTHS, 2.0, 1.0, {"causal": True}),
    "window": Curve("N", LENGTHS, 1.0, 1.0, {"causal": True, "window": (WINDOW, 0)}),
    "loss": Curve("V", tuple(8192 * 2**i for i in range(5)), 1.0, 1.0),
}
TOKENS, WIDTH = 1024, 128  # of the loss
POINTS = 3  # fewer times decide no exponent: the noise of one is as large as what is looked for
JUDGED = LENGTHS[2 * POINTS - 2]  # the smallest --longest with so many in its longer half


def exponent(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of log(cost) against log(length) by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def step(kind: str, size: int, heads: int, dim: int, backward: bool) -> Callable[[], object]:
    """One forward, or forward and backward, over fp32 inputs of its own."""
    device = machine.device()
    if kind == "loss":
        shapes: list[tuple[int, ...]] = [(TOKENS, WIDTH), (size, WIDTH)]
        target = torch.randint(size, (TOKENS,), device=device)
        function: Callable[..., Any] = lambda *x: fastattn.linear_cross_entropy(*x, target)  # noqa: E731
    else:
        shapes = [(1, heads, size, dim)] * 3
        function = partial(fastattn.attention, **CURVES[kind].options)  # type: ignore[arg-type]
    tensors = [torch.randn(shape, device=device, requires_grad=backward) for shape in shapes]

    def run() -> object:
        out = function(*tensors)
        return torch.autograd.grad(out, tensors, torch.ones_like(out)) if backward else out

    return run


def seconds(kind: str, size: int, heads: int, dim: int, backward: bool) -> float:
    """Of the fastest of several runs: the others were disturbed."""
    run, taken = step(kind, size, heads, dim, backward), []
    while len(taken) < 3 or sum(taken) < 1.0:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def peak(kind: str, size: int, heads: int, dim: int, backward: bool) -> int:
    """Bytes on top of the inputs, at most; to be called in a process of its own."""
    step(kind, 512, heads, dim, backward)()  # what threads and libraries set up once does not count
    run = step(kind, size, heads, dim, backward)
    if not torch.cuda.is_available():
        return growth(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def verdict(found: float, expected: float, judged: bool = True) -> str:
    """An exponent beside the one that it should not exceed."""
    if not judged:
        return f"{found:.2f} (expected {expected:.1f}, not judged: too few lengths, --longest {JUDGED} has enough)"
    return f"{found:.2f} (expected {expected:.1f}{', EXCEEDED' if found > expected + TOLERANCE else ''})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(CURVES)}; default: all of them")
    parser.add_argument("--longest", type=int, default=16384, help="largest N (%(default)s)")
    parser.add_argument("--heads", type=count, default=2, help="attention heads (%(default)s)")
    parser.add_argument("--dim", type=count, default=64, help="head dimension (%(default)s)")
    parser.add_argument("--backward", action="store_true", help="forward and backward instead of forward alone")
    parser.add_argument("--out", type=folder, help="folder for scaling.png; default: bench/results/<machine>")
    arguments = parser.parse_args(argv)
    if unknown := [kind for kind in arguments.kinds if kind not in CURVES]:
        parser.error(f"KIND must be one of {', '.join(CURVES)}, got {', '.join(unknown)}")
    if arguments.longest < 2048:
        parser.error(f"--longest must be at least 2048, got {arguments.longest}")
    if arguments.dim > 256:
        parser.error(f"--dim must be in 1..256, got {arguments.dim}")
    where = arguments.heads, arguments.dim, arguments.backward
    passes = "forward and backward" if arguments.backward else "forward"
    print(
        f"{passes}, fp32; attention of {arguments.heads} heads of {arguments.dim}, loss of {TOKENS} tokens, width {WIDTH}"
    )
    curves, exceeded = {}, False
    for kind in arguments.kinds or CURVES:
        curve = CURVES[kind]
        sizes = [size for size in curve.sizes if curve.letter != "N" or size <= arguments.longest]
        times = [seconds(kind, size, *where) for size in sizes]
        on_cpu = machine.device().type == "cpu"
        memory = [in_child(peak, kind, size, *where) if on_cpu else peak(kind, size, *where) for size in sizes]
        curves[kind] = sizes, times, memory
        for size, t, m in zip(sizes, times, memory):
            print(f"  {kind:8} {curve.letter} {size:6}  {1e3 * t:10.2f} ms  {m / 2**20:8.2f} MiB")
        half = len(sizes) // 2  # the short ones are dominated by the constant cost of a call
        fits = [
            verdict(exponent(sizes[half:], times[half:]), curve.time, judged=len(sizes[half:]) >= POINTS),
            verdict(exponent(sizes[half:], memory[half:]), curve.memory),  # bytes do not vary: two lengths are enough
        ]
        exceeded |= any("EXCEEDED" in fit for fit in fits)
        print(f"  {kind:8} exponents: time {fits[0]}, memory {fits[1]}", flush=True)
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    else:
        print(f"plot: {_plot(curves, arguments.out or Path(__file__).parent / 'results' / machine.slug())}")
    return 1 if exceeded else 0


def _plot(curves: dict[str, tuple[list[int], list[float], list[int]]], folder: Path) -> Path:
    from bench.report import label_plainly, pyplot

    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, (sizes, times, memory) in curves.items():
        label = f"{kind} ({CURVES[kind].letter})"
        panels[0].plot(sizes, [1e3 * t for t in times], marker="o", label=label)
        panels[1].plot(sizes, [m / 2**20 for m in memory], marker="o", label=label)
    ticks = sorted({size for sizes, _, _ in curves.values() for size in sizes})
    for panel, label in zip(panels, ("time (ms)", "memory growth (MiB)")):
        panel.set(xscale="log", yscale="log", xlabel="length N or vocabulary V", ylabel=label)
        panel.set_xticks(ticks, [str(size) for size in ticks], rotation=45)
        panel.set_xticks([], minor=True)
        label_plainly(panel.yaxis)
        panel.grid(alpha=0.3)
        panel.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=120)
    plt.close(figure)
    return folder / "scaling.png"


if __name__ == "__main__":
    sys.exit(main())
