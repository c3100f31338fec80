"""How much memory a job takes on top of its inputs: the highest growth during its second run."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.processes import in_child


def peak_growth(case: Case, provider: Callable[[Any], Any]) -> int:
    """Bytes, from the CUDA allocator or the resident set of a fresh child process."""
    if torch.cuda.is_available():
        return _on_gpu(case, provider)
    return in_child(_on_cpu, case, provider)


def growth(run: Callable[[], object]) -> int:
    """Bytes by which this process's resident set grows at most while `run` runs."""
    before = _reset_peak()
    run()
    return _peak() - before


def resident() -> int:
    """Bytes of this process that are in memory now (Linux; elsewhere the most that ever were)."""
    return _kilobytes("VmRSS") if Path("/proc/self/status").exists() else _peak()


def _on_gpu(case: Case, provider: Callable[[Any], Any]) -> int:
    run = case.job(provider)
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(case: Case, provider: Callable[[Any], Any]) -> int:
    run = case.job(provider)
    run()  # what threads, libraries and the compiler set up does not count, nor gradients and optimizer state that stay
    _trim()
    return growth(run)


def _trim() -> None:
    """Give the system back what glibc keeps of freed blocks, so that using it again is seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_peak() -> int:
    """Forget the peak so far where the system can (Linux); the resident bytes to start from."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return resident()


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _kilobytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
