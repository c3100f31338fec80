"""Whether Triton's kernels run in its CPU interpreter."""

from __future__ import annotations

import os


def interpreting() -> bool:
    """What TRITON_INTERPRET says now; Triton itself reads it when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
