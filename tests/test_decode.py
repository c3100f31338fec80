"""`attention_with_kv_cache` against the fp64 definition of each sequence: both backends, contiguous and paged caches."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import fastattn
from fastattn.kernels import decode
from fastattn.kernels.attention_config import decode_splits
from fastattn.kernels.launch import Target
from fastattn.ops.decode import append_op, attend_op
from tests import reference
from tests.compare import assert_close, max_error
from tests.contract import BACKENDS, DTYPES

SPARE = 3  # sequences that the cache has room for and the query does not have


@dataclass(frozen=True)
class Case:
    """One call. `lengths` are those before `new` keys are appended; an int means that all sequences have it."""

    lengths: tuple | int = (37, 70, 0, 64)
    queries: int = 1
    new: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    capacity: int = 96
    page_size: int | None = None
    leftpad: tuple | None = None
    packed: bool = False
    causal: bool = True
    window: tuple | None = None
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    @property
    def batch(self):
        return 4 if isinstance(self.lengths, int) else len(self.lengths)

    @property
    def counts(self):
        return [self.lengths] * self.batch if isinstance(self.lengths, int) else list(self.lengths)

    @property
    def firsts(self):
        return self.leftpad or [0] * self.batch

    def options(self):
        torch.manual_seed(1)
        slopes, sinks = torch.rand(self.batch, self.heads), torch.randn(self.heads)
        return {
            "causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale,
            "alibi_slopes": slopes if self.alibi else None, "sinks": sinks if self.sinks else None,
            "cache_leftpad": torch.tensor(self.leftpad, dtype=torch.int32) if self.leftpad else None,
        }  # fmt: skip

    def tensors(self, dtype):
        """query, and the keys and values of every sequence in full, the new ones last: (B, Hkv, capacity, D)."""
        torch.manual_seed(0)
        shape = (self.batch, self.kv_heads, self.capacity)
        value_dim = self.value_dim or self.dim
        if self.packed:
            query = torch.randn(self.batch, self.queries, self.heads, self.dim, dtype=dtype).transpose(1, 2)
        else:
            query = torch.randn(self.batch, self.heads, self.queries, self.dim, dtype=dtype)
        return query, torch.randn(*shape, self.dim, dtype=dtype), torch.randn(*shape, value_dim, dtype=dtype)

    def caches(self, full):
        """(cache, block_table or None) of (B, Hkv, capacity, D), holding each sequence's first rows and NaN behind."""
        held = full.clone()
        for sequence, count, empty in zip(held, self.counts, self.firsts):
            sequence[:, count:] = torch.nan
            sequence[:, :empty] = torch.nan
        if self.page_size is None:
            spare = full.new_full((SPARE, *full.shape[1:]), torch.nan)
            return torch.cat([held, spare]), None
        pages = self.capacity // self.page_size
        table = torch.randperm(self.batch * pages, generator=torch.Generator().manual_seed(2)).view(self.batch, pages)
        cache = full.new_empty(self.batch * pages, self.page_size, self.kv_heads, full.shape[3]).transpose(1, 2)
        for sequence, row in zip(held, table):
            cache[row] = sequence.unflatten(1, (pages, self.page_size)).transpose(0, 1)
        return cache, table.int()

    def fresh(self, full):
        """The new rows of every sequence, (B, Hkv, new, D)."""
        return torch.stack([s[:, n : n + self.new] for s, n in zip(full, self.counts)])

    def definition(self, query, keys, values):
        outs, lses = [], []
        options = self.options()
        slopes, _ = options.pop("alibi_slopes"), options.pop("cache_leftpad")
        for i, (first, count) in enumerate(zip(self.firsts, self.counts)):
            q, k, v = (x[i : i + 1] for x in (query, keys, values))
            n = count + self.new
            out, lse = reference.attention(
                q,
                k[:, :, first:n],
                v[:, :, first:n],
                **options,
                alibi_slopes=None if slopes is None else slopes[i : i + 1],
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


CASES = {
    "one_token": Case(),
    "all_of_one_length": Case(lengths=45),
    "first_token": Case(lengths=0),
    "last_row_of_the_cache": Case(lengths=(95, 0, 31, 32)),
    "one_long_sequence": Case(lengths=(2000,), capacity=2048, heads=8, kv_heads=1, window=(1500, 0)),
    "several_tokens": Case(queries=5, new=5, packed=True),
    "several_tokens_not_causal": Case(queries=3, new=3, causal=False),
    "more_rows_than_a_tile": Case(queries=20, new=20, heads=6, kv_heads=2, lengths=(0, 41)),
    "more_queries_than_keys": Case(queries=7, new=2, lengths=(1, 40)),
    "nothing_to_append": Case(new=0, lengths=(37, 70, 5, 96)),
    "empty_cache": Case(new=0, lengths=(0, 3)),
    "odd_heads": Case(heads=6, kv_heads=2, dim=24, value_dim=40),
    "wide_heads": Case(dim=80, value_dim=200, lengths=(11, 33)),
    "window": Case(window=(20, 0), queries=2, new=2),
    "window_to_both_sides": Case(window=(9, 1), causal=False, queries=4, new=4),
    "alibi": Case(alibi=True, queries=2, new=2),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True, new=0, lengths=(0, 90)),
    "negative_scale": Case(scale=-0.5),
    "paged": Case(page_size=16),
    "paged_odd": Case(page_size=12, queries=3, new=3, lengths=(11, 70, 0, 93)),
    "paged_one_length": Case(page_size=32, lengths=50),
    "leftpad": Case(leftpad=(3, 0, 0, 64)),
    "leftpad_of_all": Case(leftpad=(7, 7, 7, 7), lengths=45, queries=4, new=4),
    "leftpad_paged": Case(leftpad=(9, 64, 0, 5), page_size=8, queries=3, new=3),
    "leftpad_everything": Case(
        queries=3, new=3, window=(40, None), alibi=True, softcap=3.0, sinks=True, scale=0.3, page_size=8, packed=True, dim=33,
        lengths=(5, 93, 0, 60), leftpad=(5, 30, 0, 17),
    ),
    "everything": Case(
        queries=3, new=3, window=(40, None), alibi=True, softcap=3.0, sinks=True, scale=0.3, page_size=8, packed=True, dim=33,
        lengths=(5, 93, 0, 60),
    ),
}  # fmt: skip


