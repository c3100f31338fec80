"""Autocast on a CPU: what an op computes is what it computes of inputs cast before. Nothing inside is cast once more."""

from functools import partial

import pytest
import torch

import fastattn

ROWS, HEADS, COLUMNS = 24, (1, 2, 24, 16), (24, 32)
OFFSETS = torch.tensor([0, 10, 24], dtype=torch.int32)
TARGETS = torch.arange(ROWS)


def varlen(q, k, v, **options):
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return fastattn.varlen_attention(q, k, v, OFFSETS, OFFSETS, 14, 14, **options)


def over_a_cache(q, k, v):
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return fastattn.attention_with_kv_cache(q.to(dtype), k.to(dtype), v.to(dtype), 20, softcap=3.0)


QKV = [HEADS] * 3
CASES = {
    "attention": (partial(fastattn.attention, causal=True), QKV),
    "attention softcap": (partial(fastattn.attention, softcap=3.0), QKV),
    "attention dropout": (partial(fastattn.attention, dropout_p=0.3), QKV),
    "attention bias": (partial(fastattn.attention, softcap=3.0, bias=torch.randn(24, 24)), QKV),
    "varlen": (partial(varlen, softcap=3.0), QKV),
    "decode": (over_a_cache, QKV),
    "weights": (partial(fastattn.attention_weights, rows=[3, 5]), QKV[:2]),
    "column sums": (fastattn.attention_column_sums, QKV[:2]),
    "linear": (partial(fastattn.linear, activation="gelu"), [COLUMNS, (40, 32), (40,)]),
    "feed-forward": (partial(fastattn.feed_forward, activation="silu"), [COLUMNS, (40, 32), (40,), (8, 40), (8,)]),
    "linear cross entropy": (partial(fastattn.linear_cross_entropy, target=TARGETS), [COLUMNS, (40, 32)]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_cast_but_the_inputs(name, dtype):
    function, shapes = CASES[name]
    generator = torch.manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    # (gradients of the last are fp32 here)
    differentiable = name not in ("decode", "column sums", "linear cross entropy")

    def run(tensors, enabled):
        leaves = [x.detach().requires_grad_(differentiable) for x in tensors]
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = function(*leaves)
            out = out[0] if isinstance(out, tuple) else out
            if not differentiable:
                return [out]
            grads = torch.autograd.grad(out.float().square().sum(), leaves)  # (inside, as some people do)
        return [out, *(grad.to(dtype) for grad in grads)]

    for got, expected in zip(run(inputs, True), run([x.to(dtype) for x in inputs], False)):
        assert torch.equal(got, expected)


def test_transforms_cast_no_more_either():
    """Their way is the op's plain definition."""
    q, k, v = (torch.randn(HEADS, generator=torch.manual_seed(i)) for i in range(3))
    attention = torch.func.vmap(partial(fastattn.attention, softcap=3.0))
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(q[None], k[None], v[None])
    assert torch.equal(got, attention(*(x[None].bfloat16() for x in (q, k, v))))
