"""Planted out-of-bounds accesses, races and overflows are caught; clean kernels over unusual views are not accused."""

import pytest
import torch
import triton
import triton.language as tl

from tests import sanitizer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the sanitizer watches the interpreter")


@triton.jit
def copy_rows(source, target, n_cols, stride_source, stride_target, BUG: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row; BUG plants what the name says."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    read_mask = offs < n_cols
    write_mask = offs < n_cols
    if BUG == "load without mask":
        read_mask = offs < BLOCK
    if BUG == "load one too far":
        read_mask = offs <= n_cols
    if BUG == "load before the start":
        offs = offs - 1
    if BUG == "store one too far":
        write_mask = offs <= n_cols
    tile = tl.load(source + row * stride_source + offs, mask=read_mask, other=0.0)
    tl.store(target + row * stride_target + offs, tile, mask=write_mask)


@triton.jit
def shift_in_place(x, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    neighbour = tl.load(x + offs + 1, mask=offs + 1 < n, other=0.0)
    tl.store(x + offs, neighbour, mask=offs < n)


@triton.jit
def column_sum(x, out, n_cols, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """Every program adds its row to `out`."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x + row * n_cols + offs, mask=offs < n_cols, other=0.0)
    if HOW == "atomic":
        tl.atomic_add(out + offs, tile, mask=offs < n_cols)
    elif HOW == "load and store":
        tl.store(out + offs, tl.load(out + offs, mask=offs < n_cols) + tile, mask=offs < n_cols)
    elif HOW == "overlapping store":
        tl.store(out + row + offs, tile, mask=offs < n_cols)
    elif HOW == "atomic, read by another":
        tl.atomic_add(out + offs, tile, mask=offs < n_cols)
        tl.load(out + row)
    elif HOW == "atomic out of bounds":
        tl.atomic_add(out + offs, tile)
    elif HOW == "duplicate":
        tl.store(out + row * BLOCK + offs // 2, tile)


def run_copy(source, target, bug="none", block=16):
    strides = source.stride(0), target.stride(0)
    copy_rows[(source.shape[0],)](source, target, source.shape[1], *strides, BUG=bug, BLOCK=block)


@pytest.mark.parametrize("bug", ["load without mask", "load one too far", "load before the start", "store one too far"])
def test_a_row_access_outside_its_tensor_is_caught(bug):
    source, target = torch.randn(1, 13), torch.zeros(1, 13)
    with pytest.raises(sanitizer.OutOfBounds, match="is in no tensor"):
        run_copy(source, target, bug)


def test_the_gap_between_the_rows_of_a_view_is_out_of_bounds():
    storage = torch.randn(4, 32)
    with pytest.raises(sanitizer.OutOfBounds):
        run_copy(storage[:, :13], torch.zeros(4, 13), "load one too far")


def test_a_store_into_the_next_row_is_a_race():
    with pytest.raises(sanitizer.Race, match="stores to an element that another program stores to"):
        run_copy(torch.randn(4, 13), torch.zeros(4, 13), "store one too far")


def test_reading_what_another_program_overwrites_is_a_race():
    with pytest.raises(sanitizer.Race):
        shift_in_place[(4,)](torch.randn(64), 64, BLOCK=16)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("load and store", sanitizer.Race),
        ("overlapping store", sanitizer.Race),
        ("atomic, read by another", sanitizer.Race),
        ("duplicate", sanitizer.Race),
        ("atomic out of bounds", sanitizer.OutOfBounds),
    ],
)
def test_unordered_accumulation_is_caught(how, error):
    with pytest.raises(error):
        column_sum[(4,)](
            torch.randn(4, 13), torch.zeros(64)[:13] if "out" in how else torch.zeros(64), 13, how, BLOCK=16
        )


def test_an_error_leaves_no_state_behind():
    with pytest.raises(sanitizer.OutOfBounds):
        run_copy(torch.randn(1, 13), torch.zeros(1, 13), "load without mask")
    source, target = torch.randn(1, 13), torch.zeros(1, 13)
    run_copy(source, target)
    assert torch.equal(source, target)


def test_atomic_accumulation_is_clean():
    x, out = torch.randn(4, 13), torch.zeros(13)
    column_sum[(4,)](x, out, 13, "atomic", BLOCK=16)
    torch.testing.assert_close(out, x.sum(0))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(torch.randn(4, 16), torch.zeros(4, 16), id="contiguous"),
        pytest.param(torch.randn(4, 32)[:, 5:18], torch.zeros(4, 13), id="view of a bigger storage"),
        pytest.param(torch.randn(8, 13)[::2], torch.zeros(8, 13)[1::2], id="every other row"),
        pytest.param(torch.randn(1, 13).expand(4, 13), torch.zeros(4, 13), id="broadcast with stride 0"),
        pytest.param(torch.zeros(0, 13), torch.zeros(0, 13), id="no rows"),
        pytest.param(torch.zeros(4, 0), torch.zeros(4, 0), id="no columns"),
        pytest.param(torch.randn(4, 13).double(), torch.zeros(4, 13).half(), id="two element sizes"),
    ],
)
def test_clean_copies_raise_no_alarm(source, target):
    run_copy(source, target)
    torch.testing.assert_close(target, source.to(target.dtype))


def test_views_of_one_storage_share_their_state():
    packed = torch.randn(4, 32)
    run_copy(packed[:, :13], packed[:, 16:29])
    assert torch.equal(packed[:, :13], packed[:, 16:29])
    with pytest.raises(sanitizer.Race):
        run_copy(packed[:3, :13], packed[1:, :13])


def test_one_storage_seen_as_two_dtypes():
    bits = torch.arange(64, dtype=torch.int16).reshape(4, 16)
    target = torch.zeros(4, 16, dtype=torch.int16)
    run_copy(bits.view(torch.int32)[:, :8], target.view(torch.int32)[:, :8])
    assert torch.equal(bits, target)


@triton.jit
def integer_kernel(a, b, out, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = (tl.load(a + offs), tl.load(b + offs)) if BLOCK > 1 else (tl.load(a), tl.load(b))
    if WHAT == "add":
        result = x + y
    elif WHAT == "sub":
        result = x - y
    else:
        result = x * y
    tl.store(out + offs, result)


LARGEST = {torch.int8: 2**7 - 1, torch.int16: 2**15 - 1, torch.int32: 2**31 - 1}


@pytest.mark.parametrize("length", [1, 16])
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("what", ["add", "sub", "mul"])
def test_integers_that_overflow_raise(what, dtype, length):
    """The largest or smallest number itself is reached, and nothing beyond it."""
    largest = LARGEST[dtype]
    fits, beyond = (largest - 1, largest) if what == "add" else (-largest, -largest - 1)
    a, b = torch.full((length,), fits, dtype=dtype), torch.full((length,), -1 if what == "mul" else 1, dtype=dtype)
    out = torch.zeros_like(a)
    integer_kernel[(1,)](a, b, out, WHAT=what, BLOCK=length)
    assert torch.equal(out, getattr(torch, what)(a, b))
    a[-1] = beyond
    with pytest.raises(AssertionError, match=f"int{dtype.itemsize * 8} overflow detected for operation {what}"):
        integer_kernel[(1,)](a, b, out, WHAT=what, BLOCK=length)
