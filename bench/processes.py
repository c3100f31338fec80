"""Work in processes of its own, forked off a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bench.cases import Case
from bench.contest import Run

# what is there, if it is
PRELOADED = ["torch", "fastattn", "bench.memory", "bench.bench_models", "transformers.models.gpt2.modeling_gpt2"]


def _process() -> ProcessPoolExecutor:
    """One process, which waits for functions to call, with as many threads as this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(
        1, mp_context=context, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    )


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a process of its own."""
    with _process() as process:
        return process.submit(function, *arguments).result()


class Alone:
    """A provider's job in a process that does nothing else, until `close`.

    What others leave free decides how much memory a job has to ask the system for, a page fault for every 4 KiB: up to a fifth of
    the time of a training step. Asking the process takes some 0.1 ms.
    """

    def __init__(self, case: Case, provider: Callable[[Any], Any]) -> None:
        self._process = _process()
        try:
            self._process.submit(_prepare, case, provider).result()
        except BaseException:
            self.close()
            raise

    def __call__(self) -> None:
        self._process.submit(_run).result()

    def close(self) -> None:
        self._process.shutdown()


_job: Run  # of this process


def _prepare(case: Case, provider: Callable[[Any], Any]) -> None:
    global _job
    _job = case.job(provider)


def _run() -> None:
    _job()
