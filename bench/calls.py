"""How many calls of the package's functions a run makes: what the host does, as a number that no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import fastattn

BUDGETS = Path(__file__).parent / "overhead.json"
PACKAGE = str(Path(fastattn.__file__).parent)


def count_calls(run: Callable[[], object]) -> int:
    """Calls of Python functions of the package, and of C functions by them."""
    count = 0

    def hook(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1

    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count
