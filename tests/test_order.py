"""The order in which attention's programs start: every block once, the longest of several heads first."""

import pytest
import torch
import triton
import triton.language as tl

from bench.codegen import schedule
from fastattn.kernels import order
from tests import reference
from tests.compare import assert_close


@triton.jit
def write_order(OUT, blocks, together):
    head, place = order.head_and_block(tl.program_id(0), blocks, together)
    tl.store(OUT + 2 * tl.program_id(0), head)
    tl.store(OUT + 2 * tl.program_id(0) + 1, place)


@pytest.mark.parametrize("together", [None, 1, 2, 3, 7, 9])
@pytest.mark.parametrize(("heads", "blocks"), [(7, 5), (1, 4), (6, 1)])
def test_every_block_of_every_head_has_one_program(heads, blocks, together):
    out = torch.full((heads * blocks, 2), -1, dtype=torch.int32)
    write_order[(heads * blocks,)](out, blocks, together)
    programs = [tuple(pair) for pair in out.tolist()]
    assert sorted(programs) == [(head, place) for head in range(heads) for place in range(blocks)]
    assert programs == list(schedule.order(heads, blocks, together))


@triton.jit
def write_firsts(ROWS, KEYS, num_heads, length, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    batch, head, row = order.query_block(number, num_heads, length, 100, BLOCK)
    tl.store(ROWS + number, (batch * 1000 + head) * 1000 + row)
    batch, head, key = order.key_block(number, num_heads, length, 100, BLOCK)
    tl.store(KEYS + number, (batch * 1000 + head) * 1000 + key)


def test_the_last_rows_and_the_first_keys_come_first():
    rows, keys = torch.zeros(2, 2 * 3 * 4, dtype=torch.int64)
    write_firsts[(len(rows),)](rows, keys, 3, 50, BLOCK=16)
    heads = [(batch * 1000 + head) * 1000 for batch in range(2) for head in range(3)]
    assert rows.tolist() == [head + row for row in (48, 32, 16, 0) for head in heads]
    assert keys.tolist() == [head + key for key in (0, 16, 32, 48) for head in heads]


def test_how_many_heads_are_mixed():
    share = order.L2_SHARE
    assert order.heads_together(32, share // 8, None, 0, False) == 8
    assert order.heads_together(4, share // 8, None, 0, False) == 4
    assert order.heads_together(32, 2 * share, None, 0, False) == 1
    assert order.heads_together(32, share // 8, None, None, True) == 8  # a block mask: who knows
    assert order.heads_together(32, share // 8, None, None, False) is None  # all blocks cost the same,
    assert order.heads_together(32, share // 8, 100, 0, False) is None  # with a window, too


@pytest.mark.parametrize(("heads", "tokens"), schedule.SIZES)
@pytest.mark.parametrize("gpu", schedule.GPUS)
def test_shares_are_about_even(gpu, heads, tokens):
    mixed, head_by_head = (schedule.forward(gpu, heads, tokens, mixed) for mixed in (True, False))
    assert mixed <= head_by_head + 0.01
    if heads * tokens > 1 << 15:  # fewer do not make programs enough for two rounds
        assert mixed <= 1.12


def test_time_of_the_last():
    assert schedule.unevenness([1, 1, 1, 1], 2) == 1.0
    assert schedule.unevenness([1, 1, 2], 2) == 1.5  # the longest last: 3 where 2 would do
    assert schedule.unevenness([2, 1, 1], 2) == 1.0


@pytest.fixture
def fresh():
    """No answers from before, and none left."""
    order.heads_together.cache_clear()
    yield
    order.heads_together.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
@pytest.mark.parametrize("together", [1, 2, 4])
def test_attention_of_mixed_heads(together, monkeypatch, fresh):
    """Three samples of two key heads and four query heads, so that no group of heads ends with a sample."""
    from fastattn import attention, backend

    monkeypatch.setattr(order, "L2_SHARE", together * 70 * (16 + 16) * 4)  # of query heads; half as many key heads
    generator = torch.manual_seed(0)
    q, k, v, dy = (torch.randn(3, h, 70, 16, generator=generator) for h in (4, 2, 2, 4))
    truth = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference.attention(*truth, causal=True)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    eager = reference.attention(*plain, causal=True)[0]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with backend.use("triton"):
        out = attention(*leaves, causal=True)
        grads = torch.autograd.grad(out, leaves, dy)
    assert_close("out", out, expected, eager)
    triples = zip(grads, torch.autograd.grad(expected, truth, dy.double()), torch.autograd.grad(eager, plain, dy))
    for name, (got, right, other) in zip(("dq", "dk", "dv"), triples):
        assert_close(name, got, right, other)
