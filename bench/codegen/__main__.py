"""What the GPU would run, without one: `python -m bench.codegen [path/to/file.py:name ...]`.

Without arguments it reports the kernels of the package at their real launches; with arguments, those of any file:

    python -m bench.codegen --targets sm_80,sm_90 --kernels attention --output runs/codegen
    python -m bench.codegen my_kernels.py:launch_all
    python -m bench.codegen my_kernels.py:matmul --signature 'a=*bf16,b=*bf16,c=*bf16,n=i32' --constants BLOCK=128,num_warps=8
    python -m bench.codegen --timeline training --targets sm_90
    python -m bench.codegen --validate
    python -m bench.codegen --measure                       on a GPU: each launch's time next to its prediction
    python -m bench.codegen --write-budgets

Exit status 1 where a kernel spills, needs more memory than its GPU has, or leaves the tensor cores idle in a dot.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read at triton's first import; the processes of the pool inherit it

from bench.arguments import count, folder
from bench.codegen import budgets, cases, measure, published, report, timeline, user_file
from bench.codegen.worker import report_launches
from fastattn.kernels.stand_in import stand_in
from fastattn.kernels.targets import TARGETS, find_target
from fastattn.warmup import this_machines


def report_case(case: cases.Case, target: str) -> list[report.Row]:
    """A row per distinct kernel of a case; a case that fails to compile is one row that says so."""
    function = getattr(cases, case.function)
    return _distinct(case.name, report_launches(lambda: function(**case.arguments), target))


def report_place(place: str, target: str, signature: str, constants: str) -> list[report.Row]:
    """The same for a function or kernel of a user's file."""
    rows = report_launches(lambda: user_file.launch(place, signature, constants), target)
    return _distinct(place.rpartition("/")[2], rows)


def check_place(place: str, target: str, signature: str, constants: str) -> str | None:
    """What is wrong with a user's file, or with what is asked of it, before anything of it is compiled."""
    try:
        with stand_in(target):  # some files ask for the GPU when they are imported
            user_file.find(place, signature, constants)
    except (Exception, SystemExit) as error:  # the file is the user's: it may raise anything
        said = next(iter(str(error).splitlines()), "")
        return said if isinstance(error, ValueError) and place in said else f"{place}: {type(error).__name__}: {said}"
    return None


def _distinct(name: str, rows: list[dict[str, Any]]) -> list[report.Row]:
    """Without the launches of a kernel that is the same as an earlier one but for its grid and shapes."""
    chosen: dict[str, report.Row] = {}
    for row in rows:
        resources = {key: value for key, value in row["resources"].items() if key != "grid"}
        chosen.setdefault(repr((resources, row["loops"])), {"case": name, **row})
    return [*chosen.values()]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codegen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="*", metavar="file.py:name", help="a launching function or a kernel")
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,sm_120,gfx942", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--kernels", default="", help="only cases and kernels with this text in their name")
    parser.add_argument("--all", action="store_true", help="all cases, not only the core ones")
    parser.add_argument("--summary", action="store_true", help="one Markdown line per kernel, a column per target")
    parser.add_argument("--signature", default="", help="of a kernel given as file.py:kernel")
    parser.add_argument("--constants", default="", help="constexprs and launch options of that kernel")
    parser.add_argument("--output", type=folder, help="directory for report.md, report.json and the plots")
    parser.add_argument("--timeline", choices=("training", "decode"), help="the launches of a GPT's step, in order")
    parser.add_argument("--validate", action="store_true", help="the model's error where measured figures are public")
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU, measured against predicted")
    parser.add_argument("--write-budgets", action="store_true", help="record new budgets and print what changed")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(argv)
    options.cases = [case for case in cases.CASES if case.core or options.all]
    if options.write_budgets:
        options.cases = budgets.budget_cases()
    options.cases = [case for case in options.cases if options.kernels in case.name or options.kernels in case.function]
    if not (options.cases or options.places):
        parser.error(f"no case has {options.kernels!r} in its name{'' if options.all else '; --all searches more'}")
    return options


def report_timeline(step: str, target: str, output: Path | None) -> None:
    """Print the launches of one step of a GPT with their predicted times; plot them into `output`."""
    function = {"training": cases.training_step, "decode": cases.decode_step}[step]
    steps = [timeline.predict(row) for row in report_launches(function, target)]
    print(f"\n{step} step on {target}: {function.__doc__}\n{timeline.table(steps)}")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        print(f"wrote {timeline.plot(steps, output / f'timeline_{step}_{target}.png')}")


def print_measured(without_gpu: str) -> int:
    """Measured against predicted on this machine's GPU; on a machine without one, the predictions for `without_gpu`."""
    on_gpu, target = this_machines() is not None, this_machines() or without_gpu
    try:
        name = f"{target}, {find_target(target).product}"
    except ValueError as error:
        sys.exit(str(error))
    if not on_gpu:
        print(f"this machine has no GPU: predictions for {name} alone, in a minute or two", file=sys.stderr)
    compared = [row for workload in measure.WORKLOADS for row in measure.compare(workload, target, on_gpu)]
    print(f"{name}\n\n{measure.table(compared)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    targets = budgets.TARGETS if options.write_budgets else tuple(options.targets.split(","))
    try:
        for target in targets:
            find_target(target)
    except ValueError as error:
        sys.exit(str(error))
    if options.validate:
        with ProcessPoolExecutor(options.jobs) as pool:
            print(published.table(list(pool.map(published.validate, published.FIGURES))))
        return 0
    if options.measure:
        return print_measured(targets[0])
    if options.timeline:
        for target in targets:
            report_timeline(options.timeline, target, options.output)
        return 0
    rows: list[report.Row] = []
    failures: list[str] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        checks = [
            pool.submit(check_place, place, targets[0], options.signature, options.constants)
            for place in options.places
        ]
        if wrong := [problem for check in checks if (problem := check.result())]:
            sys.exit("\n".join(wrong))
        jobs: list[Any] = []
        for target in targets:
            if options.places:
                for place in options.places:
                    job = pool.submit(report_place, place, target, options.signature, options.constants)
                    jobs.append((f"{place} on {target}", job))
            else:
                jobs += [(f"{case.name} on {target}", pool.submit(report_case, case, target)) for case in options.cases]
        for name, job in jobs:
            if problem := job.exception():
                failures.append(f"{name}: {type(problem).__name__}: {problem}".splitlines()[0])
            else:
                rows += job.result()
    print(report.summary_table(rows) if options.summary else report.terminal_table(rows))
    for failure in failures:
        print(f"  ! {failure}")
    if options.output:
        print("wrote " + ", ".join(str(path) for path in report.write_report(rows, options.output)))
    if options.write_budgets and not failures:
        print("\n".join(["budgets (! worse, ~ changed, + new, - gone):", *budgets.write(rows)]))
    return 1 if failures or any(row["violations"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
