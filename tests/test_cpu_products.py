"""The ways of a CPU's matrix products, and of the attention around them: each, on any CPU, as if this were the one that takes it."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.eager import attention_fused, attention_products, feed_forward, products
from fastattn.nn import plain
from tests import reference
from tests.compare import assert_close

ONEDNN = torch.backends.mkldnn.is_available() and products._linear_pointwise is not None
# (has tiles, oneDNN is the faster in fp32, has no instructions for 16 bits)
CPUS = {
    "amd": (False, True, False), "tiles": (True, False, False), "neither": (False, False, False),
    "old": (False, False, True), "old amd": (False, True, True),
}  # fmt: skip
OFTEN = [(1, 40), (2, 200), (3, 192), (8, 200), (9, 40), (17, 200)]
SIZES = [
    pytest.param(rows, columns, marks=[] if (rows, columns) in OFTEN else pytest.mark.slow)
    for rows in (1, 2, 3, 8, 9, 17)
    for columns in (40, 192, 200)
]
HALVES = {torch.bfloat16: products._Rows(3, 2, 2), torch.float16: products._Rows(2, 1, 1)}


@pytest.fixture(params=CPUS)
def cpu(request, monkeypatch):
    """What the ways are chosen by; `onednn_takes` of 16 bits stays, since it says what this CPU can do."""
    tiles, onednn, emulates = CPUS[request.param]
    monkeypatch.setattr(products, "_emulates", lambda dtype: emulates and dtype in HALVES)
    monkeypatch.setattr(products, "_LEAST_WIDENED", HALVES)
    for module in (products, attention_fused, attention_products):
        monkeypatch.setattr(module, "has_tiles", lambda: tiles)
    for module in (products, plain):
        monkeypatch.setattr(module, "fp32_by_onednn", lambda: onednn and ONEDNN)
    monkeypatch.setattr(products, "LEAST_WEIGHT", 1)
    return request.param


def random(*shapes, dtype):
    generator = torch.manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_products(cpu, rows, columns, has_bias, dtype):
    x, weight, bias, dy = random((rows, 24), (columns, 24), (columns,), (rows, columns), dtype=dtype)
    bias = bias if has_bias else None
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain_result = F.linear(x, weight, bias)
    for w in (weight, weight.t().contiguous().t(), weight[None].expand(2, -1, -1)[1]):
        assert_close("product", products.product(x, w, bias), truth, plain_result)
        got = products.product_with_columns(dy, w)
        assert_close("product with columns", got, dy.double() @ weight.double(), dy @ weight)
        got = products.product_with_columns(dy, w, dy, w)
        assert_close("two products", got, 2 * (dy.double() @ weight.double()), 2 * (dy @ weight))
    for a, b in ((dy, x), (x, dy), (dy, dy)):
        got = products.product_over_rows(a, b)
        assert got.is_contiguous(), "as the weight whose gradient it is"
        assert_close("product over rows", got, a.double().t() @ b.double(), a.t() @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_a_bias_of_any_strides(cpu, activation, dtype):
    """oneDNN reads a bias as if its numbers lay one behind the other."""
    x, weight, strided = random((5, 24), (40, 24), (40, 2), dtype=dtype)
    for bias in (strided[:, 0], strided[0, :1].expand(40)):
        truth, plain = (
            F.gelu(F.linear(x.to(t), weight.to(t), bias.to(t)))
            if activation == "gelu"
            else F.linear(x.to(t), weight.to(t), bias.to(t))
            for t in (torch.float64, dtype)
        )
        assert_close("linear", fastattn.linear(x, weight, bias, activation=activation), truth, plain)


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((2, 0), (3, 0)), ((2, 4), (0, 4))], ids=str)
def test_empty_products(cpu, shapes):
    x, weight = random(*shapes, dtype=torch.float32)
    dy = torch.zeros(len(x), len(weight))
    assert torch.equal(products.product(x, weight, None), F.linear(x, weight))
    assert torch.equal(products.product_with_columns(dy, weight), dy @ weight)
    assert torch.equal(products.product_over_rows(dy, x), dy.t() @ x)


@pytest.mark.skipif(not ONEDNN, reason="PyTorch was built without oneDNN")
def test_packed_weights(cpu, monkeypatch):
    x, bias, *weights = random((3, 24), (40,), (40, 24), (40, 24), dtype=torch.float32)
    packed = products.pack(weights, 3)
    assert [w.is_mkldnn for w in packed] == ["amd" in cpu] * 2
    for w, plain_weight in zip(packed, weights):
        truth = F.linear(x.double(), plain_weight.double(), bias.double())
        assert_close("product", products.product(x, w, bias), truth, F.linear(x, plain_weight, bias))
    monkeypatch.setattr(products, "MOST_PACKED", 2 * weights[0].nbytes - 1)
    assert products.pack(weights, 3) == weights, "more memory than a generation may take"


def test_which_cpus_lack_instructions(monkeypatch):
    """oneDNN calls bf16 supported from AVX-512 on, but products of it need more."""
    for flags, expected in {
        (): True, ("avx512_f", "avx512_bw"): True, ("avx512_bf16",): False, ("amx_bf16",): False, ("avx_ne_convert",): False,
    }.items():  # fmt: skip
        capabilities = {"architecture": "x86_64", **dict.fromkeys(flags, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        monkeypatch.setattr(products, "onednn_takes", lambda dtype: dtype != torch.float16)
        find = products._emulates.__wrapped__  # without what was found of this CPU
        assert [find(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [False, expected, True]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert not products._emulates.__wrapped__(torch.bfloat16), "elsewhere oneDNN knows"


@pytest.mark.parametrize("cpu", ["old", "old amd"], indirect=True)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_without_instructions_for_16_bits(cpu, dtype, monkeypatch):
    """The numbers of fp32 products, rounded once; a few rows in 16 bits."""
    multiplied, fused = [], []
    for name in ("linear", "gelu"):
        original = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *a, f=original, **o: multiplied.append(x.dtype) or f(x, *a, **o))
    monkeypatch.setattr(products, "onednn_linear", lambda x, w, b, *_: fused.append(x.dtype) or F.linear(x, w, b))
    x, weight, bias, gate, dy = random((6, 24), (40, 24), (40,), (40, 24), (6, 40), dtype=dtype)
    wide = [t.float() for t in (x, weight, bias, gate, dy)]

    def check(got, expected):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0.0)

    check(products.product(x, weight, bias), F.linear(*wide[:3]))
    check(products.product(x, products.pack([weight], 6)[0].to_dense(), bias), F.linear(*wide[:3]))
    check(products.product_with_columns(dy, weight, dy, gate), wide[4] @ (wide[1] + wide[3]))
    check(products.product_over_rows(dy, x), wide[4].t() @ wide[0])
    check(
        feed_forward.hidden_layer(x, weight, bias, gate, None, "gelu"),
        F.gelu(wide[0] @ wide[3].t()) * F.linear(*wide[:3]),
    )
    assert {*multiplied, *fused} == {torch.float32}
    products.product(x[:1], weight, bias)
    assert dtype in (multiplied[-1], *fused[-1:])
    losses = [fastattn.linear_cross_entropy(*pair, torch.arange(6)) for pair in ((x, weight), wide[:2])]
    assert torch.equal(*losses)


def test_linear_layers_of_the_modules(cpu, monkeypatch):
    """fastattn.linear where it is faster, twice differentiable; PyTorch's where something would not see it, or has to."""
    used, ours = [], plain.ops.linear
    monkeypatch.setattr(plain.ops, "linear", lambda *a: used.append(True) or ours(*a))
    layer = torch.nn.Linear(24, 40)
    x = random((2, 5, 24), dtype=torch.float32)[0].requires_grad_()

    def derivatives(function):
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, layer.weight))

    for got, expected in zip(derivatives(lambda x: plain.call_linear(layer, x)), derivatives(layer)):
        torch.testing.assert_close(got, expected)
    assert bool(used) == ("amd" in cpu and ONEDNN)
    used.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.call_linear(layer, x).dtype == torch.bfloat16
    assert bool(used) == ("old" in cpu)
    used.clear()
    torch.func.grad(lambda x: plain.call_linear(layer, x).sum())(x)
    layer.register_forward_hook(lambda *_: torch.zeros(1))
    assert plain.call_linear(layer, x).shape == (1,)
    assert not used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("kind", ["full", "causal", "mask", "bias"])
