"""Types of command-line arguments, for `argparse`: what is out of range ends a benchmark before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def seconds(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number:g}")
    return number


def folder(text: str) -> Path:
    """Made at once: that it cannot be made would otherwise be known when everything has been measured."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be a folder: {error}") from error
    return path
