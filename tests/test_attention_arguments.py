"""What attention accepts and refuses: empty and degenerate inputs, strides, and errors raised before any launch."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import fastattn
from fastattn.eager import attention as eager_attention
from fastattn.score_rules import ScoreRules
from tests import reference
from tests.test_attention import BACKENDS


def qkv(batch=1, heads=2, kv_heads=2, n=8, nk=8, dim=16, value_dim=16, dtype=torch.float32):
    shapes = [(batch, heads, n, dim), (batch, kv_heads, nk, dim), (batch, kv_heads, nk, value_dim)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", [{"n": 0}, {"nk": 0}, {"batch": 0}, {"n": 0, "nk": 0}], ids=["queries", "keys", "batch", "both"]
)
def test_empty_inputs_give_empty_or_zero_results(sizes, backend):
    leaves = [x.requires_grad_() for x in qkv(**sizes)]
    with fastattn.backend.use(backend):
        out, lse = fastattn.attention(*leaves, causal=True, return_lse=True)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (*leaves[0].shape[:3], 16)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_query_heads_keys_have_zero_gradients(backend):
    q, k, v = (x.requires_grad_() for x in qkv(heads=0, kv_heads=1))
    bias, sinks = torch.zeros(8, 8, requires_grad=True), torch.zeros(0, requires_grad=True)
    with fastattn.backend.use(backend):
        out = fastattn.attention(q, k, v, bias=bias, sinks=sinks)
        grads = torch.autograd.grad(out.sum(), (q, k, v, bias, sinks))
    assert out.shape == (1, 0, 8, 16)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, (q, k, v, bias, sinks)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_score_is_no_row_that_sees_nothing(backend):
    """Its log-sum-exp is NaN, not -inf; in decoding, where other programs have the rest of the keys, too."""
    q, k, v = qkv(n=1, nk=600)
    k[0, 0, 300, 2] = torch.nan
    with fastattn.backend.use(backend):
        results = [
            fastattn.attention(q, k, v, return_lse=True),
            fastattn.attention_with_kv_cache(q, k, v, 600, return_lse=True),
        ]
    for out, lse in results:
        assert out[0, 0].isnan().all()
        assert lse[0, 0].isnan().all()
        assert out[0, 1].isfinite().all()
        assert lse[0, 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [1e6, 1e20, 3e38])
def test_a_softcap_far_above_the_scores_changes_nothing(softcap, dtype, backend):
    leaves = [x.requires_grad_() for x in qkv(dtype=dtype)]

    def results(softcap):
        out, lse = fastattn.attention(*leaves, softcap=softcap, return_lse=True)
        cached = fastattn.attention_with_kv_cache(*(x.detach() for x in leaves), 8, softcap=softcap)
        return out, lse, cached, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)

    with fastattn.backend.use(backend):
        for got, expected in zip(results(softcap), results(None)):
            assert torch.allclose(got, expected, atol=2e-2 if dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_with_zero_gradients(backend):
    q, k, v = (x.requires_grad_() for x in qkv(n=40, nk=40))
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[7] = False
    mask[:, 11] = False
    with fastattn.backend.use(backend):
        out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out.square().sum() + lse.exp().sum(), (q, k, v))
    assert not out[:, :, 7].any()
    assert (lse[:, :, 7] == -torch.inf).all()
    assert not dq[:, :, 7].any()
    assert not dk[:, :, 11].any()
    assert not dv[:, :, 11].any()
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_the_lowest_number_is_uniform_and_minus_infinity_is_a_mask(backend):
    q, k, v = qkv()
    bias = torch.zeros(8, 8)
    bias[1, 6] = 3e38  # beyond fp32 in base 2
    bias[2] = torch.finfo(torch.float32).min
    bias[3] = -torch.inf
    bias[4, 5:] = -torch.inf
    with fastattn.backend.use(backend):
        out = fastattn.attention(q, k, v, bias=bias)
    assert torch.equal(out[:, :, 1], v[:, :, 6])
    assert torch.allclose(out[:, :, 2], v.mean(2), atol=1e-6)
    assert not out[:, :, 3].any()
    assert torch.allclose(out[:, :, 4], reference.attention(q, k[:, :, :5], v[:, :, :5])[0][:, :, 4], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_such_biases_over_several_blocks_of_keys(backend):
    q, k, v = qkv(n=8, nk=100)
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(8, 100)
    bias[1, 40] = 3e38
    bias[2] = lowest
    bias[3] = -torch.inf
    bias[4, :50] = lowest
    bias[5] = lowest
    bias[5, 70] = -3e38  # larger than the others by more than any score
    bias[6, :40] = -torch.inf
    bias[6, 40:] = lowest
    with fastattn.backend.use(backend):
        out = fastattn.attention(q, k, v, bias=bias)
    assert torch.equal(out[:, :, 1], v[:, :, 40])
    assert torch.allclose(out[:, :, 2], v.mean(2), atol=1e-6)
    assert not out[:, :, 3].any()
    assert torch.allclose(out[:, :, 4], reference.attention(q, k[:, :, 50:], v[:, :, 50:])[0][:, :, 4], atol=1e-6)
    assert torch.equal(out[:, :, 5], v[:, :, 70])
    assert torch.allclose(out[:, :, 6], v[:, :, 40:].mean(2), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_bias_counts_where_it_is_seen_only(padded, hidden, backend):
    """PyTorch's causal kernel on a CPU adds the bias of hidden pairs as well; and knows nothing of rows that see only padding."""
    q, k, v = leaves = [x.requires_grad_() for x in qkv(n=40, nk=40)]
    bias = torch.randn(40, 40).masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu_(1), hidden)
    mask = (torch.arange(40) >= 3)[None] if padded else None  # rows 0 to 2 see nothing
    with torch.no_grad():
        q[:, :, 1] = 0.0  # whose log-sum-exp would be 0 as well, were there one
    with fastattn.backend.use(backend):
        out, lse = fastattn.attention(q, k, v, causal=True, bias=bias, mask=mask, return_lse=True)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected, expected_lse = reference.attention(*wide, causal=True, bias=bias.tril(), mask=mask)
    assert torch.allclose(out.double(), expected, atol=3e-6)
    assert torch.allclose(lse.double(), expected_lse, atol=3e-6)
    for got, right in zip(grads, torch.autograd.grad(expected.square().sum(), wide)):
        assert torch.allclose(got.double(), right, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        lambda x: x[:, :1].expand(-1, 2, -1, -1),
    ],
    ids=["heads_inner", "last_stride_2", "reversed", "row_gaps", "expanded_heads"],
)
def test_any_strides_give_the_same_result(view, backend):
    q, k, v = (view(x) for x in qkv(n=20, nk=24))
    bias = view(torch.randn(1, 2, 20, 24))
    with fastattn.backend.use(backend):
        got = fastattn.attention(q, k, v, causal=True, bias=bias)
        expected = fastattn.attention(*(x.contiguous() for x in (q, k, v)), causal=True, bias=bias.contiguous())
    assert torch.allclose(got, expected, atol=2e-6)


