"""PyTorch's counter of FLOPs counts of our ops what it counts of the same formulas in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.integrations import flop_counter


@pytest.fixture(autouse=True)
def registered():
    flop_counter.register()
    flop_counter.register()


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("recompute", ["none", "hidden"])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(gated, recompute, backward):
    x, w1, w2, gate = leaves((2, 5, 8), (12, 8), (6, 12), (12, 8))

    def plain():
        hidden = F.silu(F.linear(x, gate)) * F.linear(x, w1) if gated else F.silu(F.linear(x, w1))
        y = F.linear(hidden, w2)
        if backward:
            y.sum().backward()

    def ours():
        options = {"gate_weight": gate if gated else None, "activation": "silu", "recompute": recompute}
        y = fastattn.feed_forward(x, w1, None, w2, None, **options)
        if backward:
            y.sum().backward()

    again = 2 * 10 * 12 * 8 * (2 if gated else 1) if backward and recompute == "hidden" else 0
    assert counted(ours) == counted(plain) + again


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_layers_and_losses(frozen):
    x, w = leaves((7, 8), (12, 8))
    w.requires_grad_(not frozen)
    target = torch.randint(12, (7,))
    plain = counted(lambda: F.cross_entropy(F.linear(x, w), target).backward())
    assert counted(lambda: fastattn.linear_cross_entropy(x, w, target).backward()) == plain
    assert counted(lambda: fastattn.linear(x, w, activation="gelu").sum().backward()) == plain


def test_attention():
    """PyTorch's backward computes the scores again, which its formula by matrix products does not."""
    q, k, v = leaves((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6))
    pairs = 2 * 2 * 4 * 5 * 9
    assert counted(lambda: fastattn.attention(q, k, v, causal=True)) == pairs * (8 + 6)
    both = counted(lambda: fastattn.attention(q, k, v, causal=True).sum().backward())
    assert both == pairs * (8 + 6) + pairs * (3 * 8 + 2 * 6)
    assert counted(lambda: fastattn.attention_weights(q, k, rows=[1, 4])) == 2 * 2 * 4 * 2 * 9 * 8


def test_packed_and_cached():
    q, k, v = (torch.randn(12, 2, 8, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)

    def run():
        return fastattn.varlen_attention(q, k, v, offsets, offsets, 7, 7, causal=True)

    pairs = 2 * 2 * (25 + 49)
    assert counted(run) == pairs * 16
    assert counted(lambda: run().sum().backward()) == pairs * (16 + 40)
    query, cache = torch.randn(2, 4, 1, 8), [torch.zeros(2, 2, 16, 8) for _ in range(2)]
    new = torch.randn(2, 2, 1, 8)
    for lengths, keys in ((5, 12), (torch.tensor([3, 9], dtype=torch.int32), 14)):
        count = counted(lambda n=lengths: fastattn.attention_with_kv_cache(query, *cache, n, key=new, value=new))
        assert count == 2 * 4 * keys * 16
