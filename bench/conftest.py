"""The fixture `compare`, which times a case's providers against each other and hands the times to pytest-benchmark.

pytest-benchmark times one test after the other. Here the providers of a case take turns (bench/contest.py) when the first
of its tests runs; every test then replays its own times through pytest-benchmark's timer, for its tables and files.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest
import torch

from bench import machine
from bench.cases import DTYPES, Case, Unavailable
from bench.contest import Run, Times, race
from bench.memory import peak_growth
from bench.processes import Alone
from bench.table import OURS, text
from fastattn.heap import GREATEST_THRESHOLD, keep_freed_memory

Providers = Mapping[str, Callable[[Any], Any]]


class Clock:
    """A timer that shows what it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: Iterable[float]) -> Callable[[], None]:
        """A function that takes the next of `seconds` on this clock."""
        each = iter(seconds)

        def advance() -> None:
            self.now += next(each)

        return advance


@dataclass
class Comparison:
    """What was found for one case."""

    times: Times
    absent: dict[str, Exception]  # why, by provider
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


CLOCK = Clock()
RESULTS = pytest.StashKey[dict[Case, Comparison]]()
SELECTED = pytest.StashKey[dict[Case, list[str]]]()  # names of providers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--seconds", type=float, default=1.5, help="about how long each comparison may take (%(default)s)")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="CPU threads (%(default)s)")
    group.addoption("--no-memory", action="store_true", help="do not measure memory")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    # Larger tensors cost their user page faults every time. Of smaller ones chance decides, in a process that does one job after
    # another: up to half of a short run's time.
    keep_freed_memory(GREATEST_THRESHOLD)
    config.stash[RESULTS] = {}
    config.addinivalue_line("filterwarnings", "default")  # the warnings of other packages are no errors here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_collection_finish(session: pytest.Session) -> None:
    selected: dict[Case, list[str]] = defaultdict(list)
    for item in session.items:
        parameters = item.callspec.params  # type: ignore[attr-defined]
        selected[parameters["case"]].append(parameters["provider"])
    session.config.stash[SELECTED] = selected


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str, Providers], None]:
    """compare(case, name, providers): time `providers` doing `case`, and record the one called `name`."""
    config, results = request.config, request.config.stash[RESULTS]

    def run(case: Case, name: str, providers: Providers) -> None:
        if case not in results:
            wanted = {provider: providers[provider] for provider in config.stash[SELECTED][case]}
            _announce(config, case.name, len(results) + 1)
            results[case] = _compare(case, wanted, config.getoption("--seconds"))
        found = results[case]
        if name in found.absent:
            benchmark.disabled = True
            benchmark(lambda: None)  # pytest-benchmark insists
            if isinstance(found.absent[name], Unavailable):
                pytest.skip(str(found.absent[name]))
            raise found.absent[name]
        seconds = found.times.seconds[name]
        benchmark.group, benchmark.name = case.name, name
        benchmark.pedantic(CLOCK.replay(seconds), rounds=len(seconds))
        figures = _figures(case, found, name)
        if not config.getoption("--no-memory"):
            figures["memory_MiB"] = round(peak_growth(case, providers[name]) / 2**20, 1)
        found.figures[name] = figures
        benchmark.extra_info.update(figures, case=case.name, provider=name, rounds=seconds)

    return run


def _announce(config: pytest.Config, case: str, number: int) -> None:
    """Name the case that is timed from now on, past pytest's capture; pytest's dots follow it."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print(f"\n{number}/{len(config.stash[SELECTED])} {case} ", end="", file=sys.stderr, flush=True)


def _compare(case: Case, providers: Providers, seconds: float) -> Comparison:
    torch.compiler.reset()  # what was compiled for other cases does not count as recompilation
    jobs: dict[str, Run] = {}
    absent: dict[str, Exception] = {}
    with ExitStack() as processes:
        for name, provider in providers.items():
            try:
                case.check(provider)
                if case.alone and machine.device().type == "cpu":
                    jobs[name] = processes.enter_context(closing(Alone(case, provider)))
                else:
                    jobs[name] = case.job(provider)
            except Exception as reason:  # one that fails must not take the others along
                absent[name] = reason
        return Comparison(race(jobs, machine.device(), seconds), absent)


def _figures(case: Case, found: Comparison, name: str) -> dict[str, Any]:
    """Ratio to ours, rates, and the share of what the machine does at most."""
    seconds, limits = median(found.times.seconds[name]), machine.limits()
    figures: dict[str, Any] = {"seconds": seconds}
    if OURS in found.times.seconds:
        ratio = found.times.ratio(name, OURS)
        figures |= {"times_ours": ratio.value, "times_ours_low": ratio.low, "times_ours_high": ratio.high}
    if case.flops:
        peak = limits.flops[str(DTYPES[case.dtype]).removeprefix("torch.")]
        figures |= {"TFLOP/s": case.flops / seconds / 1e12, "share_of_matmul": case.flops / seconds / peak}
        figures["limit_seconds"] = case.flops / peak
    if case.traffic:
        figures |= {"GB/s": case.traffic / seconds / 1e9, "share_of_copy": case.traffic / seconds / limits.bandwidth}
        figures["limit_seconds"] = max(figures.get("limit_seconds", 0.0), case.traffic / limits.bandwidth)
    return figures


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastattn"] = machine.describe()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = {case.name: comparison.figures for case, comparison in config.stash[RESULTS].items() if comparison.figures}
    if found:
        terminalreporter.section("time relative to fastattn's, from rounds in turn: above 1 is slower than fastattn")
        terminalreporter.write_line(text(found))
        about = machine.describe()
        state = "NOISY" if about["noisy"] else "quiet"
        terminalreporter.write_line(
            f"{about['device']}, {about['threads']} threads, load {about['load']}: {state} machine"
        )
