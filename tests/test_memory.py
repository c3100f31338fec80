"""Measured memory: what a loss over a large vocabulary needs at most, and what a feed-forward layer keeps."""

import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastattn
from bench.memory import growth, resident
from bench.processes import in_child
from fastattn.heap import GREATEST_THRESHOLD, MMAP_THRESHOLD, keep_freed_memory, set_option
from fastattn.models import GPT, GPTConfig


def map_each_tensor():
    """Tensors of 64 KB and more get memory of their own from now on: holes in the heap, which vary, are not measured."""
    set_option(MMAP_THRESHOLD, 1 << 16)


def loss_step(ours, tokens, classes, width):
    """Bytes on top of hidden states and weight that a loss with its gradients needs at most."""
    torch.set_num_threads(1)
    if ours:
        map_each_tensor()

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


@pytest.mark.parametrize("width", [64, pytest.param(768, marks=pytest.mark.slow)])
def test_linear_cross_entropy_needs_a_fifth_of_torchs_memory(width):
    """At GPT-2's vocabulary. The weight's gradient, which both have, is an eighth of torch's peak at width 768."""
    ours, torchs = (in_child(loss_step, which, 2048, 50_257, width) for which in (True, False))
    gradients = 4 * width * (2048 + 50_257)
    assert gradients < ours < torchs / 5, f"{ours / 1e6:.0f} MB, torch {torchs / 1e6:.0f} MB"
    assert ours < gradients + 60e6, f"{(ours - gradients) / 1e6:.0f} MB on top of the gradients"


def norm_step(norm, rows, width):
    """Bytes that forward and backward of 16-bit rows take at most."""
    torch.set_num_threads(1)

    def step(rows):
        input, weight, bias = (torch.randn(s).bfloat16().requires_grad_() for s in ((rows, width), width, width))
        grad_output = torch.randn(rows, width).bfloat16()
        return lambda: torch.autograd.grad(norm(input, (width,), weight, bias), (input, weight, bias), grad_output)

    step(16)()
    return growth(step(rows))


def test_layer_norm_of_16_bit_rows_needs_no_more_memory_than_torchs():
    """Its right sums over rows need x̂, whose memory the gradient of the input then takes."""
    ours, torchs = (in_child(norm_step, norm, 4096, 768) for norm in (fastattn.layer_norm, F.layer_norm))
    assert 0 < ours < 1.1 * torchs, f"{ours / 1e6:.1f} MB, torch {torchs / 1e6:.1f} MB"


def training(fused, steps):
    """(losses of `steps` training steps of a GPT, bytes that the last of them takes at most)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(8192, context_length=64, num_layers=1, num_heads=2, d_model=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []

    def step():
        tokens = torch.randint(8192, (32, 65), generator=torch.Generator().manual_seed(len(losses) % 2))
        loss = model(tokens[:, :-1], tokens[:, 1:], return_logits=not fused)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(steps):
        step()
    return losses, growth(step)


def test_a_gpt_trains_alike_without_its_logits_in_less_memory():
    (ours, memory), (plain, plain_memory) = (in_child(training, fused, 6) for fused in (True, False))
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[-1] < ours[0] - 0.5
    assert memory < plain_memory - 4 * 32 * 64 * 8192, "at least the logits are saved"


def feed_forward(gated, recompute, rows=8192, width=64, hidden=1024):
    """A call with fresh inputs."""
    x, w1, gate = (torch.randn(n, width, requires_grad=True) for n in (rows, hidden, hidden))
    w2 = torch.randn(width, hidden, requires_grad=True)
    options = {"gate_weight": gate} if gated else {}
    return lambda: fastattn.feed_forward(x, w1, None, w2, None, recompute=recompute, **options)


def held(gated, recompute):
    """How many times the hidden layer (rows, hidden) stays resident between forward and backward."""
    torch.set_num_threads(1)
    map_each_tensor()
    feed_forward(gated, recompute, rows=128)().sum().backward()
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
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        run().sum().backward()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
    assert sum(event.name in names for event in seen.events()) == products


def faults_of_a_step(keeps, *largest):
    """Page faults of a step that takes and gives back 256 MiB."""
    if keeps:
        assert keep_freed_memory(*largest)

    def step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(64 << 18) for _ in range(4)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return [step() for _ in range(5)][-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is asked to")
def test_freed_memory_is_kept():
    plain, kept, limited = (in_child(faults_of_a_step, *how) for how in ((False,), (True,), (True, GREATEST_THRESHOLD)))
    assert kept < plain / 10
    assert limited > plain / 2
    assert plain > 100


@pytest.mark.parametrize("largest", [-1, GREATEST_THRESHOLD + 1])
def test_what_glibc_would_refuse_is_an_error(largest):
    with pytest.raises(ValueError, match=f"largest must be at .* got {largest}"):
        keep_freed_memory(largest)
