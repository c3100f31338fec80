"""Fair timing: the contestants take turns, so that whatever else the machine does hits all of them alike.

A ratio is taken within each round and then summarised, which cancels the drift that absolute times are full of.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Run = Callable[[], object]

SHORTEST = 2e-3  # seconds: a shorter run is repeated, so that the clock and the caches of the others do not matter
L2_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Times:
    """Seconds of one run, by contestant and round."""

    seconds: dict[str, list[float]]

    def ratio(self, contestant: str, to: str) -> Spread:
        """How many times as long `contestant` takes as `to`, round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[contestant], self.seconds[to])])


def race(contestants: Mapping[str, Run], device: torch.device, seconds: float, rounds: int = 5) -> Times:
    """Time the contestants in turn, in another order every round.

    Args:
        contestants: what to run, by name.
        device: where they run; on a GPU, CUDA events time them and the L2 cache is flushed before each run.
        seconds: about how long all of it may take; at least `rounds` rounds are done.
        rounds: the fewest rounds.
    """
    clock = _events(device) if device.type == "cuda" else _wall_clock
    repeats, once = {}, 0.0
    for name, run in contestants.items():
        run()
        taken = min(clock(run, 1) for _ in range(2))
        repeats[name] = 1 if device.type == "cuda" else max(1, round(SHORTEST / taken))
        once += taken * repeats[name]
    names, shuffle = list(contestants), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds - once
    while len(times[names[0]]) < rounds or time.perf_counter() < end:
        shuffle(names)  # nobody always runs in the caches that the same one left
        for name in names:
            times[name].append(clock(contestants[name], repeats[name]))
    return Times(times)


def _wall_clock(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _events(device: torch.device) -> Callable[[Run, int], float]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Run, repeats: int) -> float:
        flush.zero_()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    return clock
