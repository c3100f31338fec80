"""Memory grows with the length, not with its square, whatever is switched on; and the measuring itself measures."""

import pytest
import torch

import fastattn
from bench.contest import Spread
from bench.memory import growth, in_child
from bench.report import change, compare
from bench.scaling import exponent


def every_feature(n):
    """Bytes that a forward and backward with all of attention's features takes on top of its inputs.

    Most of it is one block of scores with its temporaries, whose size does not depend on n.
    """
    torch.set_num_threads(1)

    def step(n):
        heads = 2
        leaves = [torch.randn(1, h, n, 32, requires_grad=True) for h in (heads, 1, 1)]
        leaves += [torch.randn(1, heads, n, 1, requires_grad=True), torch.randn(heads, requires_grad=True)]
        query, key, value, bias, sinks = leaves
        rules = dict(mask=torch.rand(1, 1, 1, n) > 0.2, alibi_slopes=torch.rand(heads), softcap=5.0, dropout_p=0.1)

        def run():
            out, lse = fastattn.attention(
                query, key, value, bias=bias, sinks=sinks, window=(None, 7), return_lse=True, **rules
            )
            return torch.autograd.grad((out.sum() + lse.sum()), leaves)

        return run

    step(64)()
    return growth(step(n))


def quadratic(n):
    """Bytes of an N × N matrix, to see that growth sees it."""
    torch.ones(n // 16, n)  # what the library loads at first use does not count
    return growth(lambda: torch.ones(n, n))


def test_memory_is_linear_in_the_length_with_every_feature():
    short, long = (in_child(every_feature, n) for n in (1024, 4096))
    scores = 4096 * 4096 * 4  # of one of the two heads
    assert long - short < scores, f"{short / 2**20:.1f} MiB at 1024, {long / 2**20:.1f} MiB at 4096"


def test_growth_sees_a_matrix():
    assert in_child(quadratic, 4096) == pytest.approx(4096 * 4096 * 4, rel=0.05)


def test_exponent():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def result(ours, theirs):
    rows = [{"case": "c", "provider": name, "rounds": r} for name, r in (("fastattn", ours), ("torch", theirs))]
    return {"rows": rows}


@pytest.mark.parametrize(("factor", "flagged"), [(1.0, 0), (1.2, 1), (0.8, 0)], ids=["noise", "slower", "faster"])
def test_comparison_flags_a_slowdown_and_not_noise(factor, flagged):
    """The second machine is twice as slow, which is nobody's fault."""
    generator = torch.Generator().manual_seed(0)

    def rounds(scale):
        return (scale * (1 + 0.03 * torch.randn(20, generator=generator))).tolist()

    old, new = result(rounds(1.0), rounds(1.1)), result(rounds(2.0 * factor), rounds(2.2))
    table, slower = compare(old, new)
    assert slower == flagged
    assert ("SLOWER" in table, "faster" in table) == (factor > 1, factor < 1)
    spread, peer = change({r["provider"]: r for r in old["rows"]}, {r["provider"]: r for r in new["rows"]})
    assert peer == "torch"
    assert spread.median == pytest.approx(factor, rel=0.05)


def test_spread_is_median_and_quartiles():
    assert Spread.of([1, 2, 3, 4, 100]) == Spread(3, 2, 4)
    assert Spread.of([5]) == Spread(5, 5, 5)
