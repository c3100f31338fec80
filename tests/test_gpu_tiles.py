"""What a GPU's own tiles compute, in the interpreter: whole blocks, edges, halves of masked blocks, chunks of wide heads.

Elsewhere the interpreter has small tiles of its own. Bounds and races are checked here as there.
"""

import itertools

import pytest
import torch

import fastattn
from fastattn.kernels import attention, attention_backward, decode, launch
from fastattn.kernels import feed_forward as feed_forward_launcher
from fastattn.kernels.launch import Target
from tests import contract, test_decode
from tests.test_attention import Case, check
from tests.test_block_mask import MASKS, assert_all_close, both
from tests.test_feed_forward import feed_forward, linear

TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "sm_120": Target("cuda", 120, 188),
    "gfx942": Target("hip", 0, 304),
}
FEATURES = {
    "plain": {},
    "causal": {"causal": True, "grad_lse": True},
    "window": {"window": (90, 40)},
    "alibi": {"alibi": (4,), "causal": True},
    "softcap": {"softcap": 1.5},
    "mask": {"mask": (1, 1, -1, -1)},
    "bias": {"bias": (1, -1, -1, -1), "causal": True},
    "dropout": {"dropout_p": 0.3},
    "everything": {
        "causal": True, "window": (170, None), "mask": (-1, 1, 1, -1), "bias": (-1, -1), "alibi": (4,), "softcap": 2.0,
        "sinks": True, "dropout_p": 0.2,
    },
}  # fmt: skip
WIDTHS = {
    "D64": {"dim": 64},
    "D72": {"dim": 72},
    "D128": {"dim": 128},
    "D256": {"dim": 256},
    "D100-40": {"dim": 100, "value_dim": 40},
}
HEADS = {
    "each": {"heads": 4, "kv_heads": 4},
    "grouped": {"heads": 4, "kv_heads": 2},
    "packed": {"heads": 4, "kv_heads": 4, "packed": True},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEED_FORWARD = {
    "plain": feed_forward((140,), d_in=96, d_hidden=272, d_out=160, residual=True),
    "gated": feed_forward((140,), d_in=160, d_hidden=272, d_out=96, act="silu", gated=True, recompute="hidden"),
    "ragged": feed_forward((70,), d_in=70, d_hidden=150, d_out=33, act="gelu_tanh", dropout_p=0.2),
    "linear": linear("gelu", rows=(150,), d_in=96, d_out=288),
}


def combinations(*values):
    return list(itertools.product(*values, DTYPES, TARGETS))


ATTENTION = [
    case for case in combinations(FEATURES, WIDTHS, HEADS) if not (case[1] == "D100-40" and case[2] == "packed")
]
BLOCKS = combinations(MASKS)
DECODING = combinations(test_decode.CASES)
FEED_FORWARDS = combinations(FEED_FORWARD)


def a_few(cases, step):
    """Every `step`-th of those in bf16 by default (fp32 has small tiles on GPUs, too), and all behind the marker `slow`. A step that
    has no divisor in common with the numbers of values comes to each of them."""
    default = [case for case in cases if "bf16" in case][::step]
    return [pytest.param(*case, marks=[] if case in default else pytest.mark.slow) for case in cases]


@pytest.fixture
def tiles_of(monkeypatch):
    """Makes launches take the configurations of a target."""

    def choose(name):
        for module in (attention, attention_backward, decode, feed_forward_launcher, launch):
            monkeypatch.setattr(module, "current_target", lambda: TARGETS[name])

    return choose


@pytest.mark.parametrize(("feature", "width", "heads", "dtype", "target"), a_few(ATTENTION, 173))
def test_attention(feature, width, heads, dtype, target, tiles_of):
    tiles_of(target)
    length = 200 if heads == "packed" else 140
    case = Case(n=length, nk=200, **FEATURES[feature], **WIDTHS[width], **HEADS[heads])
    check(case, DTYPES[dtype], "triton")


@pytest.mark.parametrize(("mask", "dtype", "target"), a_few(BLOCKS, 23))
def test_block_masks(mask, dtype, target, tiles_of):
    tiles_of(target)
    with fastattn.backend.use("triton"):
        assert_all_close(both(*MASKS[mask], {}, DTYPES[dtype], extras=False))


@pytest.mark.parametrize(("name", "dtype", "target"), a_few(DECODING, 17))
def test_decoding(name, dtype, target, tiles_of):
    tiles_of(target)
    test_decode.test_matches_the_definition(name, DTYPES[dtype], "triton")


@pytest.mark.parametrize(("name", "dtype", "target"), a_few(FEED_FORWARDS, 3))
def test_feed_forward(name, dtype, target, tiles_of):
    tiles_of(target)
    contract.check_values(FEED_FORWARD[name], "triton", DTYPES[dtype])
