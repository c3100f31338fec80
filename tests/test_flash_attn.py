"""The flash-attn names: their layouts, defaults and meaning."""

import inspect

import pytest
import torch

import fastattn
from fastattn.integrations.bert_padding import pad_input, unpad_input
from fastattn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from tests import reference
from tests.contract import BACKENDS

OPTIONS = {
    "default": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (4, -1), "softcap": 5.0}, {"window": (4, None), "softcap": 5.0}),
    "alibi": ({"alibi_slopes": torch.rand(4), "softmax_scale": 0.3}, {"alibi_slopes": None, "scale": 0.3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_means_the_same(name):
    theirs, plain = OPTIONS[name]
    plain = {**plain, **({"alibi_slopes": theirs["alibi_slopes"]} if "alibi_slopes" in theirs else {})}
    torch.manual_seed(0)
    qkv = torch.randn(2, 12, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    out, lse = reference.attention(*(t.transpose(1, 2).double() for t in (q, k, v)), **plain)
    got, got_lse, probabilities = flash_attn_func(q, k, v, **theirs, return_attn_probs=True)
    assert probabilities is None
    assert torch.allclose(got.double(), out.transpose(1, 2), atol=1e-6)
    assert torch.allclose(got_lse.double(), lse, atol=1e-5)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **theirs), got)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], **theirs), got)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    cu = torch.tensor([0, 12, 24], dtype=torch.int32)
    ragged = flash_attn_varlen_func(*packed, cu, cu, 12, 12, **theirs)
    assert torch.allclose(ragged.double(), out.transpose(1, 2).flatten(0, 1), atol=1e-6)
    together = qkv.flatten(0, 1)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(together, cu, 12, **theirs), ragged)
    assert torch.equal(flash_attn_varlen_kvpacked_func(packed[0], together[:, 1:], cu, cu, 12, 12, **theirs), ragged)


