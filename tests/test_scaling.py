"""Memory grows with the length, not with its square, whatever is switched on; and the measuring itself measures."""

import pytest
import torch

import fastattn
from bench.memory import growth
from bench.processes import in_child
from fastattn.heap import MMAP_THRESHOLD, set_option

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 7)},
    "key mask": {"mask": lambda n: torch.rand(1, 1, 1, n) > 0.2},
    "causal with a key mask": {"causal": True, "mask": lambda n: torch.rand(1, 1, 1, n) > 0.2},
    "block mask": {"mask": lambda n: fastattn.BlockMask.window(n, n, n // 8, 0)},
    "bias per row": {"bias": lambda n: torch.randn(1, 2, n, 1, requires_grad=True)},
    "causal ALiBi": {"causal": True, "alibi_slopes": lambda n: torch.rand(2)},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": lambda n: torch.randn(2, requires_grad=True)},
    "dropout": {"causal": True, "dropout_p": 0.1},
    "gradient of the LSE": {"return_lse": True},
    "everything": {
        "window": (None, 7), "mask": lambda n: torch.rand(1, 1, 1, n) > 0.2, "alibi_slopes": lambda n: torch.rand(2),
        "bias": lambda n: torch.randn(1, 2, n, 1, requires_grad=True), "softcap": 5.0, "dropout_p": 0.1,
        "sinks": lambda n: torch.randn(2, requires_grad=True), "return_lse": True,
    },
}  # fmt: skip


def step(name, n):
    """A forward and backward of n queries and keys, with a feature, over inputs of its own."""
    options = {key: value(n) if callable(value) else value for key, value in FEATURES[name].items()}
    qkv = [torch.randn(1, heads, n, 32, requires_grad=True) for heads in (2, 1, 1)]
    leaves = [*qkv, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]

    def run():
        out = fastattn.attention(*qkv, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(sum(x.sum() for x in outputs), leaves)

    return run


def growth_with(name, lengths):
    """Bytes that a forward and backward takes on top of its inputs, for each length, in a process of its own.

    Most of it is one block of scores with its temporaries, whose size does not depend on the length.
    """
    torch.set_num_threads(1)
    set_option(MMAP_THRESHOLD, 1 << 18)  # what glibc would keep in fragments is not what an op needs
    step(name, 64)()
    return [growth(step(name, n)) for n in lengths]


def quadratic(n):
    """Bytes of an N × N matrix, to see that growth sees it."""
    torch.ones(n // 16, n)  # what the library loads at first use does not count
    return growth(lambda: torch.ones(n, n))


def check_growth(name, short, long):
    """Four times the length may take a few times the memory, but never a matrix of scores, of a single head even."""
    small, large = in_child(growth_with, name, [short, long])
    scores = long * long * 4
    assert large - small < scores / 2, f"{small / 2**20:.1f} MiB at {short}, {large / 2**20:.1f} MiB at {long}"
    assert large < scores


@pytest.mark.parametrize("name", FEATURES)
def test_memory_is_linear_in_the_length_with_every_feature(name):
    check_growth(name, 1024, 4096)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_memory_is_linear_up_to_long_sequences(name):
    check_growth(name, 4096, 16384)


def test_growth_sees_a_matrix():
    assert in_child(quadratic, 4096) == pytest.approx(4096 * 4096 * 4, rel=0.05)
