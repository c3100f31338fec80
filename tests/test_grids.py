"""A grid's second and third axes end at 65,535 on a GPU, and nowhere in the interpreter: what grows lies along the first."""

import pytest
import torch

import fastattn
from fastattn.kernels import attention, attention_backward, decode, loss, normalization, normalization_backward

MODULES = attention, attention_backward, decode, loss, normalization, normalization_backward
MANY = 65_536


def a_bias_over(rows, columns):
    def call():
        query, key = torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, columns, 1)
        bias = torch.zeros(1, 1, rows if rows > 1 else 1, columns if columns > 1 else 1, requires_grad=True)
        fastattn.attention(query, key, key, bias=bias).sum().backward()

    return call


def norm(*shape):
    x, scale = torch.zeros(shape), torch.zeros(shape, requires_grad=True)
    fastattn.layer_norm(x, shape[-1], scale=scale).sum().backward()


def append():
    cache, new = torch.zeros(2, 1, 1, 16 * MANY, 1).unbind(), torch.zeros(1, 1, 16 * MANY, 1)
    with torch.no_grad():
        fastattn.attention_with_kv_cache(new[:, :, :1], *cache, 0, key=new, value=new)


CALLS = {
    "bias of many rows": a_bias_over(32 * MANY, 1),
    "bias of many keys": a_bias_over(1, 32 * MANY),
    "norm of many groups": lambda: norm(MANY, 4),
    "norm of many columns": lambda: norm(1, 128 * MANY),
    "many keys to append": append,
    "many losses": lambda: fastattn.cross_entropy(torch.zeros(MANY, 2, requires_grad=True), torch.zeros(MANY).long()).backward(),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_only_the_first_axis_grows(name, monkeypatch):
    grids = []
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    with fastattn.backend.use("triton"):
        CALLS[name]()
    assert max(grid[0] for grid in grids) >= MANY
    assert all(size < MANY for grid in grids for size in grid[1:])
