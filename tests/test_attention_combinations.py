"""Combinations of all of attention's features, shapes, strides and dtypes against the fp64 definition, on both backends.

The default run takes a table in which every two settings of every two features meet at least once; `make test-all` draws
combinations at random (hypothesis) as well, and shrinks what fails.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from tests.compare import max_error
from tests.test_attention import BACKENDS, Case, check

# Shapes of a mask or bias, where -1 is the full size; "blocks" is a BlockMask of all pairs.
FACTORS = {
    "heads": [(2, 2), (4, 2), (3, 1)],
    "lengths": [(40, 40), (33, 65), (37, 20), (1, 50)],
    "dims": [(16, None), (24, 40), (80, 80)],
    "batch": [1, 2],
    "causal": [False, True],
    "window": [None, (12, None), (None, 6), (9, 5)],
    "mask": [None, (-1, -1), (-1, 1, 1, -1), (-1, -1, -1, -1), "blocks"],
    "bias": [None, (-1, -1, -1, -1), (1, -1, -1), (-1, 1), (1, 1, -1)],
    "alibi": [None, "heads", "batch"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.3],
    "scale": [None, -0.4],
    "grad_lse": [False, True],
    "layout": ["contiguous", "heads beside rows", "every second column", "expanded batch"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
}


@dataclass(frozen=True)
class Combination(Case):
    """A case whose mask may be a BlockMask, and whose tensors may lie in memory in other ways."""

    blocks: bool = False
    layout: str = "contiguous"

    @classmethod
    def of(cls, choice):
        """(the case, its dtype) of one setting for each factor."""
        c = dict(choice)
        (heads, kv_heads), (n, nk), (dim, value_dim) = c.pop("heads"), c.pop("lengths"), c.pop("dims")
        mask, alibi, dtype = c.pop("mask"), c.pop("alibi"), c.pop("dtype")
        case = cls(
            heads=heads, kv_heads=kv_heads, n=n, nk=nk, dim=dim, value_dim=value_dim, blocks=mask == "blocks",
            mask=(-1, -1, -1, -1) if mask == "blocks" else mask,
            alibi={None: None, "heads": (heads,), "batch": (c["batch"], heads)}[alibi], **c,
        )  # fmt: skip
        return case, dtype

    def inputs(self, dtype, seed=0):
        tensors, options = super().inputs(dtype, seed)
        tensors[:3] = [laid_out(x, self.layout) for x in tensors[:3]]
        return tensors, options

    def given(self, options):
        return {**options, "mask": fastattn.BlockMask.from_mask(options["mask"])} if self.blocks else options


def laid_out(x, layout):
    """The numbers of x (B, H, N, D) in another memory layout (of the expanded batch: the numbers of its first sample)."""
    if layout == "heads beside rows":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second column":
        memory = x.new_full((*x.shape[:3], 2 * x.shape[3]), torch.nan)
        return memory[..., ::2].copy_(x)
    return x[:1].expand(x.shape) if layout == "expanded batch" else x


def pairwise(factors):
    """Rows of one setting for each factor, chosen greedily until every two settings of every two factors have met."""
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for name in names:
            if name not in row:
                gain = [
                    sum(
                        tuple(sorted([(name, i), old], key=lambda x: names.index(x[0]))) in missing
                        for old in row.items()
                    )
                    for i in range(len(factors[name]))
                ]
                row[name] = gain.index(max(gain))
        missing -= {(a, b) for a, b in itertools.combinations([(name, row[name]) for name in names], 2)}
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


TABLE = pairwise(FACTORS)


def run(choice, backend):
    case, dtype = Combination.of(choice)
    check(case, dtype, backend)


def test_every_two_settings_meet():
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(str(row[a]), str(row[b])) for row in TABLE}
        assert met == {(str(x), str(y)) for x in FACTORS[a] for y in FACTORS[b]}
    assert len(TABLE) < 60


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", range(len(TABLE)))
def test_table(row, backend):
    run(TABLE[row], backend)


def test_layouts_change_no_number():
    x = torch.randn(2, 3, 5, 4)
    for layout in FACTORS["layout"][:3]:
        assert max_error(laid_out(x, layout), x) == 0
    assert len({laid_out(x, layout).stride() for layout in FACTORS["layout"]}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(choice=st.fixed_dictionaries({
    **{name: st.sampled_from(options) for name, options in FACTORS.items()},
    "lengths": st.tuples(st.integers(1, 70), st.integers(1, 70)),
    "dims": st.tuples(st.integers(1, 64), st.integers(1, 64)),
    "window": st.none() | st.tuples(st.none() | st.integers(0, 70), st.none() | st.integers(0, 70)),
    "softcap": st.none() | st.floats(0.5, 50.0),
    "scale": st.none() | st.floats(-1.0, 1.0),
    "dropout_p": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
}))  # fmt: skip
def test_random_combinations(choice, backend):
    run(choice, backend)
