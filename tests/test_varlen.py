"""`varlen_attention` against the fp64 definition of each sequence: both backends, every gradient, empty sequences."""

import numpy as np
import pytest
import torch

import fastattn
from fastattn.kernels import attention_backward
from fastattn.ops.varlen import varlen_op
from tests import reference
from tests.compare import assert_close, value_and_gradients
from tests.test_attention import BACKENDS
from tests.test_attention_calculus import double_gradients

LENGTHS_Q, LENGTHS_K, BEHIND = [5, 0, 37, 12], [9, 4, 37, 0], 3  # a sequence without queries, one without keys, a tail
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window_softcap": {"window": (6, 4), "softcap": 2.0},
    "everything": {
        "causal": True, "window": (20, None), "softcap": 3.0, "alibi_slopes": torch.rand(4, 4), "dropout_p": 0.3, "sinks": True,
    },
}  # fmt: skip


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(dtype, sinks):
    torch.manual_seed(0)
    rows_q, rows_k = sum(LENGTHS_Q) + BEHIND, sum(LENGTHS_K) + BEHIND
    shapes = [(rows_q, 4, 16), (rows_k, 2, 16), (rows_k, 2, 24)]
    return [torch.randn(s, dtype=dtype) for s in shapes] + ([torch.randn(4)] if sinks else [])


def ours(options):
    def function(q, k, v, sinks=None):
        torch.manual_seed(3)
        packing = (offsets(LENGTHS_Q), offsets(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
        return fastattn.varlen_attention(q, k, v, *packing, **{**options, "sinks": sinks}, return_lse=True)

    return function


def naive(options):
    options = {k: v for k, v in options.items() if k != "sinks"}
    p = options.pop("dropout_p", 0.0)
    slopes = options.pop("alibi_slopes", None)
    seed = int(torch.randint(torch.iinfo(torch.int64).max, (1,), generator=torch.manual_seed(3)))
    longest = (len(LENGTHS_Q), 4, max(LENGTHS_Q), max(LENGTHS_K))
    keep = reference.philox_keep(seed, longest, p).double() / (1 - p)

    def function(q, k, v, sinks=None):
        outs, lses = [], []
        for i, (a, b, c, d) in enumerate(
            zip(offsets(LENGTHS_Q), offsets(LENGTHS_Q)[1:], offsets(LENGTHS_K), offsets(LENGTHS_K)[1:])
        ):
            part = [x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d])]
            if a == b or c == d:
                outs.append(part[0].new_zeros(1, 4, b - a, 24))
                lses.append(
                    torch.full((1, 4, b - a), -torch.inf) if sinks is None else sinks[:, None].expand(1, 4, b - a)
                )
                continue
            out, lse = reference.attention(
                *part, **options, sinks=sinks, alibi_slopes=None if slopes is None else slopes[i : i + 1],
                dropout_factors=keep[i : i + 1, :, : b - a, : d - c] if p else None,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        tail = q.new_zeros(BEHIND, 4, 24), torch.full((4, BEHIND), -torch.inf)
        return torch.cat([*(o[0].transpose(0, 1) for o in outs), tail[0]]), torch.cat(
            [*(x[0] for x in lses), tail[1]], 1
        )

    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.float32) for n in CASES), ("everything", torch.bfloat16)])