def test_attention_in_16_bits(cpu, kind, rows, dtype):
    query, key, value, grad = random((2, 4, rows, 16), (2, 2, 20, 16), (2, 2, 20, 16), (2, 4, rows, 16), dtype=dtype)
    mask = torch.rand(2, 1, rows, 20, generator=torch.manual_seed(1)) < 0.7 if kind == "mask" else None
    bias = random((4, rows, 20), dtype=dtype)[0] if kind == "bias" else None
    options = dict(causal=kind == "causal", mask=mask, bias=bias)

    def run(function, leaves, **options):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = function(*leaves, **options)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    inputs = (query, key, value)
    double = options | {"bias": None if bias is None else bias.double()}
    truth = run(reference.attention, [x.double() for x in inputs], **double)
    plain_results = run(reference.attention, inputs, **options)
    got = run(fastattn.attention, inputs, **options)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), got, truth, plain_results):
        assert x.dtype == dtype
        assert_close(name, x, y, z)
    with torch.no_grad():
        assert_close("out", fastattn.attention(*inputs, **options), truth[0], plain_results[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_over_a_cache_in_16_bits(cpu, dtype):
    query, key, value = random((2, 4, 1, 16), (2, 4, 30, 16), (2, 4, 30, 16), dtype=dtype)
    truth = reference.attention(*(x.double() for x in (query, key[:, :, :21], value[:, :, :21])))[0]
    plain_result = reference.attention(query, key[:, :, :21], value[:, :, :21])[0]
    for lengths in (21, torch.tensor([21, 21], dtype=torch.int32)):
        assert_close("out", fastattn.attention_with_kv_cache(query, key, value, lengths), truth, plain_result)
