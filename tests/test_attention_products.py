"""Attention's backward by matrix products, which CPUs with tiles for 16-bit numbers take: here, on any CPU."""

import pytest
import torch

from fastattn.eager import attention_products
from tests import reference
from tests.compare import assert_close

CASES = {
    # heads, kv_heads, rows, columns, dim, causal, keys hidden
    "plain": (2, 2, 40, 40, 16, False, False),
    "causal": (3, 3, 33, 33, 24, True, False),
    "causal_in_halves": (2, 1, 131, 131, 8, True, False),
    "causal_more_keys": (2, 2, 33, 70, 8, True, False),  # from the top left: row i sees the keys up to i
    "causal_more_queries": (2, 1, 160, 70, 8, True, False),
    "one_row": (2, 2, 1, 1, 8, True, False),
    "grouped_and_causal": (6, 2, 20, 20, 16, True, False),
    "padded_keys": (2, 2, 30, 50, 16, False, True),
    "padded_keys_grouped": (4, 1, 30, 30, 16, False, True),
}


@pytest.mark.parametrize("scores", [1 << 20, 1500], ids=["together", "head_by_head"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, scores, monkeypatch):
    monkeypatch.setattr(attention_products, "_SCORES", scores)
    heads, kv_heads, rows, columns, dim, causal, padded = CASES[name]
    generator = torch.manual_seed(0)

    def random(heads, length):  # a row's heads lie together, as projections leave them
        return torch.randn(3, length, heads, dim, generator=generator).bfloat16().transpose(1, 2)

    query, key, value, grad = (
        random(heads, rows),
        random(kv_heads, columns),
        random(kv_heads, columns),
        random(heads, rows),
    )
    mask = torch.ones(3, 1, 1, columns, dtype=torch.bool)
    if padded:
        mask[0, ..., columns // 2 :], mask[1] = False, False  # the second sample sees nothing

    if causal:
        mask = mask & torch.ones(rows, columns, dtype=torch.bool).tril()

    def run(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        out, lse = reference.attention(*leaves, mask=mask, scale=0.3)
        return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, grad.to(dtype))

    (out, lse, truth), (_, _, plain) = run(torch.float64), run(torch.bfloat16)
    lse = lse.float().masked_fill(lse.isinf(), 0.0)
    key_bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if padded else None
    got = attention_products.backward(grad, query, key, value, out.bfloat16(), lse, causal, 0.3, key_bias)
    for which, x, y, z, like in zip(("dq", "dk", "dv"), got, truth, plain, (query, key, value)):
        assert x.dtype == torch.bfloat16
        assert x.shape == like.shape
        assert_close(which, x, y, z)


def test_where_it_is_used(monkeypatch):
    monkeypatch.setattr(attention_products, "has_tiles", lambda: True)

    def fits(heads=2, kv_heads=2, length=128, dim=128, value_dim=128, dtype=torch.bfloat16):
        q, k, v = (
            torch.empty(1, h, length, d, dtype=dtype)
            for h, d in zip((heads, kv_heads, kv_heads), (dim, dim, value_dim))
        )
        return attention_products.fits(q, k, v)

    assert fits()
    assert not fits(dtype=torch.float32)
    assert not fits(value_dim=64)
    assert not fits(length=129)
    assert not fits(length=256, dim=32, value_dim=32, heads=64, kv_heads=1)  # memory stays linear in the length
