"""Attention weights of chosen rows and sums of columns against the fp64 definition, whose values are one-hot."""

import numpy as np
import pytest
import torch

import fastattn
from tests import contract, reference
from tests.compare import max_error
from tests.contract import Op
from tests.test_attention import CASES

NAMES = [
    "plain",
    "causal_more_queries",
    "gqa",
    "bias_shared_by_batch",
    "window",
    "alibi_per_batch",
    "mask_keys",
    "sinks",
]


def definition(query, key, **options):
    """The whole matrix: the output with the identity for values."""
    one_hot = torch.eye(key.shape[2], dtype=query.dtype).expand(*key.shape[:2], -1, -1)
    return reference.attention(query, key, one_hot, **options)[0]


@pytest.mark.parametrize("name", [*NAMES, "softcap", "negative_scale"])
def test_weights_and_column_sums_match_the_definition(name):
    case = CASES[name]
    tensors, options = case.inputs(torch.float32)
    (query, key, _), named = case.split(tensors)
    options |= named
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    truth = definition(query.double(), key.double(), **exact)
    assert max_error(fastattn.attention_weights(query, key, **options), truth) < 1e-5
    rows = [case.n - 1, 0, 5, 6, 7, 5]
    for given in (rows, torch.tensor(rows)):
        assert max_error(fastattn.attention_weights(query, key, rows=given, **options), truth[:, :, rows]) < 1e-5
    sums = fastattn.attention_column_sums(query, key, **options)
    assert sums.dtype == torch.float32
    assert max_error(sums, truth.sum(2)) < 1e-4


def op(rows=None, **options):
    """A case of the contract: grouped heads, a bias and sinks, all of which have gradients."""

    def ours(query, key, bias, sinks):
        return fastattn.attention_weights(query, key, rows=rows, bias=bias, sinks=sinks, **options)

    def truth(query, key, bias, sinks):
        whole = definition(query, key, bias=bias, sinks=sinks, **options)
        return whole if rows is None else whole[:, :, rows]

    shapes = {"query": (2, 4, 6, 8), "key": (2, 2, 9, 8), "bias": (1, 4, 6, 9), "sinks": (4,)}
    return Op(ours, truth, shapes, grows=("query", "key"))


OPS = {"all": op(window=(3, 1), softcap=2.0), "rows": op([4, 0, 1, 1], causal=True)}


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values(name, dtype):
    contract.check_values(OPS[name], "eager", dtype)


@pytest.mark.parametrize("size", [1 << 20, 1], ids=["one_block", "blocks"])
@pytest.mark.parametrize("name", OPS)
def test_contract(name, size, monkeypatch):
    monkeypatch.setattr("fastattn.eager.attention._BLOCK_SCORES", size)
    contract.check_strides(OPS[name], "eager")
    contract.check_determinism(OPS[name], "eager")
    contract.check_double_backward(OPS[name], "eager")
    contract.check_registration(OPS[name], "eager")
    contract.check_transforms(OPS[name], "eager")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", OPS)
def test_compiles(name, dynamic):
    contract.check_compiles(OPS[name], "eager", dynamic)


def test_block_masks_blocks_of_rows_and_gradients(monkeypatch):
    query, key = torch.randn(1, 2, 160, 16), torch.randn(1, 1, 160, 16)
    ids = torch.tensor([0] * 130 + [1] * 30)
    mask = fastattn.BlockMask.document(ids)
    truth = definition(query.double(), key.double(), mask=ids[:, None] == ids)
    monkeypatch.setattr("fastattn.eager.attention._BLOCK_SCORES", 1)
    assert max_error(fastattn.attention_column_sums(query, key, mask=mask), truth.sum(2)) < 1e-5
    rows = [3, 131]
    assert max_error(fastattn.attention_weights(query, key, rows=rows, mask=mask), truth[:, :, rows]) < 1e-5
    leaf, exact = query.clone().requires_grad_(), query.double().requires_grad_()
    fastattn.attention_weights(leaf, key, rows=rows, causal=True)[..., 2].sum().backward()
    definition(exact, key.double(), causal=True)[:, :, rows, 2].sum().backward()
    assert max_error(leaf.grad, exact.grad) < 1e-5


def test_empty_and_bad_arguments():
    query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 0, 8)
    assert fastattn.attention_weights(query, key).shape == (1, 2, 3, 0)
    assert fastattn.attention_weights(query, query, rows=[]).shape == (1, 2, 0, 3)
    assert fastattn.attention_column_sums(key, query).tolist() == [[[0.0] * 3] * 2]
    for row, error in ((3, ValueError), (-1, ValueError), (0.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="rows must be integers"):
            fastattn.attention_weights(query, query, rows=[row])
    for rows in (3, torch.tensor(3), slice(0, 2)):
        with pytest.raises(TypeError, match=r"rows must be a sequence of integers in \[0, 3\)"):
            fastattn.attention_weights(query, query, rows=rows)
    for rows in (range(2), (np.int64(0), 1), np.arange(2)):
        assert fastattn.attention_weights(query, query, rows=rows).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="same head_dim"):
        fastattn.attention_column_sums(query, torch.zeros(1, 2, 3, 4))
    assert "a block of rows at a time" in fastattn.explain(fastattn.attention_weights, query, query)
