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
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TypeAlias

import torch

os.environ["TRITON_INTERPRET"] = "0"  # read at triton's first import; the processes of the pool inherit it

from triton.compiler.errors import CompilationError

from bench.arguments import count, folder
from bench.codegen import budgets, cases, measure, published, report, timeline, user_file
from bench.codegen.worker import report_launches
from bench.pool import compilers
from fastattn.kernels.stand_in import stand_in
from fastattn.kernels.targets import TARGETS, find_target
from fastattn.warmup import this_machines

Reported: TypeAlias = "tuple[str, list[report.Row] | str]"  # what was asked for, and its rows or why there are none


def report_case(case: cases.Case, target: str) -> list[report.Row] | str:
    """A row per distinct kernel of a case, or why there is none, as a kernel that does not compile."""
    function = getattr(cases, case.function)
    return _report(case.name, lambda: function(**case.arguments), target)


def report_place(place: str, target: str, signature: str, constants: str) -> list[report.Row] | str:
    """The same for a function or kernel of a user's file."""
    return _report(place.rpartition("/")[2], lambda: user_file.launch(place, signature, constants), target)


def check_place(place: str, target: str, signature: str, constants: str) -> str | None:
    """What is wrong with a user's file, or with what is asked of it, before anything of it is compiled."""
    try:
        with stand_in(target), redirect_stdout(sys.stderr):  # some files ask for the GPU when they are imported
            user_file.find(place, signature, constants)
    except (Exception, SystemExit) as error:  # the file is the user's: it may raise anything
        said = str(error)
        return said if isinstance(error, ValueError) and place in said else f"{place}: {describe_failure(error)}"
    return None


def describe_failure(error: BaseException) -> str:
    """On one line what went wrong, and where in a kernel's source; Triton's own first line only has the numbers of that place."""
    while isinstance(error, CompilationError) and isinstance(error.__cause__, CompilationError):
        error = error.__cause__  # in a device function
    if isinstance(error, CompilationError):
        said = str(error.error_message or repr(error.__cause__ or "")).partition("\n")[0]
        line = (error.src or "").splitlines()[getattr(error.node, "lineno", 0) - 1 :][:1]
        return f"{type(error).__name__}: {said}" + "".join(f", in {code.strip()!r}" for code in line)
    lines = str(error).splitlines() or [""]
    said = next((line for line in lines if re.search(r"\berror\s+:", line)), lines[0])  # as ptxas has it
    if re.search(r"\bcuda\b|nvidia driver", said, re.IGNORECASE) and not torch.cuda.is_available():
        said += " (without a GPU, launch with tensors on the CPU, or give the kernel itself, with --signature)"
    return f"{type(error).__name__}: {said}"


def _report(name: str, function: Callable[[], object], target: str) -> list[report.Row] | str:
    try:
        with redirect_stdout(sys.stderr):  # what is not the report's
            rows = report_launches(function, target)
    except (Exception, SystemExit) as error:  # told in words, since not every exception comes through a pipe
        return describe_failure(error)
    return _distinct(name, rows) or "launches no kernel (kernel.warmup compiles one, but does not launch it)"