def ours(case, query, keys, values, lengths=None):
    """(out, lse), and the caches after the call."""
    (key_cache, table), (value_cache, _) = case.caches(keys), case.caches(values)
    fresh = {"key": case.fresh(keys), "value": case.fresh(values)} if case.new else {}
    if lengths is None:
        lengths = case.lengths if isinstance(case.lengths, int) else torch.tensor(case.lengths, dtype=torch.int32)
    result = fastattn.attention_with_kv_cache(
        query, key_cache, value_cache, lengths, **fresh, block_table=table, **case.options(), return_lse=True
    )
    return *result, key_cache, value_cache


@pytest.fixture(params=["eager", "triton", "triton in 3 splits"])
def way(request, monkeypatch):
    """A backend; the third way has splits whatever the shape, some of them without a key."""
    if "splits" in request.param:
        monkeypatch.setattr(decode, "decode_splits", lambda *arguments: 3)
    return request.param.partition(" ")[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), *((n, d) for n in ("several_tokens", "everything", "leftpad_everything") for d in DTYPES[1:])],
    ids=str,
)  # fmt: skip
def test_matches_the_definition(name, dtype, way):
    case = CASES[name]
    tensors = case.tensors(dtype)
    with fastattn.backend.use(way):
        out, lse, *_ = ours(case, *tensors)
    truth, plain = case.definition(*(t.double() for t in tensors)), case.definition(*tensors)
    assert_close("out", out, truth[0], plain[0])
    assert_close("lse", lse, truth[1], plain[1])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["one_token", "all_of_one_length", "several_tokens", "paged_odd"])
