"""Measured memory: what a loss over a large vocabulary needs at most, and what a feed-forward layer keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastattn
from bench.memory import growth, in_child, resident


def loss_step(ours, tokens, classes, width):
    """Bytes on top of hidden states and weight that a loss with its gradients needs at most."""
    torch.set_num_threads(1)

    def step(tokens, classes):
        hidden = torch.randn(tokens, width, requires_grad=True)
        weight = torch.randn(classes, width).div_(width**0.5).requires_grad_()
        target = torch.randint(classes, (tokens,))

        def run():
            if ours:
                fastattn.linear_cross_entropy(hidden, weight, target).backward()
            else:
                F.cross_entropy(F.linear(hidden, weight), target).backward()

        return run

    step(16, 100)()
    return growth(step(tokens, classes))


@pytest.mark.parametrize("width", [256, pytest.param(768, marks=pytest.mark.slow)])
def test_linear_cross_entropy_needs_a_fifth_of_torchs_memory(width):
    """At GPT-2's vocabulary. The weight's gradient, which both have, is an eighth of torch's peak at width 768."""
    ours, torchs = (in_child(loss_step, which, 2048, 50_257, width) for which in (True, False))
    gradients = 4 * width * (2048 + 50_257)
    assert gradients < ours < torchs / 5, f"{ours / 1e6:.0f} MB, torch {torchs / 1e6:.0f} MB"
    assert ours < gradients + 60e6, f"{(ours - gradients) / 1e6:.0f} MB on top of the gradients"


def feed_forward(gated, recompute, rows=8192, width=64, hidden=1024):
    """A call with fresh inputs."""
    x, w1, gate = (torch.randn(n, width, requires_grad=True) for n in (rows, hidden, hidden))
    w2 = torch.randn(width, hidden, requires_grad=True)
    options = {"gate_weight": gate} if gated else {}
    return lambda: fastattn.feed_forward(x, w1, None, w2, None, recompute=recompute, **options)


def held(gated, recompute):
    """How many times the hidden layer (rows, hidden) stays resident between forward and backward."""
    torch.set_num_threads(1)
    feed_forward(gated, recompute, rows=16)().sum().backward()
    run = feed_forward(gated, recompute)
    before = resident()
    out = run()
    after = resident()
    return (after - before - 4 * out.numel()) / (4 * 8192 * 1024)


LEVELS = [
    (False, "none", 2, 6),
    (False, "activation", 1, 6),
    (False, "hidden", 0, 7),
    (True, "none", 3, 9),
    (True, "activation", 2, 9),
    (True, "hidden", 0, 11),
]


@pytest.mark.parametrize(("gated", "recompute", "kept", "products"), LEVELS)
def test_feed_forward_keeps_and_computes_what_it_says(gated, recompute, kept, products):
    assert in_child(held, gated, recompute) == pytest.approx(kept, abs=0.1)
    run = feed_forward(gated, recompute, rows=32)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run().sum().backward()
    assert sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in seen.events()) == products
