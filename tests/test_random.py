"""Dropout's random numbers: Philox's published answers, and the same choice by every way of computing it."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastattn.dropout import dropout_threshold
from fastattn.eager import random as eager
from fastattn.kernels.random import keep_of_rows, keep_tile
from tests import reference

SEED = 0x1234_5678_9ABC_DEF0

# (counter, key, words) of seven rounds: kat_vectors of the authors' library Random123
KNOWN = (
    ([0, 0, 0, 0], 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, (1 << 64) - 1, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert [int(w) for w in reference.philox([np.uint64(c) for c in counter], key)] == words
    seed = torch.tensor([key - (1 << 64) if key >> 63 else key])
    assert [int(w) for w in eager.philox(seed, tuple(torch.tensor([c]) for c in counter))] == words


@triton.jit
def write_choices(
    OUT, seed, batch, head, first_row, first_column, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    if HOW == "rows":
        kept = keep_of_rows(seed, (first_row + rows)[:, None], (first_column + columns)[None, :], threshold)
    elif HOW == "tile":
        kept = keep_tile(seed, batch, head, first_row, first_column, threshold, ROWS, COLUMNS)
    else:
        kept = keep_tile(seed, batch, head, first_row, first_column, threshold, ROWS, COLUMNS, COLUMNS_FIRST=True)
        offsets = columns[:, None] + rows[None, :] * COLUMNS
    tl.store(OUT + offsets, kept.to(tl.int8))


@pytest.mark.parametrize("how", ["rows", "tile", "columns first"])
@pytest.mark.parametrize("shape", [(16, 16), (16, 32), (64, 16), (32, 128), (128, 64)])
def test_kernels_choose_as_the_definition(how, shape):
    rows, columns = shape
    first_row, first_column, p = 3 * rows, 3 * columns, 0.3
    whole = reference.philox_keep(SEED, (2, 3, first_row + rows, first_column + columns), p)
    out = torch.full(shape, -1, dtype=torch.int8)
    threshold = dropout_threshold(p)
    write_choices[(1,)](out, SEED, 1, 2, first_row, first_column, threshold, ROWS=rows, COLUMNS=columns, HOW=how)
    if how == "rows":
        whole = reference.philox_keep_rows(SEED, first_row + rows, first_column + columns, p)[None, None].expand(
            2, 3, -1, -1
        )
    torch.testing.assert_close(out.bool(), whole[1, 2, first_row:, first_column:], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["rows", "tile"])
def test_debugging_lets_the_counters_wrap_around(how, monkeypatch):
    """With TRITON_DEBUG=1 an integer that overflows ends the process, unless the kernel says that it may."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    out = torch.empty(16, 32, dtype=torch.int8)
    write_choices[(1,)](out, SEED, 1, 2, 0, 0, 1, ROWS=16, COLUMNS=32, HOW=how)


@pytest.mark.parametrize("columns", [range(1), range(5, 77), range(64, 96), range(31, 33), range(40, 40)])
def test_eager_chooses_as_the_definition(columns):
    whole = reference.philox_keep(SEED, (2, 3, 50, 100), 0.3)[1, 2]
    rows = torch.tensor([49, 0, 7, 8, 15, 16, 24])
    one = torch.tensor(1)
    kept = eager.keep(torch.tensor([SEED]), one, one + 1, rows[:, None], columns, 0.3)
    torch.testing.assert_close(kept, whole[rows][:, columns.start : columns.stop], rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 4, 77])
def test_eager_chooses_of_rows_as_the_definition(columns):
    rows = torch.tensor([9, 0, 7, 8])
    kept = eager.keep_of_rows(torch.tensor([SEED]), rows[:, None], columns, 0.3)
    torch.testing.assert_close(kept, reference.philox_keep_rows(SEED, 10, columns, 0.3)[rows], rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_share_of_what_is_dropped(p):
    """Within five standard deviations; a p next to 1 drops nearly all, next to 0 nothing."""
    n = 1 << 20
    zero, rows = torch.tensor(0), torch.arange(n >> 10)[:, None]
    dropped = (~eager.keep(torch.tensor([SEED]), zero, zero, rows, range(1 << 10), p)).double().mean().item()
    assert dropped == pytest.approx(p, abs=2**-16 + 5 * (p * (1 - p) / n) ** 0.5)
