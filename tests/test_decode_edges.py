"""`attention_with_kv_cache` at its edges: odd strides, unused pages, no sequences, rows without a position, autograd."""

import pytest
import torch

import fastattn
from tests.contract import BACKENDS
from tests.test_decode import CASES, NEW, Case, X, ours


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_need_not_be_contiguous(backend):
    one, case = CASES["all_of_one_length"], CASES["one_token"]
    expanded = torch.tensor([45], dtype=torch.int32).expand(4)
    strided = torch.tensor([[n, 99] for n in case.lengths], dtype=torch.int32)[:, 0]
    with fastattn.backend.use(backend):
        for each, lengths in ((one, expanded), (case, strided)):
            tensors = each.tensors(torch.float32)
            got, expected = (ours(each, *tensors, given) for given in (lengths, lengths.contiguous()))
            assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(got, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_entries_of_a_block_table_may_be_anything(backend):
    case = Case(page_size=8, lengths=(3, 16, 0, 95))
    tensors = case.tensors(torch.float32)
    (key_cache, table), (value_cache, _) = (case.caches(x) for x in tensors[1:])
    fresh = {"key": case.fresh(tensors[1]), "value": case.fresh(tensors[2])}
    lengths, garbage = torch.tensor(case.lengths, dtype=torch.int32), table.clone()
    for row, count in zip(garbage, case.counts):
        unused = row[-(-(count + case.new) // case.page_size) :]
        unused.copy_(torch.tensor([-1, 2**30]).repeat(6)[: len(unused)])
    with fastattn.backend.use(backend):
        got, expected = (
            fastattn.attention_with_kv_cache(
                tensors[0], key_cache.clone(), value_cache.clone(), lengths, block_table=given, **fresh
            )
            for given in (garbage, table)
        )
        assert torch.equal(got, expected)
        for wrong, page in ((-1, 0), (48, 2)):
            used = garbage.clone()
            used[1, page] = wrong
            with pytest.raises(ValueError, match=rf"block_table must hold page numbers in \[0, 48\), got {wrong}"):
                fastattn.attention_with_kv_cache(tensors[0], key_cache, value_cache, lengths, block_table=used, **fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_in_front_of_the_first_key_may_be_anything(backend):
    """As those that a sliding window has passed and another sequence owns now."""
    case = Case(page_size=8, lengths=(30, 16, 9, 95), leftpad=(8, 15, 0, 90))
    query, keys, values = case.tensors(torch.float32)
    (key_cache, table), (value_cache, _) = case.caches(keys), case.caches(values)
    given = table.clone()
    for row, first in zip(given, case.firsts):
        row[: first // case.page_size] = -1
    lengths, leftpad = (torch.tensor(x, dtype=torch.int32) for x in (case.lengths, case.leftpad))
    with fastattn.backend.use(backend):
        got, expected = (
            fastattn.attention_with_kv_cache(
                query, key_cache.clone(), value_cache.clone(), lengths, key=case.fresh(keys), value=case.fresh(values),
                block_table=pages, cache_leftpad=leftpad,
            )
            for pages in (given, table)
        )  # fmt: skip
        assert torch.equal(got, expected)
        given[1, 1] = -1
        with pytest.raises(ValueError, match=r"block_table must hold page numbers in \[0, 48\), got -1"):
            fastattn.attention_with_kv_cache(
                query, key_cache, value_cache, lengths, block_table=given, cache_leftpad=leftpad
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_that_slide_by_one_number(dtype):
    """`x.unfold(-1, 16, 1)`: PyTorch's fused kernel, called at once for one new token, would give other numbers."""
    torch.manual_seed(0)
    query = torch.randn(64, dtype=dtype).as_strided((2, 4, 1, 16), (20, 1, 1, 1))
    caches, new = torch.randn(2, 2, 4, 8, 16, dtype=dtype), torch.randn(2, 4, 1, 16, dtype=dtype)
    got, expected = (
        fastattn.attention_with_kv_cache(q, *caches.clone(), 5, key=new, value=new) for q in (query, query.contiguous())
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences_give_no_results(backend):
    caches = torch.zeros(2, 1, 2, 8, 8)
    with fastattn.backend.use(backend):
        for lengths in (torch.zeros(0, dtype=torch.int32), 3):
            for heads in (2, 6):
                out, lse = fastattn.attention_with_kv_cache(
                    torch.zeros(0, heads, 1, 8), *caches, lengths, return_lse=True
                )
                assert out.shape == (0, heads, 1, 8)
                assert lse.shape == (0, heads, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paged", [False, True])
def test_autograd_notices_what_is_appended(paged, backend):
    keys, values = torch.randn(2, 2, 2, 8, 8).unbind()
    table = torch.tensor([[1], [0]], dtype=torch.int32) if paged else None
    weight = torch.ones(8, requires_grad=True)
    new, lengths = torch.randn(2, 2, 1, 8), torch.tensor([2, 5])
    with fastattn.backend.use(backend):
        for cache in (keys, values):
            product = (cache * weight).sum()
            with torch.no_grad():
                fastattn.attention_with_kv_cache(new, keys, values, lengths, key=new, value=new, block_table=table)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()
        with torch.inference_mode():
            caches = keys.clone(), values.clone()  # which have no version
            fastattn.attention_with_kv_cache(new, *caches, lengths, key=new, value=new, block_table=table)
    assert torch.equal(caches[0], keys)


@pytest.mark.parametrize("lengths", [5, torch.tensor([5, 3])], ids=["int", "tensor"])
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "key", "value", "sinks", "rotary_cos"])
def test_what_would_lose_a_tangent_or_a_gradient_is_refused(name, lengths):
    cos, sin = fastattn.rotary_tables(8, 8)
    given = {
        "query": X, "key_cache": torch.zeros(2, 2, 8, 8), "value_cache": torch.zeros(2, 2, 8, 8), **NEW,
        "sinks": torch.zeros(4), "rotary_cos": cos, "rotary_sin": sin,
    }  # fmt: skip
    if name not in ("sinks", "rotary_cos"):  # the short way, where there is one
        given = {key: value for key, value in given.items() if key[:6] not in ("sinks", "rotary")}
    x = given[name]

    def call(x):
        return fastattn.attention_with_kv_cache(**{**given, name: x}, cache_seqlens=lengths)

    with pytest.raises(ValueError, match=f"{name} has a forward-mode tangent"):
        torch.func.jvp(call, (x,), (x,))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        call(x)  # nothing is asked for
        with pytest.raises(ValueError, match=f"{name} has a forward-mode tangent"):
            call(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        torch.func.grad(lambda x: call(x).sum())(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [0, 2, torch.tensor([0, 2, 1, 5])], ids=str)
@pytest.mark.parametrize("new", [0, 2])
def test_rotary_of_rows_in_front_of_the_first_key(new, lengths, backend):
    """They stand nowhere and see nothing; the others are turned as if they had come alone."""
    case = Case(queries=5, new=new, lengths=lengths if isinstance(lengths, int) else tuple(lengths.tolist()))
    query, keys, values = case.tensors(torch.float32)
    fresh = {"key": case.fresh(keys), "value": case.fresh(values)} if new else {}
    cos, sin = fastattn.rotary_tables(16, case.capacity)
    rules = {**fresh, "rotary_cos": cos, "rotary_sin": sin}
    with fastattn.backend.use(backend):
        out = fastattn.attention_with_kv_cache(query, keys.clone(), values.clone(), lengths, **rules)
        for i, count in enumerate(case.counts):
            seen = min(count + new, 5)
            assert not out[i, :, : 5 - seen].any()
            one = {name: x if name.startswith("rotary") else x[i : i + 1] for name, x in rules.items()}
            alone = fastattn.attention_with_kv_cache(
                query[i : i + 1, :, 5 - seen :], keys[i : i + 1].clone(), values[i : i + 1].clone(), count, **one
            )
            assert torch.allclose(out[i : i + 1, :, 5 - seen :], alone, atol=1e-6)
        if new == 0:
            with pytest.raises(ValueError, match=r"offset.* must be in"):  # without causal they would see keys
                fastattn.attention_with_kv_cache(query, keys, values, lengths, causal=False, **rules)
