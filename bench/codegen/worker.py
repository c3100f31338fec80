"""A process that compiles: it runs a Python function under the stand-in driver and reports the kernels it launched.

Interpreted and compiled kernels do not mix in one process, so tests that interpret ask a worker. The two sides talk
JSON lines over the worker's standard input and output:

    {"case": "bench.codegen.cases:attention", "arguments": {"head_dim": 64}, "target": "sm_90", "loops": true}
    {"launches": [{"resources": {"kernel": ...}, ...}, ...]}   or   {"error": "ValueError: ...", "traceback": ...}
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.kernels.stand_in import Launch

_REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerError(RuntimeError):
    """What went wrong inside the worker, with its traceback."""


class CompileWorker:
    """The asking side. Use as a context manager, or call `close`."""

    def __init__(self, cache_dir: Path | None = None) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        if cache_dir is not None:
            environment["TRITON_CACHE_DIR"] = str(cache_dir)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.codegen.worker"],
            cwd=_REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def reports(self, case: str, target: str, **arguments: Any) -> list[dict[str, Any]]:
        """A `KernelReport` as JSON for each kernel that the function `case` ("module:function") launches on `target`."""
        return self._ask(case, target, arguments, loops=True)

    def launches(self, case: str, target: str, **arguments: Any) -> list[Any]:
        """The `Resources` of each of these kernels, which takes less time than the whole report."""
        from bench.codegen.resources import Resources

        reports = self._ask(case, target, arguments, loops=False)
        return [Resources.from_json(report["resources"]) for report in reports]

    def _ask(self, case: str, target: str, arguments: dict[str, Any], loops: bool) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"case": case, "target": target, "arguments": arguments, "loops": loops}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the worker ended with exit status {self._process.wait()} during {request}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{reply['error']}\n{reply['traceback']}")
        return reply["launches"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def __enter__(self) -> CompileWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def report_launches(function: Callable[[], object], target: str, loops: bool = True) -> list[dict[str, Any]]:
    """Call `function` under the stand-in driver; a `KernelReport` as JSON per launch, in order; its resources alone without `loops`."""
    from bench.codegen.analysis import minimum_bytes
    from fastattn.kernels.stand_in import stand_in

    with stand_in(target) as launches:
        function()
    rows = []
    for launch in launches:
        report = _cached_report(launch, loops)
        report["resources"]["grid"] = launch.grid
        rows.append({**report, "arguments": launch.arguments, "minimum_bytes": minimum_bytes(launch.arguments)})
    return rows


def _cached_report(launch: Launch, loops: bool) -> dict[str, Any]:
    """The report on a kernel's machine code, kept on disk beside Triton's own cache: disassembly takes a while."""
    from triton.runtime.cache import get_cache_manager

    from bench.codegen.analysis import analyse
    from bench.codegen.resources import read_resources

    cache = get_cache_manager(hashlib.sha256(f"{launch.metadata.hash} {_analysis_version()}".encode()).hexdigest())
    name = "report.json" if loops else "resources.json"
    path = cache.get_file(name)
    if path is None:
        report = analyse(launch).as_json() if loops else {"resources": read_resources(launch).as_json()}
        path = cache.put(json.dumps(report), name, binary=False)
    return json.loads(Path(path).read_text())


@functools.cache
def _analysis_version() -> str:
    """Changes with any source of this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        module_name, function_name = request["case"].split(":")
        function = getattr(importlib.import_module(module_name), function_name)
        launches = report_launches(lambda: function(**request["arguments"]), request["target"], request["loops"])
        return {"launches": launches}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main() -> None:
    """Answer requests until standard input ends; whatever else prints goes to standard error."""
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
