"""Linear projection and cross entropy in one: the contract, chunks, memory, and what torch's cross entropy does."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.eager import loss as eager
from fastattn.eager import products
from fastattn.kernels import loss as kernels
from tests import contract, reference
from tests.contract import BACKENDS, DTYPES, Op


def target_of(input, classes, ignore_index=-100):
    """Different classes, the first and the last among them, and every fifth token ignored."""
    index = torch.arange(input[..., 0].numel())
    target = (index * (classes - 1)) % classes
    return torch.where(index % 5 == 3, ignore_index, target).view(input.shape[:-1])


def class_weights(classes):
    """Between 0 and 2, one of them 0."""
    return (torch.arange(classes) * 7 % 11) / 5.0


def torchs(logits, target, class_weight=None, z_loss=0.0, softcap=None, reduction="mean", **options):
    """Torch's own, in fp32: its sum overflows in fp16."""
    z = (
        logits.flatten(0, -2).float()
        if softcap is None
        else softcap * torch.tanh(logits.flatten(0, -2) / softcap).float()
    )
    labels = target.flatten()
    losses = F.cross_entropy(z, labels, class_weight, reduction="none", **options)
    valid = labels != options.get("ignore_index", -100)
    losses = losses + z_loss * torch.where(valid, torch.logsumexp(z, -1).square(), 0)
    count = torch.ones(z.shape[1])[labels[valid]] if class_weight is None else class_weight[labels[valid]]
    return {"none": losses.view(target.shape), "sum": losses.sum(), "mean": losses.sum() / count.sum()}[reduction]


def loss(rows=(7,), features=12, classes=33, bias=True, weighted=False, logits=False, inplace=False, **options):
    """A case of linear_cross_entropy, or with `logits` of cross_entropy."""
    options |= {"class_weight": class_weights(classes)} if weighted else {}
    ignore_index = options.get("ignore_index", -100)
    shapes = {"input": (*rows, features), "weight": (classes, features)} | ({"bias": (classes,)} if bias else {})

    def ours(input, weight=None, bias=None):
        target = target_of(input, classes, ignore_index)
        if logits:
            return fastattn.cross_entropy(input * 1.0 if inplace else input, target, inplace=inplace, **options)
        return fastattn.linear_cross_entropy(input, weight, target, bias=bias, **options)

    def definition(input, weight=None, bias=None):
        x = input if logits else reference.linear(input, weight, bias)
        return reference.cross_entropy(x, target_of(input, classes, ignore_index), **options)

    def plain(input, weight=None, bias=None):
        x = input if logits else F.linear(input, weight, bias)
        return torchs(x, target_of(input, classes, ignore_index), **options)

    if logits:
        return Op(ours, definition, {"input": (*rows, classes)}, plain, factors={"input": 3.0})
    return Op(ours, definition, shapes, plain, factors={"weight": 0.5})