def test_merging_heads_of_a_projection_is_a_view():
    packed = torch.randn(2, 8, 3, 4, 16)
    out = fastattn.attention(*packed.permute(2, 0, 3, 1, 4), causal=True)
    assert out.transpose(1, 2).is_contiguous()


BAD = {
    "rank": (lambda q, k, v: ((q[0], k, v), {}), ValueError, r"query must have 4 dimensions .* got shape \(2, 8, 16\)"),
    "not_a_tensor": (lambda q, k, v: ((q, k, [1]), {}), TypeError, "value must be a torch.Tensor, got list"),
    "integer": (lambda q, k, v: ((q.int(), k, v), {}), TypeError, "query has dtype int32; allowed: float32"),
    "double": (lambda q, k, v: ((q.double(), k, v), {}), TypeError, "query has dtype float64; allowed"),
    "mixed": (lambda q, k, v: ((q.half(), k, v), {}), TypeError, "one dtype, got float16, float32, float32"),
    "batch": (lambda q, k, v: ((q.expand(2, -1, -1, -1), k, v), {}), ValueError, "same batch size"),
    "lengths": (lambda q, k, v: ((q, k, v[:, :, 1:]), {}), ValueError, "same heads and length"),
    "head_dims": (lambda q, k, v: ((q, k[..., 1:], v), {}), ValueError, "same head_dim"),
    "heads": (lambda q, k, v: ((torch.cat([q, q[:, :1]], 1), k, v), {}), ValueError, "multiple of the key's heads, got 3"),
    "head_dim_257": (lambda q, k, v: ((q, k, v.new_zeros(1, 2, 8, 257)), {}), ValueError, "value must be in 1..256, got 257"),
    "device": (lambda q, k, v: ((q, k.to("meta"), v), {}), ValueError, "key is on meta but query is on cpu"),
    "mask_dtype": (lambda q, k, v: ((q, k, v), {"mask": torch.ones(8, 8)}), TypeError, "mask has dtype float32; allowed: bool"),
    "mask_shape": (
        lambda q, k, v: ((q, k, v), {"mask": torch.ones(7, 8).bool()}), ValueError, r"mask must broadcast to .* \(7, 8\)",
    ),
    "bias_shape": (lambda q, k, v: ((q, k, v), {"bias": torch.ones(3, 8, 8)}), ValueError, "bias must broadcast"),
    "window": (lambda q, k, v: ((q, k, v), {"window": (-1, 0)}), ValueError, "window's left side .* got -1"),
    "window_form": (lambda q, k, v: ((q, k, v), {"window": 4}), TypeError, r"window must be None or \(left, right\), got int"),
    "window_length": (lambda q, k, v: ((q, k, v), {"window": (4,)}), ValueError, r"window must be None or \(left, right\), got \(4,\)"),
    "softcap": (lambda q, k, v: ((q, k, v), {"softcap": 0.0}), ValueError, "softcap must be None or > 0 and finite, got 0.0"),
    "softcap_inf": (lambda q, k, v: ((q, k, v), {"softcap": float("inf")}), ValueError, "softcap must be .* finite, got inf"),
    "softcap_text": (lambda q, k, v: ((q, k, v), {"softcap": "1"}), TypeError, "softcap must be a real number, got str"),
    "softcap_tensor": (lambda q, k, v: ((q, k, v), {"softcap": torch.ones(())}), TypeError, "softcap must be a real number, got Tensor"),
    "scale_text": (lambda q, k, v: ((q, k, v), {"scale": "1"}), TypeError, "scale must be a real number, got str"),
    "scale_tensor": (lambda q, k, v: ((q, k, v), {"scale": torch.ones(())}), TypeError, "scale must be a real number, got Tensor"),
    "scale_bool": (lambda q, k, v: ((q, k, v), {"scale": True}), TypeError, "scale must be a real number, got bool"),
    "scale_beyond_fp32": (lambda q, k, v: ((q, k, v), {"scale": -1e300}), ValueError, "scale must be finite in float32, .* got -1e.300"),
    "softcap_beyond_fp32": (lambda q, k, v: ((q, k, v), {"softcap": 1e300}), ValueError, "softcap must be a normal number of float32, .* got 1e.300"),
    "softcap_below_fp32": (lambda q, k, v: ((q, k, v), {"softcap": 1e-40}), ValueError, "softcap must be a normal number of float32, .* got 1e-40"),
    "dropout_none": (lambda q, k, v: ((q, k, v), {"dropout_p": None}), TypeError, "dropout_p must be a real number, got NoneType"),
    "scale_nan": (lambda q, k, v: ((q, k, v), {"scale": float("nan")}), ValueError, "scale must be None or finite, got nan"),
    "dropout_text": (lambda q, k, v: ((q, k, v), {"dropout_p": "a"}), TypeError, "dropout_p must be a real number, got str"),
    "window_float": (lambda q, k, v: ((q, k, v), {"window": (1.0, 0)}), TypeError, "window's left side .* an integer, got float"),
    "slopes_list": (lambda q, k, v: ((q, k, v), {"alibi_slopes": [1.0, 2.0]}), TypeError, "alibi_slopes must be a torch.Tensor, got list"),
    "dropout": (lambda q, k, v: ((q, k, v), {"dropout_p": 1.0}), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "slopes": (lambda q, k, v: ((q, k, v), {"alibi_slopes": torch.ones(3)}), ValueError, "alibi_slopes must have shape"),
    "slopes_grad": (
        lambda q, k, v: ((q, k, v), {"alibi_slopes": torch.ones(2, requires_grad=True)}), ValueError, "has no gradient",
    ),
    "sinks": (lambda q, k, v: ((q, k, v), {"sinks": torch.ones(3)}), ValueError, r"sinks must have shape \(2,\)"),
    "sparse": (lambda q, k, v: ((q.to_sparse(), k, v), {}), TypeError, "query must be a dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, error, message = BAD[name]
    arguments, options = change(*qkv())
    with pytest.raises(error, match=message):
        fastattn.attention(*arguments, **options)


def test_numbers_of_any_kind_mean_the_same():
    """Plain numbers, NumPy's, and those of a compiler, with one graph where lengths and widths are dynamic."""
    q, k, v = qkv()
    expected = fastattn.attention(q, k, v, scale=2.0, softcap=3.0, window=(4, 2))
    kinds = (
        (2, np.float32(2), np.int64(2)),
        (3, np.float64(3), np.int32(3)),
        ((4, 2), [np.int64(4), np.int32(2)], (4, 2)),
    )
    for scale, softcap, window in zip(*kinds):
        assert torch.equal(fastattn.attention(q, k, v, scale=scale, softcap=softcap, window=window), expected)
    assert torch.equal(fastattn.attention(q, k, v, scale=2), fastattn.attention(q, k, v, scale=2.0))

    def by_length(q, k, v, size):
        return fastattn.attention(q, k, v, window=(size, q.shape[2]))

    def by_width(q, k, v, size):
        scale, softcap = q.shape[3] ** -0.25, q.shape[3] * 0.5
        return fastattn.attention(q, k, v, scale=scale, softcap=softcap)

    compiled = [torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager") for f in (by_length, by_width)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 9, 40):
            x = qkv(n=n, nk=n + 2)
            assert torch.equal(compiled[0](*x, n // 2), by_length(*x, n // 2))
    assert torch.equal(compiled[1](*x, 0), by_width(*x, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(2**31 - 1, 2**31 - 1), (2**31 - 1, 0), (3, 2**31 - 1), (2**70, 2**70)], ids=str)
def test_a_window_that_reaches_too_far_for_32_bits(window, backend):
    """Its sides are as good as unbounded, in the forward and in the backward pass, packed and not."""
    leaves = [x.requires_grad_() for x in qkv()]
    rows, cu = [x[0].transpose(0, 1) for x in leaves], torch.tensor([0, 3, 8], dtype=torch.int32)

    def results(window):
        out, lse = fastattn.attention(*leaves, window=window, return_lse=True)
        packed = fastattn.varlen_attention(*rows, cu, cu, 8, 8, window=window)
        cached = fastattn.attention_with_kv_cache(*(x.detach() for x in leaves), 8, causal=False, window=window)
        loss = out.square().sum() + lse.sum() + packed.square().sum()
        return out, packed, cached, *torch.autograd.grad(loss, leaves)

    unbounded = tuple(None if side > 8 else side for side in window)
    with fastattn.backend.use(backend):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results(window), results(unbounded)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"sinks": torch.zeros(2)}], ids=lambda o: "".join(o) or "plain"
)
def test_rows_that_see_nothing_are_zero_whatever_their_query_is(options, value, backend):
    q, k, v = qkv()
    q[:, :, 2] = value
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[2] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with fastattn.backend.use(backend):
        out, lse = fastattn.attention(*leaves, mask=mask, **options, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum(), leaves)
    assert not out[:, :, 2].any()
    assert (lse[:, :, 2] == (0.0 if "sinks" in options else -torch.inf)).all()
    assert out.isfinite().all()
    if not options:
        assert not grads[0][:, :, 2].any()
    if backend == "eager" and "sinks" not in options:
        assert all(grad.isfinite().all() for grad in grads)
    transformed = torch.func.vmap(lambda q: fastattn.attention(q, k, v, mask=mask, **options))(q.detach()[None])[0]
    assert not transformed[:, :, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_the_result_is_zero_whatever_the_query_is(backend):
    query, keys = torch.full((1, 1, 2, 8), 6e4, dtype=torch.float16), torch.zeros(1, 1, 0, 8, dtype=torch.float16)
    query[:, :, 1] = torch.nan
    query.requires_grad_()
    ends, none = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    with fastattn.backend.use(backend):
        rows, packed = query[0].transpose(0, 1), keys[0].transpose(0, 1)

        def behind(rows):  # the second row belongs to no sequence
            return fastattn.varlen_attention(rows, packed, packed, ends, none, 1, 0)

        outs = [fastattn.attention(query, keys, keys), behind(rows)]
        grads = [torch.autograd.grad(out.sum(), query)[0] for out in outs]
        outs += [
            torch.func.vmap(behind)(rows.detach()[None]),
            torch.func.jvp(behind, (rows.detach(),), (rows.detach(),))[1],
        ]
    assert not any(x.any() for x in (*outs, *grads))


def test_slopes_that_are_a_parameter_need_no_gradient_where_none_is_recorded():
    slopes = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad():
        out = fastattn.attention(*qkv(), alibi_slopes=slopes)
    assert out.shape == (1, 2, 8, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explain_draws_no_random_number(backend):
    before = torch.get_rng_state()
    x = torch.zeros(1, 2, 8, 16)
    with fastattn.backend.use(backend):
        text = fastattn.explain(fastattn.attention, x, x, x, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert backend == "triton" or "matrix products" in text
    with pytest.raises(ValueError, match="dropout_p must be in"):
        fastattn.explain(fastattn.attention, x, x, x, dropout_p=1.5)


def test_explain_asks_the_gpu_that_the_tensors_are_on(monkeypatch):
    asked = []
    monkeypatch.setattr(fastattn.backend, "device_guard", lambda device: nullcontext(asked.append(device)))
    x = torch.zeros(1, 2, 8, 16)
    fastattn.explain(fastattn.attention, x, x, x)
    assert asked == [x.device]


def test_plain_pytorch_on_a_gpu_is_not_waited_for():
    q, k, v = (x.to("meta") for x in qkv())  # which has no numbers to look at
    rules = ScoreRules(None, None, None, None, None, 0.25, None, 0, 5.0, 0.0)
    assert eager_attention.forward(q, k, v, rules, "ieee")[0].shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 128, 200, 255, 256])
def test_every_class_of_head_dim(dim, backend):
    q, k, v = qkv(heads=1, kv_heads=1, n=5, nk=9, dim=dim, value_dim=257 - dim)
    with fastattn.backend.use(backend):
        out = fastattn.attention(q, k, v, causal=True)
    truth = reference.attention(*(x.double() for x in (q, k, v)), causal=True)[0]
    assert torch.allclose(out.double(), truth, atol=3e-6)


def check_lying_like(dtype, which, strides, rows, tolerance):
    """One of query, key and value of those strides, beside two that are contiguous, and copies of all three."""
    torch.manual_seed(0)
    shapes = [(1, 2, rows if name == "query" else 6, 16) for name in ("query", "key", "value")]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors[which] = torch.randn(512, dtype=dtype).as_strided(shapes[which], (*strides, 1))
    found = []
    for given in (tensors, [t.clone(memory_format=torch.contiguous_format).double() for t in tensors]):
        leaves = [t.requires_grad_() for t in given]
        if found:
            q, k, v = leaves
            out = torch.softmax(q @ k.mT / 4.0, -1) @ v
        else:
            out = fastattn.attention(*leaves)
        found.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for ours, expected in zip(*found):
        assert (ours.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_windows_that_slide_by_one_number(dtype, which):
    """`x.unfold(-1, 16, 1)`: PyTorch's fused kernel reads and writes other memory than it should."""
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    check_lying_like(dtype, which, (100, 100, 1), 6, tolerance)


def test_a_single_row_of_a_batch_whose_stride_is_one():
    """Such strides, of a dimension of size 1, are no window's, and the tensor is contiguous; in bf16 the row is doubled on some CPUs."""
    check_lying_like(torch.bfloat16, 0, (1, 16, 16), 1, 5e-2)
    query, key = torch.randn(2, 1, 1, 1, 16).bfloat16()
    cache = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    decoded = fastattn.attention_with_kv_cache(
        query.as_strided(query.shape, (1, 1, 1, 1)), cache.clone(), cache.clone(), 0, key=key, value=key
    )
    assert torch.equal(decoded, key)
