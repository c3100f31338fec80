"""Rows a few at a time, so that what is computed of them in between stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator


def row_blocks(rows: int, columns: int, numbers: int) -> Iterator[slice]:
    """Slices of `rows` rows with about `numbers` numbers each, at least one row."""
    step = max(1, numbers // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
