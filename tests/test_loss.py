"""Linear projection and cross entropy in one: the contract, chunks, memory, and what torch's cross entropy does."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.eager import loss as eager
from fastattn.kernels import loss as kernels
from tests import contract, reference
from tests.contract import BACKENDS, DTYPES, Op


def target_of(input, classes, ignore_index=-100):
    """Different classes, the first and the last among them, and every fifth token ignored."""
    index = torch.arange(input[..., 0].numel())
    target = (index * (classes - 1)) % classes
    return torch.where(index % 5 == 3, ignore_index, target).view(input.shape[:-1])


def loss(rows=(7,), features=12, classes=33, bias=True, **options):
    shapes = {"input": (*rows, features), "weight": (classes, features)} | ({"bias": (classes,)} if bias else {})
    ignore_index = options.get("ignore_index", -100)

    def ours(input, weight, bias=None):
        target = target_of(input, classes, ignore_index)
        return fastattn.linear_cross_entropy(input, weight, target, bias=bias, **options)

    def definition(input, weight, bias=None):
        target = target_of(input, classes, ignore_index)
        return reference.linear_cross_entropy(input, weight, target, bias=bias, **options)

    def plain(input, weight, bias=None):
        logits = F.linear(input, weight, bias).flatten(0, -2).float()  # torch's own sum overflows in fp16
        result = F.cross_entropy(logits, target_of(input, classes, ignore_index).flatten(), **options)
        return result.view(input.shape[:-1]) if options.get("reduction") == "none" else result

    return Op(ours, definition, shapes, plain, factors={"weight": 0.5})


CASES = {
    "mean": loss(),
    "sum_without_bias": loss(bias=False, reduction="sum"),
    "none": loss(reduction="none"),
    "rank_3_smoothing": loss((2, 3), label_smoothing=0.1),
    "none_smoothing_other_ignore_index": loss((2, 4), reduction="none", label_smoothing=0.3, ignore_index=5),
    "one_class": loss(classes=1),
    "several_chunks_and_blocks": loss((40,), classes=300, label_smoothing=0.1),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Sixteen rows at a time, so that a test of forty rows has three chunks, the last one ragged."""
    for module in (eager, kernels):
        monkeypatch.setattr(module, "chunk_rows", lambda classes: 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, backend):
    contract.check_values(CASES[name], backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mean", "none", "rank_3_smoothing"])
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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["mean", "none"])
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


def test_never_holds_the_logits():
    """The largest tensor of a call over 2,000 × 3,000 logits."""
    x, weight = torch.randn(2_000, 8, requires_grad=True), torch.randn(3_000, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            made = [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            largest = max([largest, *made])
            return result

    with Watch():
        fastattn.linear_cross_entropy(x, weight, torch.arange(2_000)).backward()
    assert largest <= 16 * 3_000


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
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, arguments, options = ERRORS[name]
    with contract.no_launch(), pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("value", [-1, 5])
def test_a_target_out_of_range_is_an_error_on_the_cpu(value):
    with pytest.raises(ValueError, match=rf"target must be in \[0, 5\) or ignore_index = -100, got {value}"):
        fastattn.linear_cross_entropy(X, W, T + value)
