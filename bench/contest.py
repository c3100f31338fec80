"""Fair timing: the contestants take turns, so that whatever else the machine does hits all of them alike.

What is reported are medians: of the rounds' times, and of the ratios within each round. How far to trust a ratio is found by
drawing the rounds anew from those that there are. Where two runs are compared with each other, hours apart, it is the tenth of
the rounds that was disturbed least that counts: what else a machine does only ever adds to a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

Run = Callable[[], object]

LONG_ROUND, FEWEST_ROUNDS = 4.0, 3  # a round of more seconds than that is not repeated more often than it must be
SHORTEST = 2e-3  # seconds: a shorter run is repeated, so that the clock does not matter
WARMED = 20e-3  # seconds: before a shorter run goes one that is not timed, so that what the others left in the caches does not matter
RESAMPLES = 400
L2_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU


@dataclass(frozen=True)
class Estimate:
    """A number, and the bounds between which 95 % of its repetitions would be."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, statistic: Callable[..., float], *samples: Sequence[Any]) -> Estimate:
        """`statistic(*samples)`, with bounds from samples drawn again from these (Efron's bootstrap)."""
        random = Random(0)
        drawn = [statistic(*(random.choices(sample, k=len(sample)) for sample in samples)) for _ in range(RESAMPLES)]
        bounds = quantiles(drawn, n=40, method="inclusive")
        return cls(statistic(*samples), bounds[0], bounds[-1])

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def median_ratio(rounds: Sequence[tuple[float, float]]) -> float:
    """Median of the ratios of the first of a pair to the second."""
    return median(first / second for first, second in rounds)


def fast(seconds: Sequence[float]) -> float:
    """The time that a tenth of the rounds does not exceed."""
    return quantiles(seconds, n=10, method="inclusive")[0] if len(seconds) > 1 else seconds[0]


def fast_ratio(rounds: Sequence[tuple[float, float]]) -> float:
    """How many times as long the first of a pair takes as the second, undisturbed."""
    first, second = zip(*rounds)
    return fast(first) / fast(second)


@dataclass(frozen=True)
class Times:
    """Seconds of one run, by contestant and round."""

    seconds: dict[str, list[float]]

    def ratio(self, contestant: str, to: str) -> Estimate:
        """How many times as long `contestant` takes as `to`, round by round."""
        return Estimate.of(median_ratio, [*zip(self.seconds[contestant], self.seconds[to])])


def race(contestants: Mapping[str, Run], device: torch.device, seconds: float, rounds: int = 5) -> Times:
    """Time the contestants in turn, in another order every round.

    Args:
        contestants: what to run, by name.
        device: where they run; on a GPU, CUDA events time them and the L2 cache is flushed before each run.
        seconds: about how long all of it may take; at least `rounds` rounds are done.
        rounds: the fewest rounds; three where a round takes more than four seconds.
    """
    clock = _events(device) if device.type == "cuda" else _wall_clock
    repeats, warmed, once = {}, set[str](), 0.0
    for name, run in contestants.items():
        run()
        taken = clock(run, 1)
        if taken < WARMED:
            taken = min(taken, clock(run, 1))
            warmed.add(name)
        repeats[name] = 1 if device.type == "cuda" else max(1, round(SHORTEST / taken))
        once += taken * (repeats[name] + (name in warmed))
    names, shuffle = list(contestants), Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds = min(rounds, FEWEST_ROUNDS) if once > LONG_ROUND else rounds
    end = time.perf_counter() + seconds - once
    while len(times[names[0]]) < rounds or time.perf_counter() < end:
        shuffle(names)  # nobody always runs in the caches that the same one left
        for name in names:
            if name in warmed:
                contestants[name]()
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