def test_appends_in_place_and_nothing_else(name, backend):
    case = CASES[name]
    query, keys, values = case.tensors(torch.float32)
    with fastattn.backend.use(backend):
        caches = ours(case, query, keys, values)[2:]
    after = Case(**{**vars(case), "lengths": tuple(n + case.new for n in case.counts)})
    for cache, full in zip(caches, (keys, values)):
        assert torch.equal(cache.nan_to_num(99.0), after.caches(full)[0].nan_to_num(99.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_any_kind_mean_the_same(backend):
    case = CASES["all_of_one_length"]
    tensors = case.tensors(torch.float32)
    kinds = [45, torch.full((4,), 45, dtype=torch.int32), torch.full((4,), 45)]
    with fastattn.backend.use(backend):
        outs = [ours(case, *tensors, lengths)[0] for lengths in kinds]
    assert max_error(outs[0], outs[1]) < 1e-6
    assert torch.equal(outs[1], outs[2])


FREQUENCIES = 10_000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)  # 12 of 16 numbers are turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "name", ["one_token", "all_of_one_length", "fewer_new_keys", "paged_odd", "leftpad", "leftpad_of_all"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotary_turns_queries_and_new_keys_by_their_positions(name, interleaved, backend):
    case = Case(queries=3, new=2, lengths=(5, 40)) if name == "fewer_new_keys" else CASES[name]
    query, keys, values = case.tensors(torch.float32)
    first = torch.tensor(case.firsts)[:, None]
    last = torch.tensor(case.counts)[:, None] + case.new - first
    turns = {"inverse_frequencies": FREQUENCIES, "interleaved": interleaved}
    turned_query, _ = reference.rotary(
        query.double(), query.double(), positions=last - case.queries + torch.arange(case.queries), **turns
    )
    _, turned = reference.rotary(
        keys.double(), keys.double(), positions=(torch.arange(case.capacity) - first).clamp(min=0), **turns
    )
    truth, _ = case.definition(turned_query, turned, values.double())
    (key_cache, table), (value_cache, _) = case.caches(turned.float()), case.caches(values)
    cos, sin = fastattn.rotary_tables(12, case.capacity)
    lengths = case.lengths if isinstance(case.lengths, int) else torch.tensor(case.lengths)
    with fastattn.backend.use(backend):
        out = fastattn.attention_with_kv_cache(
            query, key_cache, value_cache, lengths, key=case.fresh(keys), value=case.fresh(values), block_table=table,
            rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, cache_leftpad=case.options()["cache_leftpad"],
        )  # fmt: skip
    assert max_error(out, truth) < 1e-5


@pytest.mark.parametrize(
    ("programs", "blocks", "expected"),
    [(0, 10, 1), (106, 1000, 1), (132, 1000, 1), (1, 1, 1), (1, 4, 4), (1, 1000, 109), (8, 1000, 15), (70, 1000, 5)],
)
def test_number_of_splits(programs, blocks, expected):
    assert decode_splits(Target("cuda", 90, 132), programs, blocks) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_one_graph(backend):
    case = CASES["several_tokens"]
    query, keys, values = case.tensors(torch.float32)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    fresh = case.fresh(keys), case.fresh(values)
    with fastattn.backend.use(backend):
        caches = case.caches(keys)[0].nan_to_num(), case.caches(values)[0].nan_to_num()
        torch.library.opcheck(append_op, (*caches, *fresh, lengths, 0, None))
        torch.library.opcheck(attend_op, (query, *caches, lengths, 5, None, None, None, None, 0.25, None, 0, 0.0))

        def step(query, key_cache, value_cache, lengths, key, value):
            out = fastattn.attention_with_kv_cache(query, key_cache, value_cache, lengths, key=key, value=value)
            return out + 1.0, key_cache.sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        expected_caches, got_caches = ([c.clone() for c in caches] for _ in range(2))
        expected = step(query, *expected_caches, lengths, *fresh)
        got = compiled(query, *got_caches, lengths, *fresh)
    assert all(torch.equal(a, b) for a, b in zip((*got, *got_caches), (*expected, *expected_caches)))


X, KEYS = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 6, 8)
NEW = {"key": torch.zeros(2, 2, 1, 8), "value": torch.zeros(2, 2, 1, 8)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": X[0]}, ValueError, r"query must have 4 dimensions"),
        ({"query": X.half()}, TypeError, "must have one dtype, got float16, float32, float32"),
        ({"query": X[:, :3]}, ValueError, "multiple of the cache's heads"),
        ({"value_cache": KEYS[:, :, :5]}, ValueError, "do not fit together"),
        ({"key_cache": KEYS[:1], "value_cache": KEYS[:1]}, ValueError, "room for 1 sequences, but query has 2"),
        ({"key_cache": KEYS.mT.contiguous().mT}, ValueError, "key_cache must be contiguous in its last dimension"),
        ({"cache_seqlens": 7}, ValueError, r"fit into the cache \(6 fit\), got 7"),
        ({"cache_seqlens": torch.tensor([6, 2]), **NEW}, ValueError, r"\(6 fit and 1 are new\), got tensor\(\[6, 2\]\)"),
        ({"cache_seqlens": torch.tensor([-1, 2])}, ValueError, "at least 0"),
        ({"cache_seqlens": torch.tensor([1])}, ValueError, r"cache_seqlens must have shape \(2,\)"),
        ({"cache_seqlens": 1.5}, TypeError, "cache_seqlens must be an integer, got float"),
        ({"key": NEW["key"]}, ValueError, "given together, but value is None"),
        ({**NEW, "value": NEW["value"][:, :1]}, ValueError, r"value must have shape \(2, 2, 1, 8\)"),
        ({"block_table": torch.zeros(2, 1)}, TypeError, "block_table has dtype float32; allowed: int32"),
        ({"block_table": torch.full((2, 1), 2, dtype=torch.int32)}, ValueError, r"page numbers in \[0, 2\), got 2"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, ValueError, "one row for each of the 2 sequences"),
        ({"cache_leftpad": torch.tensor([0.0, 1.0])}, TypeError, "cache_leftpad has dtype float32; allowed: int32"),
        ({"cache_leftpad": torch.tensor([1])}, ValueError, r"cache_leftpad must have shape \(2,\)"),
        ({"cache_leftpad": torch.tensor([0, 3])}, ValueError, r"at most cache_seqlens, 2, got tensor\(\[0, 3\]\)"),
        ({"cache_leftpad": torch.tensor([0, -1])}, ValueError, "cache_leftpad must be at least 0"),
        ({"cache_leftpad": 1}, TypeError, "cache_leftpad must be a torch.Tensor, got int"),
        ({"rotary_cos": torch.zeros(6, 4)}, ValueError, "given together, but rotary_sin is None"),
        ({"softcap": -1.0}, ValueError, "softcap must be None or > 0"),
        ({"scale": "1", **NEW}, TypeError, "scale must be a real number, got str"),
        ({"scale": torch.ones(()), **NEW}, TypeError, "scale must be a real number, got Tensor"),
        ({"scale": torch.inf, **NEW}, ValueError, "scale must be None or finite"),
        ({"softcap": "1", **NEW}, TypeError, "softcap must be a real number, got str"),
        ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes must be a torch.Tensor, got list"),
        ({"block_table": [[0], [1]]}, TypeError, "block_table must be a torch.Tensor, got list"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\)"),
        ({"query": X.clone().requires_grad_()}, ValueError, "query requires a gradient, and attention_with_kv_cache has none"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(change, error, message):
    arguments = {"query": X, "key_cache": KEYS, "value_cache": KEYS, "cache_seqlens": 2, **change}
    version = KEYS._version
    with pytest.raises(error, match=message):
        fastattn.attention_with_kv_cache(**arguments)
    assert not KEYS.any()
    assert KEYS._version == version


def test_a_numpy_integer_is_a_length():
    with torch.no_grad():
        first, second = (fastattn.attention_with_kv_cache(X, KEYS, KEYS, n) for n in (2, np.int64(2)))
    assert torch.equal(first, second)


def test_explain_names_the_splits():
    arguments = (torch.zeros(1, 8, 1, 64), *torch.zeros(2, 1, 2, 4096, 64), 7)
    with fastattn.backend.use("triton"):
        assert "in 2 splits on 2 programs each" in fastattn.explain(fastattn.attention_with_kv_cache, *arguments)
    assert "views of the cache" in fastattn.explain(fastattn.attention_with_kv_cache, *arguments)


@pytest.mark.parametrize("heads", [2, 6], ids=["heads", "grouped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_short_way_of_one_token_on_a_cpu(heads, dtype, monkeypatch):
    """Against the fp64 definition, appended in place, and without the custom op."""

    def long_way(*arguments):
        raise AssertionError("the custom op was called")

    monkeypatch.setattr("fastattn.ops.decode.call", long_way)
    case = Case(lengths=45, heads=heads)
    query, keys, values = case.tensors(dtype)
    caches = [torch.full((6, *x.shape[1:]), torch.nan, dtype=dtype) for x in (keys, values)]
    for cache, full in zip(caches, (keys, values)):
        cache[:4, :, :45] = full[:, :, :45]
    new = [x[:, :, 45:46] for x in (keys, values)]
    got = fastattn.attention_with_kv_cache(query, *caches, 45, key=new[0], value=new[1])
    seen = [x[:, :, :46] for x in (keys, values)]
    for cache, full in zip(caches, seen):
        assert torch.equal(cache[:4, :, :46], full)
        assert cache[:4, :, 46:].isnan().all()
        assert cache[4:].isnan().all()
    truth, plain = (reference.attention(*(x.to(d) for x in (query, *seen)))[0] for d in (torch.float64, dtype))
    assert_close("out", got, truth, plain)
