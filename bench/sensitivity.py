"""Does comparing results (`bench.report --compare`) find a slowdown, and nothing where there is none? Tried out here and now.

    python -m bench.sensitivity                 six runs as they are, six in which fastattn is 20 % slower: about a minute
    python -m bench.sensitivity --planted 0.1   how small a slowdown is still found

Each run times a case against PyTorch as the benchmarks do. Runs as they are, compared with the first of them, must give no verdict;
each of the slowed ones must be found slower. Exit status 1 where that is not so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import machine
from bench.arguments import seconds
from bench.bench_normalization import Norm, ours, torch_nn
from bench.contest import Run, race
from bench.report import OURS, compare


def slowed(run: Run, by: float) -> Run:
    """`run`, and then waiting (busily, as slow code would) for the share `by` of the time that it took."""

    def slow() -> object:
        start = time.perf_counter()
        result = run()
        end = time.perf_counter()
        while time.perf_counter() < end + by * (end - start):
            pass
        return result

    return slow


def result(case: Any, peer: Callable[[Any], Any], planted: float, seconds: float) -> dict[str, Any]:
    """What `bench.report` would write, of one case."""
    jobs = {OURS: slowed(case.job(ours), planted), "torch.nn": case.job(peer)}
    times = race(jobs, machine.device(), seconds)
    return {"rows": [{"case": case.name, "provider": name, "rounds": times.seconds[name]} for name in jobs]}


def verdicts(planted: float, runs: int, seconds: float) -> tuple[list[str], list[str]]:
    """Lines of the table for the runs as they are and for the slowed ones, each against the first as it is."""
    case = Norm("fp32", True, 512, 768)
    case.check(ours)
    results = {by: [result(case, torch_nn, by, seconds) for _ in range(runs)] for by in (0.0, planted)}
    first = results[0.0].pop(0)
    as_is, slow = ([compare(first, other)[0].splitlines()[-1] for other in results[by]] for by in (0.0, planted))
    return as_is, slow


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sensitivity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--planted", type=float, default=0.2, help="slowdown, as a share of the time (%(default)s)")
    parser.add_argument("--runs", type=int, default=6, help="runs of each kind (%(default)s)")
    parser.add_argument("--seconds", type=seconds, default=3.0, help="about how long each run may take (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.runs < 2 or not arguments.planted > 0:
        parser.error("--runs must be at least 2 and --planted above 0")
    torch.set_num_threads(1)
    as_is, slow = verdicts(arguments.planted, arguments.runs, arguments.seconds)
    print("| case | new / old | 95 % within | against | verdict |\n|---|---|---|---|---|")
    print("\n".join([*as_is, *slow]))
    false, found = (sum("SLOWER" in line or "faster" in line for line in as_is), sum("SLOWER" in line for line in slow))
    print(
        f"as they are: {false} of {len(as_is)} given a verdict; {arguments.planted:.0%} slower: {found} of {len(slow)} found"
    )
    return 0 if false == 0 and found == len(slow) else 1


if __name__ == "__main__":
    sys.exit(main())
