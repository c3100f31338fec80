"""Processes that compile side by side, and end at Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def compilers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` processes. Ctrl-C reaches each of them: one that handled it would go on with the next of what waits."""
    with ProcessPoolExecutor(jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