@pytest.mark.parametrize("where", ["batch", "chosen", "paged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_kv_cache_means_the_same(name, where):
    theirs, plain = OPTIONS[name]
    plain = {**plain, **({"alibi_slopes": theirs["alibi_slopes"]} if "alibi_slopes" in theirs else {})}
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    lengths, held = torch.tensor([5, 9], dtype=torch.int32), torch.randn(2, 2, 12, 2, 16)
    full = held.clone()
    for i, n in enumerate(lengths.tolist()):
        full[:, i, n : n + 3] = torch.stack([k[i], v[i]])
    options = dict(theirs)
    caches = [held[0].clone(), held[1].clone()]
    if where == "chosen":
        options["cache_batch_idx"] = torch.tensor([2, 0], dtype=torch.int32)
        caches = [torch.stack([c[1], torch.zeros_like(c[0]), c[0]]) for c in caches]
    elif where == "paged":
        options["block_table"] = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
        caches = [c.reshape(6, 4, 2, 16)[torch.tensor([1, 3, 5, 0, 4, 2])] for c in caches]
    out, lse = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **options, return_softmax_lse=True)
    for i, n in enumerate((lengths + 3).tolist()):
        x = [t[i : i + 1].transpose(1, 2).double() for t in (q, *full[:, :, :n])]
        expected, expected_lse = reference.attention(*x, **plain)
        assert torch.allclose(out[i : i + 1].double(), expected.transpose(1, 2), atol=1e-6)
        assert torch.allclose(lse[i : i + 1].double(), expected_lse, atol=1e-5)
    if where == "batch":
        assert torch.equal(torch.stack(caches), full)
        whole = [flash_attn_with_kvcache(q, *caches, cache_seqlens=n, **theirs) for n in (12, None)]
        assert torch.equal(*whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["batch", "paged"])
def test_rows_in_front_of_the_first_key_are_not_read(where, backend):
    """`cache_leftpad`: the keys and their positions begin behind these rows; new keys come behind `cache_seqlens` rows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    lengths, first = torch.tensor([5, 9], dtype=torch.int32), torch.tensor([2, 6], dtype=torch.int32)
    cos, sin = fastattn.rotary_tables(16, 12)
    plain = torch.randn(2, 2, 12, 2, 16)
    padded = [torch.full_like(x, torch.nan) for x in plain]
    for i, (n, pad) in enumerate(zip(lengths.tolist(), first.tolist())):
        for cache, held in zip(padded, plain):
            cache[i, pad:n] = held[i, : n - pad]
    options = {"block_table": torch.arange(6, dtype=torch.int32).view(2, 3)} if where == "paged" else {}
    padded = [c.reshape(6, 4, 2, 16) for c in padded] if where == "paged" else padded
    with fastattn.backend.use(backend):
        expected = flash_attn_with_kvcache(q, *plain, k, v, cos, sin, lengths - first, causal=True)
        got = flash_attn_with_kvcache(
            q, *padded, k, v, cos, sin, lengths, cache_leftpad=first, causal=True, **options
        )  # fmt: skip
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_queries_over_pages(backend):
    """Values and gradients are those of the same rows, packed; pages that no sequence owns get a gradient of zero."""
    torch.manual_seed(0)
    lengths, table = [7, 0, 4], torch.tensor([[3, 5, -9], [77, 77, 77], [1, 99, 99]], dtype=torch.int32)
    cu_k, cu_q = torch.tensor([0, 7, 7, 11], dtype=torch.int32), torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    q = torch.randn(6, 4, 16, requires_grad=True)
    k, v = (torch.randn(6, 4, 2, 16, requires_grad=True) for _ in range(2))
    packed = [torch.cat([x[3], x[5][:3], x[1]]) for x in (k, v)]
    with fastattn.backend.use(backend):
        expected = flash_attn_varlen_func(q, *packed, cu_q, cu_k, 3, max(lengths), causal=True)
        got = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, max(lengths), causal=True, block_table=table)
        weights = torch.randn_like(got)
        grads, expected_grads = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (got, expected))
    assert torch.equal(got, expected)
    for grad, other in zip(grads, expected_grads):
        assert torch.allclose(grad, other, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("unbounded", [(-1, -1), [-1, -1]], ids=["tuple", "list"])
def test_kv_cache_turns_by_position(unbounded, causal, interleaved):
    """Where attention is neither causal nor local, flash-attn takes all queries to stand at the first new position."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    key_cache, value_cache = torch.randn(2, 2, 12, 2, 16).unbind()
    lengths, (cos, sin) = torch.tensor([5, 9], dtype=torch.int32), fastattn.rotary_tables(16, 12)
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    positions = lengths[:, None] + torch.arange(3)
    turn = {"inverse_frequencies": frequencies, "interleaved": interleaved}
    new = reference.rotary(*[k.transpose(1, 2).double()] * 2, positions=positions, **turn)[0]
    standing = positions if causal else lengths[:, None].expand(2, 3)
    query = reference.rotary(*[q.transpose(1, 2).double()] * 2, positions=standing, **turn)[0]
    out = flash_attn_with_kvcache(
        q, key_cache, value_cache, k, v, cos, sin, lengths, causal=causal, window_size=unbounded,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    for i, n in enumerate(lengths.tolist()):
        keys = torch.cat([key_cache[i, :n].transpose(0, 1).double(), new[i]], 1)[None]
        values = torch.cat([value_cache[i, :n], v[i]]).transpose(0, 1)[None].double()
        expected, _ = reference.attention(query[i : i + 1], keys, values, causal=causal)
        assert torch.allclose(out[i : i + 1].double(), expected.transpose(1, 2), atol=1e-5)


def test_signatures_are_those_of_the_package():
    common = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
        "return_attn_probs",
    ]
    assert list(inspect.signature(flash_attn_func).parameters) == ["q", "k", "v", *common]
    assert list(inspect.signature(flash_attn_qkvpacked_func).parameters) == ["qkv", *common]
    packing = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    expected = ["q", "k", "v", *packing, *common, "block_table"]
    assert list(inspect.signature(flash_attn_varlen_func).parameters) == expected
    expected = ["qkv", "cu_seqlens", "max_seqlen", *common]
    assert list(inspect.signature(flash_attn_varlen_qkvpacked_func).parameters) == expected
    assert list(inspect.signature(flash_attn_varlen_kvpacked_func).parameters) == ["q", "kv", *packing, *common]
    cache = inspect.signature(flash_attn_with_kvcache).parameters
    assert list(cache) == [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
        "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits",
        "return_softmax_lse",
    ]  # fmt: skip
    assert (cache["causal"].default, cache["rotary_interleaved"].default) == (False, True)


def test_what_is_not_supported_is_refused():
    x, cu = torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    q, cache, table = torch.zeros(1, 1, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
    for pages, longest, table_given, message in (
        (x, 3, table, r"k must have 4 dimensions \(pages, page size, heads, head_dim\) with a block_table"),
        (cache, 3, table[0], "block_table must have 2 dimensions"),
        (
            cache,
            5,
            table,
            r"a row for each of the 1 sequences and pages for max_seqlen_k 5 rows, got \(1, 1\) pages of 4 rows",
        ),
        (cache, 3, table.expand(2, 1), "a row for each of the 1 sequences"),
        (cache, 3, table + 1, r"block_table must hold page numbers in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn_varlen_func(x, pages, pages, cu, cu, 3, longest, block_table=table_given)
    with pytest.raises(TypeError, match=r"cache_leftpad must be a torch\.Tensor, got list"):
        flash_attn_with_kvcache(q, cache, cache, cache_leftpad=[0])
    with pytest.raises(ValueError, match="rotary_cos and rotary_sin must be given together, and with k and v"):
        flash_attn_with_kvcache(q, cache, cache, rotary_cos=cache[0, 0], rotary_sin=cache[0, 0], cache_seqlens=1)
    with pytest.raises(ValueError, match="cache_seqlens must say where k and v are appended"):
        flash_attn_with_kvcache(q, cache, cache, q, q)
    with pytest.raises(ValueError, match=r"qkv must have shape \(batch, length, 3, heads, head_dim\), got \(3, 2, 8\)"):
        flash_attn_qkvpacked_func(x)
    with pytest.raises(ValueError, match=r"qkv must have shape \(length, 3, heads, head_dim\), got \(3, 2, 8\)"):
        flash_attn_varlen_qkvpacked_func(x, cu, 3)
    with pytest.raises(ValueError, match=r"kv must have shape \(length, 2, heads, head_dim\), got \(3, 2, 8\)"):
        flash_attn_varlen_kvpacked_func(x, x, cu, cu, 3, 3)
    for window, error in ((None, TypeError), (3, TypeError), ((1, 2, 3), ValueError)):
        with pytest.raises(error, match=r"window_size must be \(left, right\), -1 where unbounded, got "):
            flash_attn_func(q, q, q, window_size=window)
    with pytest.raises(TypeError, match=r"block_table must be a torch\.Tensor, got list"):
        flash_attn_with_kvcache(q, cache, cache, block_table=[[0]])
    for index in (1, -1):
        with pytest.raises(ValueError, match=rf"cache_batch_idx must be in \[0, 1\), the caches, got {index}"):
            flash_attn_with_kvcache(q, cache, cache, cache_batch_idx=torch.tensor([index], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"q must have 4 dimensions \(batch, length, heads, head_dim\)"):
        flash_attn_func(x, x, x)


def test_padded_batches_become_packed_and_back():
    """Attention over the packed tokens is that over the padded ones with their mask, with its gradients."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
    x = torch.randn(4, 5, 3, 2, 16, requires_grad=True)
    tokens, places, ends, longest, used = unpad_input(x, mask)
    assert (ends.tolist(), longest, used.tolist()) == ([0, 3, 8, 8, 10], 5, [3, 5, 0, 2])
    assert ends.dtype == used.dtype == torch.int32
    out = pad_input(flash_attn_varlen_qkvpacked_func(tokens, ends, longest), places, 4, 5)
    q, k, v = x.transpose(1, 3).unbind(2)
    expected = fastattn.attention(q, k, v, mask=mask.bool()[:, None, None, :]).transpose(1, 2) * mask[..., None, None]
    for ours, truth in zip(*((y, *torch.autograd.grad(y.sin().sum(), x)) for y in (out, expected))):
        torch.testing.assert_close(ours, truth)


def test_places_kept_for_later_tokens_are_in_the_sequence():
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(), torch.tensor([[0, 1, 0], [0, 0, 1]])
    tokens, places, ends, longest, used = unpad_input(torch.arange(6).view(2, 3), mask, unused)
    assert tokens.tolist() == places.tolist() == [0, 1, 3, 4, 5]
    assert (ends.tolist(), longest, used.tolist()) == ([0, 2, 5], 3, [1, 2])
    empty = unpad_input(torch.zeros(0, 3, 8), torch.zeros(0, 3))
    assert (empty[0].shape, empty[2].tolist(), empty[3]) == ((0, 8), [0], 0)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 3\)"):
        unpad_input(torch.zeros(2, 3, 8), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"indices must have shape \(5,\) \(one place for each token\), got \(2,\)"):
        pad_input(tokens, torch.tensor([0, 1]), 2, 3)
