"""Linear with activation and feed-forward, plain and gated: the contract, and what each activation is."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.eager.activations import ACTIVATIONS, activate, gradient
from tests import contract, reference
from tests.compare import assert_close
from tests.contract import BACKENDS, DTYPES, Op


def feed_forward(
    rows=(3, 5),
    d_in=24,
    d_hidden=70,
    d_out=24,
    act="gelu",
    bias1=True,
    bias2=True,
    gated=False,
    gate_bias=True,
    residual=False,
    dropout_p=0.0,
    **options,
):
    shapes = {"input": (*rows, d_in), "weight1": (d_hidden, d_in), "weight2": (d_out, d_hidden)}
    shapes |= {"bias1": (d_hidden,)} if bias1 else {}
    shapes |= {"bias2": (d_out,)} if bias2 else {}
    shapes |= {"gate_weight": (d_hidden, d_in)} if gated else {}
    shapes |= {"gate_bias": (d_hidden,)} if gated and gate_bias else {}
    shapes |= {"residual": (*rows, d_out)} if residual else {}
    seed = int(torch.randint(torch.iinfo(torch.int64).max, (1,), generator=torch.manual_seed(3)))
    keep = reference.philox_keep_rows(seed, math.prod(rows), d_out, dropout_p).reshape(*rows, d_out)

    def ours(input, weight1, weight2, bias1=None, bias2=None, **others):
        if dropout_p:
            torch.manual_seed(3)
        others |= {"activation": act, "dropout_p": dropout_p, **options}
        return fastattn.feed_forward(input, weight1, bias1, weight2, bias2, **others)

    def finished(y, residual):
        y = y * (keep / (1 - dropout_p)).to(y.dtype) if dropout_p else y
        return y if residual is None else y + residual

    def definition(*, residual=None, **tensors):
        return finished(reference.feed_forward(**tensors, act=act), residual)

    def plain(input, weight1, weight2, bias1=None, bias2=None, gate_weight=None, gate_bias=None, residual=None):
        z = F.linear(input, weight1, bias1)
        g = z if gate_weight is None else F.linear(input, gate_weight, gate_bias)
        hidden = reference.activation(g, act)
        return finished(F.linear(hidden if gate_weight is None else hidden * z, weight2, bias2), residual)

    factors = {"weight1": d_in**-0.5, "gate_weight": d_in**-0.5, "weight2": d_hidden**-0.5}
    return Op(ours, definition, shapes, plain, factors=factors, grows=("input", "residual"))


def linear(act, rows=(6,), d_in=17, d_out=33, bias=True):
    shapes = {"input": (*rows, d_in), "weight": (d_out, d_in)} | ({"bias": (d_out,)} if bias else {})

    def definition(input, weight, bias=None):
        return reference.activation(reference.linear(input, weight, bias), act)

    def plain(input, weight, bias=None):
        return reference.activation(F.linear(input, weight, bias), act)

    def ours(input, weight, bias=None):
        return fastattn.linear(input, weight, bias, activation=act)

    return Op(ours, definition, shapes, plain, factors={"weight": d_in**-0.5})


CASES = {
    "defaults": feed_forward(),
    "one_row": feed_forward((1,)),
    "vector": feed_forward((), d_in=6, d_hidden=7, d_out=5),
    "rank_4_odd_widths": feed_forward((2, 3, 2), d_in=7, d_hidden=13, d_out=3),
    "rows_beyond_a_group_of_blocks": feed_forward((300,), d_in=8, d_hidden=16, d_out=8),
    "depth_of_one": feed_forward(d_in=1, d_hidden=1, d_out=1),
    "block_multiples": feed_forward((32,), d_in=32, d_hidden=64, d_out=32),
    "no_biases": feed_forward(bias1=False, bias2=False),
    "first_bias": feed_forward(bias2=False),
    "gated": feed_forward(act="silu", gated=True),
    "gated_without_biases": feed_forward(act="sigmoid", gated=True, bias1=False, bias2=False, gate_bias=False),
    "recompute_activation": feed_forward(recompute="activation"),
    "recompute_hidden": feed_forward(recompute="hidden"),
    "gated_recompute_activation": feed_forward(act="gelu_tanh", gated=True, recompute="activation"),
    "gated_recompute_hidden": feed_forward(act="relu", gated=True, recompute="hidden"),
    "residual": feed_forward(residual=True),
    "dropout": feed_forward(dropout_p=0.4, d_out=23),
    "gated_dropout_residual": feed_forward(gated=True, dropout_p=0.2, residual=True, recompute="activation"),
    "linear": linear("identity"),
    "linear_without_bias": linear("identity", bias=False),
    **{f"linear_{act}": linear(act) for act in ACTIVATIONS if act != "identity"},
    **{f"gated_{act}": feed_forward((5,), 9, 11, 4, act=act, gated=True) for act in ("relu2", "tanh", "identity")},
}
FEATURES = ["rank_4_odd_widths", "gated", "recompute_hidden", "linear_gelu", "linear_without_bias"]
DROPOUT = ["dropout", "gated_dropout_residual"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, backend):
    contract.check_values(CASES[name], backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*FEATURES, *DROPOUT])
def test_strides_and_determinism(name, backend):
    contract.check_strides(CASES[name], backend)
    contract.check_determinism(CASES[name], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*FEATURES, *DROPOUT])
def test_double_backward(name, backend):
    contract.check_double_backward(CASES[name], backend)


@pytest.mark.parametrize("name", FEATURES)
def test_transforms(name):
    contract.check_transforms(CASES[name], "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gated", "recompute_hidden", "gated_dropout_residual", "linear_gelu"])
def test_registration(name, backend):
    contract.check_registration(CASES[name], backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["gated", "residual", "linear_gelu"])
def test_compiles(name, dynamic):
    contract.check_compiles(CASES[name], "eager", dynamic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_from_tiny_to_huge(act, backend):
    """Value and derivative on both sides of every switch between formulas; nothing overflows."""
    points = torch.tensor([1e-30, 1e-6, 1e-3, 0.2499, 0.2501, 0.5, 1.0, 3.0, 9.0, 50.0, 200.0])
    z = torch.cat([-points.flip(0), points])[:, None].requires_grad_()
    with fastattn.backend.use(backend):
        got = fastattn.linear(z, torch.ones(1, 1), activation=act)
        (grad,) = torch.autograd.grad(got.sum(), z)
    exact = z.detach().double().requires_grad_()
    truth = reference.activation(exact, act)
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    assert ((got - truth).abs() <= 4e-6 * truth.abs() + 8e-7).all()
    assert ((grad - true_grad).abs() <= 4e-6 * true_grad.abs() + 8e-7).all()
    if act == "tanh":
        assert ((got - truth).abs() <= 4e-7 * truth.abs()).all(), "tanh keeps its relative accuracy near 0"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "d_hidden"), [((0,), 5), ((2, 0), 5), ((3,), 0)], ids=str)
def test_empty(rows, d_hidden, backend):
    case = feed_forward(rows, d_in=4, d_hidden=d_hidden or 1, d_out=3)
    tensors = dict(zip(case.shapes, case.tensors()))
    if d_hidden == 0:
        tensors |= {"weight1": torch.empty(0, 4), "weight2": torch.empty(3, 0), "bias1": torch.empty(0)}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    with fastattn.backend.use(backend):
        y = case.ours(**tensors)
        grads = torch.autograd.grad(y.sum(), tensors.values())
    assert torch.equal(y, tensors["bias2"].expand(*rows, 3))
    rows_counted = torch.full((3,), float(y.numel() // 3))
    expected = [rows_counted if name == "bias2" else torch.zeros_like(t) for name, t in tensors.items()]
    assert all(torch.equal(g, e) for g, e in zip(grads, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameter_gradients_add_in_fp32(dtype, backend):
    """5,000 ones would stop at 256 in bf16 and at 2,048 in fp16."""
    x, weight, bias = torch.ones(5_000, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype), torch.zeros(2, dtype=dtype)
    weight.requires_grad_(), bias.requires_grad_()
    with fastattn.backend.use(backend):
        y = fastattn.linear(x, weight, bias)
        grads = torch.autograd.grad(y, (weight, bias), torch.ones_like(y))
    for grad in grads:
        assert torch.equal(grad, torch.full_like(grad, 5_000.0))


@pytest.mark.parametrize(
    ("gated", "recompute", "kept"),
    [
        (False, "none", 2),
        (False, "activation", 1),
        (False, "hidden", 0),
        (True, "none", 3),
        (True, "activation", 2),
        (True, "hidden", 0),
    ],
)
def test_recompute_keeps_what_it_says(gated, recompute, kept):
    """`kept` · d_hidden numbers per row."""
    case = feed_forward((10,), d_hidden=64, gated=gated, recompute=recompute)
    tensors = [t.requires_grad_() for t in case.tensors()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.call(case.ours)(*tensors)
    given = {t.data_ptr() for t in tensors}
    assert sum(t.numel() for t in saved if t.data_ptr() not in given) == 10 * 64 * kept


def test_nothing_is_kept_without_gradients():
    case = feed_forward()
    with torch.no_grad(), contract.recording() as calls:
        case.call(case.ours)(*[t.requires_grad_() for t in case.tensors()])
    ((_, arguments),) = calls
    assert arguments[-2:] == [False, False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_traced():
    """`torch.jit.trace` traces twice, the second time without gradients, and compares the graphs."""
    layer, x = fastattn.nn.FeedForward(8), torch.randn(3, 8)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


def test_autocast_runs_in_its_dtype():
    case = feed_forward(gated=True)
    tensors = [t.requires_grad_() for t in case.tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = case.call(case.ours)(*tensors)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("wrong", [None, [1.0]])
def test_autocast_leaves_what_is_no_tensor_to_the_checks(wrong):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"input must be a torch\.Tensor"):
            fastattn.linear(wrong, W1)
        with pytest.raises(TypeError, match=r"weight2 must be a torch\.Tensor"):
            fastattn.feed_forward(X, W1, None, wrong, None)
        with pytest.raises(TypeError, match=r"value must be a torch\.Tensor"):
            fastattn.attention(X[None], X[None], wrong)


@pytest.mark.parametrize(
    ("owner", "name", "settings"),
    [
        (torch.backends.cuda.matmul, "allow_tf32", (False, True)),
        (torch.backends.cuda.matmul, "fp32_precision", ("ieee", "tf32")),  # torch forbids asking the other two then
        (torch, "set_float32_matmul_precision", ("highest", "high")),
    ],
    ids=["allow_tf32", "fp32_precision", "matmul_precision"],
)
def test_tf32_only_where_torch_allows_it(owner, name, settings, monkeypatch):
    from fastattn.kernels import feed_forward as kernels

    def set_to(setting):
        getattr(torch, name)(setting) if owner is torch else setattr(owner, name, setting)

    seen, before = [], torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(kernels, "launch", lambda *args, **constants: seen.append(constants["PRECISION"]))
    try:
        for setting, dtype in zip((*settings, settings[1]), (torch.float32, torch.float32, torch.bfloat16)):
            set_to(setting)
            with fastattn.backend.use("triton"):
                fastattn.linear(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype))
    finally:
        set_to(settings[0])
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == ["ieee", "tf32", "ieee"]


X, W1, W2 = torch.zeros(2, 3, 4), torch.zeros(6, 4), torch.zeros(4, 6)
ERRORS = {
    "activation": (ValueError, r"activation must be one of relu, .*, got 'swish'", (X, W1, None, W2, None), {"activation": "swish"}),
    "recompute": (ValueError, r"recompute must be one of none, activation, hidden, got 'all'", (X, W1, None, W2, None), {"recompute": "all"}),
    "weight1": (ValueError, r"weight1 must have shape \(out_features, 4\), got \(6, 5\)", (X, torch.zeros(6, 5), None, W2, None), {}),
    "weight2": (ValueError, r"weight2 must have shape \(out_features, 6\), got \(4, 7\)", (X, W1, None, torch.zeros(4, 7), None), {}),
    "bias1": (ValueError, r"bias1 must have shape \(6,\)", (X, W1, torch.zeros(4), W2, None), {}),
    "rank": (ValueError, r"weight1 must have 2 dimensions", (X, torch.zeros(4), None, W2, None), {}),
    "scalar": (ValueError, r"input must have at least 1 dimension", (torch.tensor(1.0), W1, None, W2, None), {}),
    "dtype": (TypeError, r"weight2 has dtype float16; allowed: that of input, float32", (X, W1, None, W2.half(), None), {}),
    "double": (TypeError, r"input has dtype float64", (X.double(), W1, None, W2, None), {}),
    "none": (TypeError, r"weight1 must be a torch.Tensor, got NoneType", (X, None, None, W2, None), {}),
    "gate": (ValueError, r"gate_weight must have shape \(6, 4\) \(the shape of weight1\)", (X, W1, None, W2, None), {"gate_weight": W1[:5]}),
    "gate_bias": (ValueError, r"gate_bias needs gate_weight", (X, W1, None, W2, None), {"gate_bias": torch.zeros(6)}),
    "dropout": (ValueError, r"dropout_p must be in \[0, 1\), got -0.1", (X, W1, None, W2, None), {"dropout_p": -0.1}),
    "residual": (ValueError, r"residual must have shape \(2, 3, 4\)", (X, W1, None, W2, None), {"residual": X[0]}),
    "device": (ValueError, r"weight1 is on meta but input is on cpu", (X, W1.to("meta"), None, W2, None), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, arguments, options = ERRORS[name]
    with contract.no_launch(), pytest.raises(error, match=message):
        fastattn.feed_forward(*arguments, **options)


def test_linear_checks_its_arguments():
    with pytest.raises(ValueError, match=r"weight must have shape \(out_features, 4\), got \(4, 6\)"):
        fastattn.linear(X, W2)


def test_a_gelu_layer_matches_torchs():
    case = feed_forward()
    x, w1, w2, b1, b2 = case.tensors()
    got = fastattn.feed_forward(x, w1, b1, w2, b2)
    plain = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    assert_close("output", got, plain.double(), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 200], ids=["by_pytorch", "by_onednn"])
def test_gelu_tanh_and_its_gradient_on_the_cpu(rows, dtype):
    """dY is overwritten where that is allowed, and nowhere else; extreme values stay finite."""
    z = (3.0 * torch.randn(rows, 701, generator=torch.manual_seed(0))).to(dtype)
    z[0, :4] = torch.tensor([-60000.0, 60000.0, -20.0, 20.0])
    dy = torch.randn(z.shape, generator=torch.manual_seed(1)).to(dtype)

    def of(x):
        x = x.detach().requires_grad_()
        y = F.gelu(x, approximate="tanh")
        return y.detach(), torch.autograd.grad(y, x, dy.to(x.dtype))[0]

    (truth, d_truth), (plain, d_plain) = of(z.double()), of(z)
    kept = dy.clone()
    for overwrite in (False, True):
        dz, value = gradient(dy, z, "gelu_tanh", overwrite=overwrite, need_value=True)
        assert torch.equal(dy, dz if overwrite else kept)
        assert_close("dz", dz, d_truth, d_plain)
        values = {"value with gradient": value, "value": activate(z, "gelu_tanh")}
        for name, y in values.items():
            for part in (slice(1), slice(1, None)):  # (large values have large errors)
                assert_close(name, y[part], truth[part], plain[part])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bf16_layers_of_many_rows_without_gradients(act, gated):
    """oneDNN's product with bias and activation inside, where the CPU has it."""
    generator = torch.manual_seed(0)
    shapes = {"input": (40, 24), "weight1": (70, 24), "bias1": (70,), "weight2": (16, 70), "bias2": (16,)}
    shapes |= {"gate_weight": (70, 24), "gate_bias": (70,)} if gated else {}
    tensors = {name: (torch.randn(shape, generator=generator) / 3.0).bfloat16() for name, shape in shapes.items()}
    truth = reference.feed_forward(**{name: t.double() for name, t in tensors.items()}, act=act)
    plain = reference.feed_forward(**tensors, act=act)
    with torch.no_grad():
        got = fastattn.feed_forward(**tensors, activation=act)
    assert_close("output", got, truth, plain)
    transposed = {
        **tensors,
        "weight1": tensors["weight1"].t().contiguous().t(),
    }  # strides that oneDNN is not asked to take
    with torch.no_grad():
        assert_close("output", fastattn.feed_forward(**transposed, activation=act), truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_not_a_number_stays_one(activation, backend, dtype):
    """The maximum of a GPU, and oneDNN's ReLU, make it 0, and a model that broke would go on."""
    x, weight = torch.randn(4, 512), torch.randn(512, 512)
    x[0, 0] = torch.nan
    with fastattn.backend.use(backend), torch.no_grad():
        y = fastattn.linear(x.to(dtype), weight.to(dtype), activation=activation)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()
