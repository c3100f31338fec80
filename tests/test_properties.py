"""Norms, feed-forward, rotary and losses at shapes and options that nobody chose, against their fp64 definitions.

By default the same few examples every time; `make test-all` tries many, others on every run.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import contract
from tests.contract import BACKENDS, DTYPES, Op
from tests.test_feed_forward import feed_forward
from tests.test_loss import loss
from tests.test_normalization import norm
from tests.test_rotary import rotary

flags, widths = st.booleans(), st.integers(1, 150)
leading = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def norms(draw: st.DrawFn) -> Op:
    dims = draw(st.integers(1, 2))
    normalized = tuple(draw(st.lists(st.integers(2, 40), min_size=dims, max_size=dims)))
    shape = (*draw(leading), *normalized)
    others = {"residual": shape} if draw(flags) else {}
    for name in ("scale", "shift"):
        if draw(flags):
            kept = draw(st.integers(0, len(shape) - dims))
            others[name] = (*shape[:kept], *(1,) * (len(shape) - dims - kept), *normalized)
    rms, weight = draw(flags), draw(flags)
    return norm(
        shape,
        dims,
        weight=weight,
        bias=draw(flags) and not rms,
        rms=rms,
        offset=draw(st.sampled_from([0.0, 1.0])) if weight else 0.0,
        dropout_p=draw(st.sampled_from([0.0, 0.3])),
        dtypes={"residual": torch.float32} if "residual" in others and draw(flags) else {},
        **others,
    )


@st.composite
def feed_forwards(draw: st.DrawFn) -> Op:
    return feed_forward(
        draw(leading),
        *(draw(widths) for _ in range(3)),
        act=draw(st.sampled_from(["relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "identity"])),
        bias1=draw(flags),
        bias2=draw(flags),
        gated=draw(flags),
        gate_bias=draw(flags),
        residual=draw(flags),
        dropout_p=draw(st.sampled_from([0.0, 0.3])),
        recompute=draw(st.sampled_from(["none", "activation", "hidden"])),
    )


@st.composite
def rotations(draw: st.DrawFn) -> Op:
    batch, tokens, dim = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.integers(2, 150))
    where = draw(st.sampled_from(["offset", "offsets", "positions", "positions of each"]))
    row, offset = st.integers(0, 39), st.integers(0, 40 - tokens)
    at = {
        "offset": {"offset": draw(offset)},
        "offsets": {"offset": [draw(offset) for _ in range(batch)]},
        "positions": {"positions": [draw(row) for _ in range(tokens)]},
        "positions of each": {"positions": [[draw(row) for _ in range(tokens)] for _ in range(batch)]},
    }[where]
    return rotary(
        batch,
        (draw(st.integers(1, 9)), draw(st.integers(1, 4))),
        tokens,
        dim,
        2 * draw(st.integers(1, dim // 2)),
        interleaved=draw(flags),
        factor=draw(st.sampled_from([1.0, 1.3])),
        by_token=draw(flags),
        **at,
    )


@st.composite
def losses(draw: st.DrawFn, logits: bool) -> Op:
    classes, tokens = draw(st.integers(1, 1200)), draw(leading)
    has_mean = math.prod(tokens) >= 3 and classes >= 8  # else every token may be ignored, or of weight 0
    return loss(
        tokens,
        draw(widths),
        classes,
        bias=draw(flags),
        weighted=draw(flags) and classes > 1,
        logits=logits,
        inplace=logits and draw(flags),
        ignore_index=draw(st.sampled_from([-100, 0, 5])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        z_loss=draw(st.sampled_from([0.0, 0.05])),
        softcap=draw(st.sampled_from([None, 1.5, 20.0])),
        reduction=draw(st.sampled_from(["sum", "none", "mean"][: 2 + has_mean])),
    )


FAMILIES = {
    "norm": norms(),
    "feed_forward": feed_forwards(),
    "rotary": rotations(),
    "cross_entropy": losses(True),
    "linear_cross_entropy": losses(False),
}
ANYWHERE = st.tuples(st.sampled_from(BACKENDS), st.sampled_from(DTYPES))


def check(name: str, examples: int, derandomize: bool) -> None:
    @settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
    @given(FAMILIES[name], ANYWHERE)
    def values(case: Op, where: tuple[str, torch.dtype]) -> None:
        contract.check_values(case, *where)
        contract.check_strides(case, where[0])

    values()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_few(name: str) -> None:
    check(name, 4, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_many(name: str) -> None:
    check(name, 100, derandomize=False)