def _distinct(name: str, rows: list[report.Row]) -> list[report.Row]:
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
    parser.add_argument(
        "places",
        nargs="*",
        metavar="file.py:name",
        help="a launching function or a kernel; nothing runs, so that CPU tensors do; "
        "an autotuner takes its first configuration that fits",
    )
    parser.add_argument(
        "--targets", default="sm_80,sm_90,sm_100,sm_120,gfx942", help=f"of {', '.join(TARGETS)} (%(default)s)"
    )
    parser.add_argument("--kernels", default="", help="only cases and kernels with this text in their name")
    parser.add_argument("--all", action="store_true", help="all cases, not only the core ones")
    parser.add_argument("--summary", action="store_true", help="one Markdown line per kernel, a column per target")
    parser.add_argument(
        "--signature", default="", help="of a kernel given as file.py:kernel; integers stand for multiples of 16"
    )
    constants = (
        "constexprs and launch options of that kernel, and arguments of a fixed value: stride=1,bias=None,SHAPE=(2,4)"
    )
    parser.add_argument("--constants", default="", help=constants)
    parser.add_argument("--output", type=folder, help="directory for report.md, report.json and the plots")
    parser.add_argument("--timeline", choices=("training", "decode"), help="the launches of a GPT's step, in order")
    parser.add_argument("--validate", action="store_true", help="the model's error where measured figures are public")
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU, measured against predicted")
    parser.add_argument("--write-budgets", action="store_true", help="record new budgets and print what changed")
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count(), help="processes that compile; default: a core each"
    )
    options = parser.parse_args(argv)
    options.targets = [name.strip() for name in options.targets.split(",")]
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"--targets must be of {', '.join(TARGETS)}, got {', '.join(map(repr, unknown))}")
    options.cases = [case for case in cases.CASES if case.core or options.all]
    if options.write_budgets:
        options.targets, options.cases = budgets.TARGETS, budgets.budget_cases()
    options.cases = [case for case in options.cases if options.kernels in case.name or options.kernels in case.function]
    if not (options.cases or options.places):
        parser.error(f"no case has {options.kernels!r} in its name{'' if options.all else '; --all searches more'}")
    return options


def say(text: str) -> None:
    """Print; a reader who has gone, such as head, changes neither the files nor the exit status."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_timeline(step: str, target: str, output: Path | None) -> None:
    """Print the launches of one step of a GPT with their predicted times; plot them into `output`."""
    function = {"training": cases.training_step, "decode": cases.decode_step}[step]
    steps = [timeline.predict(row) for row in report_launches(function, target)]
    say(f"\n{step} step on {target}: {function.__doc__}\n{timeline.table(steps)}")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        say(f"wrote {timeline.plot(steps, output / f'timeline_{step}_{target}.png')}")


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
    say(f"{name}\n\n{measure.table(compared)}")
    return 0


def _report_cases(options: argparse.Namespace) -> list[Reported]:
    with compilers(options.jobs) as pool:
        jobs = [
            (f"{case.name} on {target}", pool.submit(report_case, case, target))
            for target in options.targets
            for case in options.cases
        ]
        return [(name, _result(job)) for name, job in jobs]


def _report_places(options: argparse.Namespace) -> list[Reported]:
    """Each target in processes of its own: some files ask for the GPU when they are imported, and remember it."""
    targets, asked = options.targets, (options.signature, options.constants)
    found: list[Reported] = []
    for start in range(0, len(targets), options.jobs):
        with ExitStack() as stack:
            jobs: list[tuple[str, Future[list[report.Row] | str]]] = []
            for target in targets[start : start + options.jobs]:
                pool = stack.enter_context(compilers(max(1, options.jobs // len(targets))))
                if target == targets[0]:
                    checks = [pool.submit(check_place, place, target, *asked) for place in options.places]
                    if wrong := [problem for check in checks if (problem := check.result())]:
                        sys.exit("\n".join(wrong))
                jobs += [
                    (f"{place} on {target}", pool.submit(report_place, place, target, *asked))
                    for place in options.places
                ]
            found += [(name, _result(job)) for name, job in jobs]
    return found


def _result(job: Future[list[report.Row] | str]) -> list[report.Row] | str:
    problem = job.exception()
    return f"{type(problem).__name__}: {problem}" if problem else job.result()


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.validate:
        with compilers(options.jobs) as pool:
            say(published.table(list(pool.map(published.validate, published.FIGURES))))
        return 0
    if options.measure:
        return print_measured(options.targets[0])
    if options.timeline:
        for target in options.targets:
            report_timeline(options.timeline, target, options.output)
        return 0
    rows: list[report.Row] = []
    failures: list[str] = []
    for name, found in _report_places(options) if options.places else _report_cases(options):
        if isinstance(found, str):
            failures.append(f"{name}: {found}")
        else:
            rows += found
    say(report.summary_table(rows) if options.summary else report.terminal_table(rows))
    for failure in failures:
        say(f"  ! {failure}")
    if options.output:
        say("wrote " + ", ".join(str(path) for path in report.write_report(rows, options.output)))
    if options.write_budgets and not failures:
        say("\n".join(["budgets (! worse, ~ changed, + new, - gone):", *budgets.write(rows)]))
    return 1 if failures or any(row["violations"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