def test_matches_the_definition(name, dtype, backend):
    options = CASES[name]
    tensors = inputs(dtype, "sinks" in options)
    dead = torch.isinf(naive(options)(*tensors)[1])
    grads = [torch.randn(tensors[0].shape[0], 4, 24).to(dtype), torch.randn(dead.shape).masked_fill(dead, 0.0)]
    with fastattn.backend.use(backend):
        got = value_and_gradients(ours(options), tensors, grads)
    truth = value_and_gradients(naive(options), [t.double() for t in tensors], grads)
    plain = value_and_gradients(naive(options), tensors, grads)
    eps = torch.finfo(torch.float32).eps
    for i, triple in enumerate(zip(*(outs + gradients for outs, gradients in (got, truth, plain)))):
        assert_close(f"result {i}", *triple, relative=8 * eps)  # |LSE| < 8 here, see test_attention.py
    out, dq, dk = got[0][0], got[1][0], got[1][1]
    assert not out[-BEHIND:].any()
    assert not dq[-BEHIND:].any()
    assert not dk[-BEHIND:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_need_not_be_contiguous(backend):
    q, k, v = (x.requires_grad_() for x in inputs(torch.float32, False))
    ends = [offsets(LENGTHS_Q), offsets(LENGTHS_K)]
    strided = [torch.stack([x, torch.full_like(x, 99)], 1)[:, 0] for x in ends]
    longest = np.int64(max(LENGTHS_Q)), np.int32(max(LENGTHS_K))

    def results(ends):
        out = fastattn.varlen_attention(q, k, v, *ends, *longest, causal=True)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    with fastattn.backend.use(backend):
        assert all(torch.equal(a, b) for a, b in zip(results(strided), results(ends)))


def test_double_backward_and_transforms():
    options = CASES["everything"]
    tensors = inputs(torch.float32, True)
    got, truth = (
        double_gradients(ours(options), tensors),
        double_gradients(naive(options), [t.double() for t in tensors]),
    )
    plain = double_gradients(naive(options), tensors)
    for i, triple in enumerate(zip(got, truth, plain)):
        assert_close(f"second gradient {i}", *triple, relative=8 * torch.finfo(torch.float32).eps)
    grad = torch.func.grad(lambda q: ours({"causal": True})(q, *tensors[1:3])[0].sin().sum())(tensors[0])
    expected = torch.autograd.functional.jacobian(
        lambda q: naive({"causal": True})(q, *(t.double() for t in tensors[1:3]))[0].sin().sum(), tensors[0].double()
    )
    assert torch.allclose(grad.double(), expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_one_graph(backend):
    q, k, v, sinks = (t.requires_grad_() for t in inputs(torch.float32, True))
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    views = [t.detach().transpose(0, 1)[None].requires_grad_() for t in (q, k, v)]
    with fastattn.backend.use(backend):
        rules = (None, sinks, None, cu_q, cu_k, 37, 37, 0.25, None, 0, 0.0, 0.0)
        if backend == "eager":
            torch.library.opcheck(varlen_op, (*views, *rules))

        def step(q, k, v):
            return fastattn.varlen_attention(q, k, v, cu_q, cu_k, 37, 37, causal=True).square().sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got, expected = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, step))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_one_long_sequence_does_not_cost_the_others_its_memory(monkeypatch):
    """What the backward keeps of each row grows with the rows that there are, not with sequences times the longest."""
    lengths, kept, launch = [1, 300, 1, 0, 1, 200, 1, 1, 1], [], attention_backward.launch

    def recorded(kernel, grid, *arguments, **options):
        kept.extend(x.numel() for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.float32)
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(attention_backward, "launch", recorded)
    x = torch.randn(sum(lengths), 2, 16).half()
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    def gradients(attend):
        leaves = [x.clone().requires_grad_() for _ in range(3)]
        return torch.autograd.grad(attend(*leaves).float().square().sum(), leaves)

    def packed(q, k, v):
        return fastattn.varlen_attention(q, k, v, cu, cu, max(lengths), max(lengths), causal=True)

    def apart(q, k, v):
        sequences = zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in (q, k, v)))
        return torch.cat([fastattn.attention(*qkv, causal=True) for qkv in sequences], 2)[0].transpose(0, 1)

    with fastattn.backend.use("triton"):
        got = gradients(packed)
        assert max(kept) <= 2 * 2 * (sum(lengths) + 128 * len(lengths))
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(apart)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longest", [2**31, 2**40])
def test_longest_sequences_beyond_32_bits_are_as_long_as_all_rows(longest, backend):
    q, k, v = inputs(torch.float32, False)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    with fastattn.backend.use(backend):
        got, expected = (fastattn.varlen_attention(q, k, v, cu_q, cu_k, n, n) for n in (longest, 37))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 3, 2, 8)}, ValueError, r"query must have 3 dimensions \(packed length"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, TypeError, "cu_seqlens_q has dtype int64; allowed: int32"),
        ({"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "packed length 3, got .0, 5."),
        ({"cu_seqlens_k": torch.tensor([0, 1, 3], dtype=torch.int32)}, ValueError, "same length, got 2 and 3"),
        ({"max_seqlen_k": 2}, ValueError, "max_seqlen_k is 2, but a sequence has 3 rows"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
        ({"alibi_slopes": torch.ones(2, device="meta")}, ValueError, "alibi_slopes is on meta but query is on cpu"),
    ],
    ids=["rank", "dtype", "offsets", "count", "too_short", "negative", "device"],
)
def test_bad_arguments_are_named(change, error, message):
    x, cu = torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    arguments = {
        "query": x,
        "key": x,
        "value": x,
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }
    with pytest.raises(error, match=message):
        fastattn.varlen_attention(**{**arguments, **change})
