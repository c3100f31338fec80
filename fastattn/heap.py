"""The C library's heap, from which PyTorch takes the memory of CPU tensors."""

from __future__ import annotations

import ctypes
import os
import sys

from fastattn.checks import check_integer

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # options of mallopt, in glibc's malloc.h
GREATEST_THRESHOLD = 32 << 20  # bytes: glibc knows no greater one
VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"}


def set_option(option: int, value: int) -> bool:
    """glibc's mallopt(option, value): whether it took it, False where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and bool(mallopt(option, value))


def keep_freed_memory(largest: int | None = None) -> bool:
    """Let this process keep what CPU tensors free, for the next ones, instead of giving it back to Linux.

    Every 4 KiB that are taken anew cost a page fault: in a training step, which frees all its activations, 4 to 8 % of the time on
    a CPU. What a process uses at most grows by a few percent; what it freed is no longer there for others. It does nothing where the
    heap is not glibc's, nor where the user has set a variable for this (`VARIABLES`, `man mallopt`).

    Args:
        largest: bytes, at most 32 MiB; a larger tensor is still given back, as glibc does by itself above 32 MiB. None keeps them all.

    Returns:
        Whether the heap keeps its memory now.

    Raises:
        TypeError, ValueError: `largest` is no integer, or out of its range.

    Example:
        >>> from fastattn.heap import keep_freed_memory
        >>> kept = keep_freed_memory()  # once, before training on a CPU
    """
    if largest is not None and check_integer("largest", largest) > GREATEST_THRESHOLD:
        raise ValueError(f"largest must be at most {GREATEST_THRESHOLD}, got {largest}")
    if VARIABLES & os.environ.keys() or not set_option(TRIM_THRESHOLD, 2**31 - 1):
        return False
    return set_option(MMAP_MAX, 0) if largest is None else set_option(MMAP_THRESHOLD, largest)