CASES = {
    "mean": loss(),
    "sum_without_bias": loss(bias=False, reduction="sum"),
    "none": loss(reduction="none"),
    "rank_3_smoothing": loss((2, 3), label_smoothing=0.1),
    "none_smoothing_other_ignore_index": loss((2, 4), reduction="none", label_smoothing=0.3, ignore_index=5),
    "one_class": loss(classes=1),
    "rows_of_logits_with_a_gap": loss((3, 6), 76, 3),
    "several_chunks_and_blocks": loss((40,), classes=300, label_smoothing=0.1),
    "z_loss": loss(z_loss=0.01),
    "softcap": loss(softcap=1.5),
    "class_weights": loss(weighted=True),
    "everything": loss((20,), weighted=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0),
    "everything_none": loss((2, 9), weighted=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0, reduction="none"),
}
LOGITS = {
    "logits": loss(logits=True),
    "logits_sum_other_ignore_index": loss(logits=True, reduction="sum", ignore_index=5),
    "logits_none_smoothing": loss((2, 4), logits=True, reduction="none", label_smoothing=0.3),
    "logits_one_class": loss(logits=True, classes=1),
    "logits_several_blocks": loss((5,), logits=True, classes=300, weighted=True, label_smoothing=0.1),
    "logits_softcap_z_loss": loss(logits=True, softcap=2.0, z_loss=0.1),
    "logits_everything_none": loss(
        (2, 3), logits=True, weighted=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0, reduction="none"
    ),
    "logits_in_place": loss((2, 9), logits=True, inplace=True, label_smoothing=0.1),
}
CASES |= LOGITS
SOME = ["mean", "none", "everything", "everything_none", "logits", "logits_everything_none"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Eighteen rows at a time, so that forty rows are three chunks, the last one ragged; and small blocks of each. 16-bit products
    are those of CPUs that have instructions for them."""
    monkeypatch.setattr(products, "_emulates", lambda dtype: False)
    for module in (eager, kernels):
        monkeypatch.setattr(module, "chunk_rows", lambda classes: 18)
    monkeypatch.setattr(eager, "BLOCK_NUMBERS", 3 * 33)
    monkeypatch.setattr(eager, "PRODUCT_ROWS", 7)
    monkeypatch.setattr(
        kernels, "cross_entropy_config", lambda target, classes, itemsize: (itemsize, 8, 16 // itemsize, 1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, backend):
    contract.check_values(CASES[name], backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_values_on_cpus_without_16_bit_instructions(name, dtype, monkeypatch):
    monkeypatch.setattr(products, "_emulates", lambda dtype: dtype != torch.float32)
    contract.check_values(CASES[name], "eager", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SOME)
def test_contract(name, backend):
    contract.check_strides(CASES[name], backend)
    contract.check_determinism(CASES[name], backend)
    contract.check_double_backward(CASES[name], backend)
    contract.check_transforms(CASES[name], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mean", "none"])
def test_registration(name, backend):
    case = CASES[name]
    with fastattn.backend.use(backend), contract.recording() as calls:
        leaves = [t.requires_grad_() for t in case.tensors()]
        case.ours(*leaves).sum().backward()
    assert len(calls) == (1 if name == "mean" else 2), "only `none` computes the logits twice"
    for func, arguments in calls:
        with fastattn.backend.use(backend):
            torch.library.opcheck(func, tuple(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_of_cross_entropy(backend):
    contract.check_registration(CASES["logits_everything_none"], backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["mean", "none", "everything", "logits", "logits_in_place"])
def test_compiles(name, dynamic):
    contract.check_compiles(CASES[name], "eager", dynamic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3], ids=["no_tokens", "all_ignored"])
def test_nothing_to_predict_is_as_in_torch(rows, reduction, backend):
    x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    target = torch.full((rows,), -100)
    expected = F.cross_entropy(x @ weight.t(), target, reduction=reduction)
    with fastattn.backend.use(backend):
        got = fastattn.linear_cross_entropy(x, weight, target, reduction=reduction)
        grads = torch.autograd.grad(got.sum(), (x, weight))
    assert torch.equal(got.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    x, weight = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    with fastattn.backend.use(backend):
        got = fastattn.linear_cross_entropy(x, weight, torch.tensor([0, 0]), reduction="none")
        (grad,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(got, torch.tensor([0.0, 2e4]))
    assert torch.equal(grad, torch.tensor([[0.0], [-2.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_next_to_impossible(backend):
    """Its probability, e^-100 / 2, is no fp32 number that a logarithm could be taken of."""
    x, target = torch.tensor([[100.0, 100.0, 0.0]], requires_grad=True), torch.tensor([2])
    with fastattn.backend.use(backend):
        got = fastattn.linear_cross_entropy(x, torch.eye(3), target)
        (grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(got, torch.tensor(100.0).add(math.log(2.0)))
    torch.testing.assert_close(grad, torch.tensor([[0.5, 0.5, -1.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_and_right_prediction_costs_nothing_however_large_its_logit(backend):
    """Its log-sum-exp is the logit itself, to the last bit."""
    largest = torch.linspace(1.0, 9_999.0, 64)
    logits = torch.stack([largest, largest - 500.0, largest - 900.0], 1)
    with fastattn.backend.use(backend):
        losses = fastattn.cross_entropy(logits, torch.zeros(64, dtype=torch.int64), reduction="none")
    assert torch.equal(losses, torch.zeros(64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_predictions_are_the_first_of_the_largest_logits(softcap, backend):
    logits = torch.randint(-3, 4, (4, 5, 300)).float()
    logits[0, 0, :] = 1.0
    target = torch.full((4, 5), -100)
    target[1:] = 7
    expected = logits.numpy().argmax(-1)  # numpy promises the first
    with fastattn.backend.use(backend):
        loss, got = fastattn.cross_entropy(logits, target, softcap=softcap, return_predictions=True)
        fused, again = fastattn.linear_cross_entropy(
            logits, torch.eye(300), target, softcap=softcap, reduction="none", return_predictions=True
        )
    assert got.dtype == torch.int64
    assert torch.equal(got, torch.from_numpy(expected))
    assert torch.equal(got, again)
    torch.testing.assert_close(fused.sum() / 15, loss)


def logits_of(hidden, weight):
    return hidden @ weight.t()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_writes_the_gradient_over_the_logits(dtype, backend):
    hidden, weight = torch.randn(6, 4, dtype=dtype, requires_grad=True), torch.randn(40, 4, dtype=dtype)
    target = torch.tensor([0, 39, -100, 7, 7, 8])
    results = []
    with fastattn.backend.use(backend):
        for inplace in (False, True):
            logits = logits_of(hidden, weight)
            logits.retain_grad()
            values = logits.detach().clone()
            loss = fastattn.cross_entropy(logits, target, inplace=inplace)
            assert torch.equal(logits, values), "the forward changed the logits"
            loss.backward()
            results.append((loss.detach(), logits.grad, hidden.grad))
            hidden.grad = None
            assert torch.equal(logits, logits.grad if inplace else values)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_is_seen_by_autograd(backend):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(40, 4)
    with fastattn.backend.use(backend):
        logits = logits_of(hidden, weight)
        loss = fastattn.cross_entropy(logits, torch.arange(6), inplace=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with pytest.raises(ValueError, match="inplace must be False: input is a leaf"):
            fastattn.cross_entropy(torch.zeros(6, 4, requires_grad=True), torch.zeros(6).long(), inplace=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_is_right_and_one_is_enough(backend):
    """The stored gradients are scaled in their own memory, but only where nobody can ask for them again."""
    x, weight = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with fastattn.backend.use(backend):
        loss = fastattn.linear_cross_entropy(x, weight, torch.arange(7))
        first = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        second = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0))
    expected = torch.autograd.grad(3.0 * F.cross_entropy(x @ weight.t(), torch.arange(7)), (x, weight))
    for a, b, c in zip(kept, second, expected):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_gradients_of_fp32_weights_in_fp32(backend):
    """They are not rounded to bf16 on their way to the weights."""
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.arange(64) % 50
    with fastattn.backend.use(backend), torch.autocast("cpu", torch.bfloat16):
        loss = fastattn.linear_cross_entropy(x, weight, target)
        assert torch.equal(loss, fastattn.linear_cross_entropy(x.bfloat16(), weight, target))
    grads = torch.autograd.grad(loss, (x, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert not torch.equal(grads[1], grads[1].bfloat16().float())
    exact = torch.autograd.grad(F.cross_entropy(x.double() @ weight.double().t(), target), (x, weight))
    for g, e in zip(grads, exact):
        assert (g - e).abs().max() < 0.02 * e.abs().max()


X, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
ERRORS = {
    "reduction": (ValueError, r"reduction must be one of mean, sum, none, got 'max'", (X, W, T), {"reduction": "max"}),
    "smoothing": (ValueError, r"label_smoothing must be in \[0, 1\], got 2", (X, W, T), {"label_smoothing": 2.0}),
    "features": (ValueError, r"input must have shape \(..., 4\)", (torch.zeros(2, 3, 5), W, T), {}),
    "target_shape": (ValueError, r"target must have shape \(2, 3\)", (X, W, T[0]), {}),
    "target_dtype": (TypeError, r"target has dtype float32; allowed: int64", (X, W, T.float()), {}),
    "weight_dtype": (TypeError, r"weight has dtype float16; allowed: float32", (X, W.half(), T), {}),
    "bias": (ValueError, r"bias must have shape \(5,\)", (X, W, T), {"bias": torch.zeros(4)}),
    "no_class": (ValueError, r"weight must have at least 1 class", (X, W[:0], T), {}),
    "z_loss": (ValueError, r"z_loss must be at least 0 and finite, got -1", (X, W, T), {"z_loss": -1.0}),
    "softcap": (ValueError, r"softcap must be None or > 0 and finite, got 0", (X, W, T), {"softcap": 0.0}),
    "softcap_tensor": (TypeError, r"softcap must be a real number, got Tensor", (X, W, T), {"softcap": torch.ones(())}),
    "smoothing_text": (
        TypeError,
        r"label_smoothing must be a real number, got str",
        (X, W, T),
        {"label_smoothing": "0.1"},
    ),
    "z_loss_tensor": (TypeError, r"z_loss must be a real number, got Tensor", (X, T), {"z_loss": torch.ones(())}),
    "class_weight": (ValueError, r"class_weight must have shape \(5,\)", (X, W, T), {"class_weight": torch.ones(4)}),
    "class_weight_gradient": (
        ValueError,
        r"class_weight must not need a gradient",
        (X, W, T),
        {"class_weight": torch.ones(5, requires_grad=True)},
    ),
    "logits_class_weight": (TypeError, r"class_weight has dtype int64", (X, T), {"class_weight": torch.arange(4)}),
    "logits_target": (ValueError, r"target must have shape \(2, 3\)", (X, T.t()), {}),
    "logits_no_class": (ValueError, r"input must have shape \(..., classes\)", (X[..., :0], T), {}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, arguments, options = ERRORS[name]
    function = fastattn.linear_cross_entropy if len(arguments) == 3 else fastattn.cross_entropy
    with contract.no_launch(), pytest.raises(error, match=message):
        function(*arguments, **options)


@pytest.mark.parametrize(
    "value", [True, 1.0, "1", None, torch.tensor(1)], ids=["bool", "float", "text", "none", "tensor"]
)
def test_an_ignore_index_that_is_no_integer(value):
    with contract.no_launch(), pytest.raises(TypeError, match="ignore_index must be an integer, got"):
        fastattn.cross_entropy(X, T, ignore_index=value)
    with contract.no_launch(), pytest.raises(TypeError, match="ignore_index must be an integer, got"):
        fastattn.linear_cross_entropy(X, W, T, ignore_index=value)
    with pytest.raises(ValueError, match="ignore_index must be an int64, as the targets, got"):
        fastattn.cross_entropy(X, T, ignore_index=-(2**63) - 1)


@pytest.mark.parametrize("value", [-1, 5])
def test_a_target_out_of_range_is_an_error_on_the_cpu(value):
    with pytest.raises(ValueError, match=rf"target must be in \[0, 5\) or ignore_index = -100, got {value}"):
        fastattn.linear_cross_entropy(X, W, T + value)
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):
        fastattn.cross_entropy(X, T + value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_that_fp16_cannot_hold(backend):
    """Most tokens have one class and one feature: the sum of 200 gradients of 512 overflows, their mean does not."""
    x, weight = torch.randn(200, 8), (torch.randn(10, 8) / 400).requires_grad_()
    x[:, 0] = 512.0
    target = torch.where(torch.arange(200) % 10 == 0, 3, 0)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), weight)[0]
    half = weight.detach().half().requires_grad_()
    with fastattn.backend.use(backend):
        with torch.autocast("cpu", torch.float16):
            loss = fastattn.linear_cross_entropy(x, weight, target)
        of_fp32 = torch.autograd.grad(loss, weight)[0]
        of_fp16 = torch.autograd.grad(fastattn.linear_cross_entropy(x.half(), half, target), half)[0]
    torch.testing.assert_close(of_fp32, plain, rtol=2e-3, atol=1e-2)
    torch.testing.assert_close(of_fp16.float(), plain, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_is_not_rounded_to_bf16(backend):
    """1 / 120 in bf16 is off by 0.34 %, and so was the whole gradient."""
    x, weight = torch.randn(120, 16).bfloat16(), torch.randn(9, 16).bfloat16().requires_grad_()
    target, wide = torch.arange(120) % 9, weight.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(x.double() @ wide.t(), target), wide)[0]
    with fastattn.backend.use(backend):
        got = torch.autograd.grad(fastattn.linear_cross_entropy(x, weight, target), weight)[0].double()
    assert abs((got * truth).sum() / truth.square().sum() - 1.0) < 7e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_token_of_the_least_numbers_has_no_gradient(backend):
    """Their log-sum-exp overflows in base 2."""
    logits = torch.full((2, 4), torch.finfo(torch.float32).min)
    logits[0] = torch.randn(4)
    logits.requires_grad_()
    with fastattn.backend.use(backend):
        loss = fastattn.cross_entropy(logits, torch.tensor([1, -100]), z_loss=1e-3)
        gradient = torch.autograd.grad(loss, logits)[0]
    assert gradient[0].all()
    assert not gradient[1].any()


def test_class_weights_with_a_negative_sum():
    logits, weight, target = torch.randn(4, 3), torch.tensor([-2.0, 0.5, -0.25]), torch.tensor([0, 1, 2, 0])
    truth = F.cross_entropy(logits, target, weight)
    torch.testing.assert_close(fastattn.cross_entropy(logits, target, class_weight=weight), truth)
    fused = fastattn.linear_cross_entropy(logits, torch.eye(3), target, class_weight=weight)
    torch.testing.assert_close(fused, truth)


def test_a_view_of_a_parameter_is_not_overwritten():
    parameter = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="inplace"):
        fastattn.cross_entropy(parameter.view(-1, 5), torch.tensor([0, 1, 2]), inplace=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_traced(bias):
    """`torch.jit.trace` takes no list of bools, traces twice, the second time without gradients, and compares the graphs."""
    layer, x, y = fastattn.nn.LinearCrossEntropyLoss(8, 5, bias=bias), torch.randn(3, 8), torch.tensor([0, 4, 2])
    traced = torch.jit.trace(layer, (x, y))
    grads = []
    for call in (traced, layer):
        loss = call(x, y)
        grads.append((loss, *torch.autograd.grad(loss, list(layer.parameters()))))
    torch.testing.assert_close(*grads)


def test_meta_tensors():
    x, weight = torch.zeros(2, 8, device="meta"), torch.zeros(5, 8, device="meta")
    assert fastattn.linear_cross_entropy(x, weight, torch.zeros(2, dtype=torch.long, device="meta")).shape == ()


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_explain_speaks_of_chunks_where_there_are_some(name):
    logits, target, weight = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64), torch.zeros(10, 8)
    with fastattn.backend.use(name):
        assert "rows of logits" not in fastattn.explain(fastattn.cross_entropy, logits, target)
        assert "rows of logits at a time" in fastattn.explain(
            fastattn.linear_cross_entropy, logits[:, :8], weight, target
        )


FREE_PRODUCTS = """
import re, torch, fastattn
from fastattn.kernels.stand_in import stand_in
with stand_in("sm_90") as launches, fastattn.backend.use("triton"):
    fastattn.cross_entropy(torch.zeros(2, 9_000), torch.zeros(2, dtype=torch.long))
print(re.findall(r"mul\\S*f32.*0f[3B]FB8AA3B", launches[0].text("ptx")))
"""


def test_the_running_maximum_in_base_2_is_rounded_on_a_gpu_too(tmp_path):
    """A product with log₂e that compilers may fuse is exact in one place and rounded in another: among 128,256 classes, 31 blocks
    with the same maximum of 20 made the log-sum-exp wrong by 2e-5. The interpreter rounds every product."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FREE_PRODUCTS]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"
