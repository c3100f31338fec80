"""Layer norm and RMS norm: the contract over every option, and the numbers that are hard."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastattn
from tests import contract, reference
from tests.compare import assert_close
from tests.contract import BACKENDS, DTYPES, Op


def norm(shape, dims=1, *, weight=True, bias=True, rms=False, offset=0.0, dropout_p=0.0, dtypes=None, **others):
    """A case: `others` are the shapes of residual, scale and shift."""
    eps = 1e-5
    normalized = shape[-dims:]
    shapes = {"input": shape}
    shapes |= {"weight": normalized} if weight else {}
    shapes |= {"bias": normalized} if bias else {}
    shapes |= others
    options = {"normalized_shape": normalized, "eps": eps, "weight_offset": offset, "dropout_p": dropout_p}
    seed = int(torch.randint(torch.iinfo(torch.int64).max, (1,), generator=torch.manual_seed(3)))
    keep = reference.philox_keep_rows(seed, math.prod(shape[:-dims]), math.prod(normalized), dropout_p)
    factors = keep.reshape(shape) / (1 - dropout_p)

    def ours(**tensors):
        if dropout_p:
            torch.manual_seed(3)
        return (fastattn.rms_norm if rms else fastattn.layer_norm)(**tensors, **options)

    def plain(input, weight=None, bias=None, residual=None, scale=None, shift=None):
        input = input * factors.to(input.dtype) if dropout_p else input
        hidden = input if residual is None else (input + residual).to(residual.dtype)
        gain = torch.ones(normalized) + offset if weight is None else weight + offset
        gain = gain.to(hidden.dtype) if weight is None or weight.dtype == input.dtype else gain
        if rms:
            y = F.rms_norm(hidden, normalized, gain, eps)
            y = y if bias is None else y + bias
        else:
            fused = bias is not None and bias.dtype == gain.dtype
            y = F.layer_norm(hidden, normalized, gain, bias if fused else None, eps)
            y = y if bias is None or fused else y + bias
        y = y if scale is None else y * (1 + scale)
        y = (y if shift is None else y + shift).to(input.dtype)
        return y if residual is None else (y, hidden)

    def definition(input, **tensors):
        dropped = input * factors if dropout_p else input
        return reference.normalise(dropped, **tensors, dims=dims, eps=eps, centered=not rms, weight_offset=offset)

    grows = ("input", "residual", *(name for name in others if others[name][0] == shape[0]))
    return Op(ours, definition, shapes, plain, dtypes or {}, grows=grows, left_to_compiler=not dropout_p)


CASES = {
    "narrow_rows_share_a_tile": norm((37, 24)),
    "one_column": norm((3, 1)),
    "one_row": norm((1, 130)),
    "rank_4": norm((2, 3, 2, 9)),
    "normalized_shape_2d": norm((5, 3, 4), 2),
    "normalized_shape_is_all": norm((6, 4), 2),
    "no_parameters": norm((4, 20), weight=False, bias=False),
    "weight_only": norm((4, 20), bias=False),
    "bias_only": norm((4, 20), weight=False),
    "fp32_parameters": norm((4, 20), dtypes={"weight": torch.float32, "bias": torch.float32}),
    "fp32_parameters_2d": norm((3, 5, 4), 2, dtypes={"weight": torch.float32, "bias": torch.float32}),
    "bias_in_another_dtype": norm((4, 20), dtypes={"bias": torch.float32}),
    "rms": norm((37, 24), bias=False, rms=True),
    "rms_2d_zero_centered_weight": norm((5, 3, 4), 2, bias=False, rms=True, offset=1.0),
    "residual": norm((3, 5, 24), residual=(3, 5, 24)),
    "rms_fp32_residual": norm(
        (3, 5, 24), bias=False, rms=True, dtypes={"residual": torch.float32}, residual=(3, 5, 24)
    ),
    "rms_fp32_residual_dropout": norm(
        (37, 24), bias=False, rms=True, dropout_p=0.3, dtypes={"residual": torch.float32}, residual=(37, 24)
    ),
    "residual_in_fp32": norm((3, 5, 24), residual=(3, 5, 24), dtypes={"residual": torch.float32}),
    "adaptive": norm((3, 5, 24), scale=(3, 1, 24), shift=(3, 1, 24)),
    "shift_per_token": norm((3, 5, 24), weight=False, shift=(3, 5, 24)),
    "scale_shared_by_all": norm((3, 5, 24), scale=(24,)),
    "everything": norm((3, 5, 24), offset=1.0, residual=(3, 5, 24), scale=(3, 1, 24), shift=(3, 1, 24)),
    "dropout": norm((3, 5, 23), dropout_p=0.4),
    "dropout_residual": norm((3, 5, 23), dropout_p=0.4, residual=(3, 5, 23)),
    "dropout_everything": norm(
        (3, 24),
        rms=True,
        offset=1.0,
        dropout_p=0.2,
        residual=(3, 24),
        scale=(3, 24),
        dtypes={"residual": torch.float32},
    ),
    "rms_everything": norm((3, 20), rms=True, residual=(3, 20), scale=(3, 20), shift=(3, 20)),
}
WIDE = {  # more than fits in registers: 8,192 columns
    "wide_by_one": norm((5, 8_193)),
    "wide": norm((3, 9_000), residual=(3, 9_000), dropout_p=0.1),
    "wide_rms_adaptive": norm((2, 2, 12_300), rms=True, bias=False, scale=(2, 1, 12_300)),
}
FEATURES = ["rank_4", "rms_2d_zero_centered_weight", "fp32_parameters", "no_parameters", "everything", "rms_everything"]
DROPOUT = ["dropout", "dropout_residual", "dropout_everything"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, backend):
    contract.check_values(CASES[name], backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_values_of_wide_rows(name, dtype, backend):
    contract.check_values(WIDE[name], backend, dtype)


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


PLAIN = ["rank_4", "no_parameters"]  # on the CPU these are one call of PyTorch's own op


@pytest.mark.parametrize(
    ("name", "backend"), [*product(PLAIN, ["triton"]), *product(["everything", "dropout_everything"], BACKENDS)]
)
def test_registration(name, backend):
    contract.check_registration(CASES[name], backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["rank_4", "everything"])
def test_compiles(name, dynamic):
    contract.check_compiles(CASES[name], "eager", dynamic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)], ids=str)
def test_empty(shape, dtype, backend):
    """PyTorch's batch norm, which sums 16-bit rows, divides by their number, and the process ends."""
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(shape[-1], dtype=dtype, requires_grad=True) for _ in range(2))
    with fastattn.backend.use(backend):
        y = fastattn.layer_norm(x, shape[-1], weight, bias)
        grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == shape
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, (x, weight, bias)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [768, 9_000], ids=["narrow", "wide"])
def test_large_mean_and_tiny_variance(columns, backend):
    """One-pass variance, E[x²] - E[x]², has no correct digit here."""
    x = 1e4 + torch.randint(-8, 9, (2, columns)) / 128
    with fastattn.backend.use(backend):
        got = fastattn.layer_norm(x, columns)
    (truth,) = reference.normalise(x.double())
    assert_close("output", got, truth, F.layer_norm(x, (columns,)))


def test_a_bias_without_a_weight_has_second_gradients():
    """PyTorch's layer norm raises there: "Expected a proper Tensor but got None"."""
    x, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 20), (20,)))

    def second(norm, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias)]
        first = torch.autograd.grad(norm(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves)

    def definition(x, bias):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() + bias

    ours = second(lambda x, bias: fastattn.layer_norm(x, 20, None, bias), torch.float32)
    for grad, expected in zip(ours, second(definition, torch.float64)):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_give_the_bias(backend):
    bias = torch.randn(96)
    with fastattn.backend.use(backend):
        got = fastattn.layer_norm(torch.tensor([0.0, -3.0, 1e4])[:, None].expand(3, 96), 96, None, bias)
    assert torch.equal(got, bias.expand(3, 96))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_give_the_shift(backend):
    """The sum of 100 times 3.3 is rounded, and what is left of the mean is not to be taken for a deviation."""
    scale, shift = torch.randn(2, 1, 1, 100)
    with fastattn.backend.use(backend):
        got = fastattn.layer_norm(torch.full((1, 4, 100), 3.3), 100, scale=scale, shift=shift, eps=1e-12)
    assert torch.equal(got, shift.expand(1, 4, 100))


@pytest.mark.parametrize(("backend", "rows"), [("eager", 20_000), ("triton", 4_096)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameter_gradients_add_in_fp32(dtype, backend, rows):
    """PyTorch's CPU kernel sums 20,000 ones to 256 in bf16 and to 2,048 in fp16."""
    x, weight, bias = torch.randn(rows, 4), torch.ones(4), torch.zeros(4, requires_grad=True)
    with fastattn.backend.use(backend):
        y = fastattn.layer_norm(x.to(dtype), 4, weight.to(dtype), bias)
        (grad,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(grad, torch.full((4,), float(rows)))


def test_parameters_that_are_not_contiguous():
    """A transposed or an expanded weight of several dimensions cannot be viewed as one row."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=torch.bfloat16)
    for weight in (torch.randn(4, 3).bfloat16().mT, torch.randn(3, 1).bfloat16().expand(3, 4)):
        found = []
        for gain in (weight, weight.contiguous()):
            weight_leaf, bias = gain.detach().requires_grad_(), torch.zeros(3, 4, dtype=x.dtype, requires_grad=True)
            out = fastattn.layer_norm(x, (3, 4), weight_leaf, bias)
            found.append((out, *torch.autograd.grad(out.sin().sum(), (weight_leaf, bias))))
        assert all(torch.equal(ours, expected) for ours, expected in zip(*found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_dropout(backend):
    x = torch.randn(6, 40, requires_grad=True)

    def layer(x):
        return fastattn.layer_norm(x, 40, dropout_p=0.5, residual=x)[0]

    with fastattn.backend.use(backend):
        torch.manual_seed(1)
        (plain,) = torch.autograd.grad(layer(x).sin().sum(), x)
        torch.manual_seed(1)
        (replayed,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sin().sum(), x)
    assert torch.equal(plain, replayed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_stream_may_have_its_own_dtype(backend):
    x, residual = torch.randn(4, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    with fastattn.backend.use(backend):
        y, hidden = fastattn.layer_norm(x, 32, residual=residual, residual_dtype=torch.float32)
    assert (y.dtype, hidden.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(hidden, x.float() + residual.float())


def test_rms_norm_has_torchs_default_eps():
    x = torch.full((2, 4), 1e-4)
    assert torch.allclose(fastattn.rms_norm(x, 4), F.rms_norm(x, (4,)), rtol=1e-6)


def test_autocast_follows_torch():
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.layer_norm(x, 8, weight).dtype == F.layer_norm(x, (8,), weight).dtype == torch.bfloat16


X = torch.zeros(2, 3, 4)
ERRORS = {
    "not_a_tensor": (TypeError, r"input must be a torch.Tensor, got list", dict(input=[1.0], normalized_shape=1)),
    "integers": (TypeError, r"input has dtype int64; allowed: float32", dict(input=X.long(), normalized_shape=4)),
    "double": (
        TypeError,
        r"weight has dtype float64",
        dict(input=X, normalized_shape=4, weight=torch.ones(4).double()),
    ),
    "no_dimension": (
        ValueError,
        r"normalized_shape must have at least one dimension",
        dict(input=X, normalized_shape=()),
    ),
    "float_entry": (
        TypeError,
        r"normalized_shape must be an integer, got float",
        dict(input=X, normalized_shape=(3, 4.0)),
    ),
    "negative_entry": (
        ValueError,
        r"normalized_shape must be at least 0, got -4",
        dict(input=X, normalized_shape=(3, -4)),
    ),
    "other_width": (ValueError, r"got \(5,\) for input \(2, 3, 4\)", dict(input=X, normalized_shape=5)),
    "other_weight": (
        ValueError,
        r"weight must have shape \(3, 4\) \(normalized_shape\), got \(4,\)",
        dict(input=X, normalized_shape=(3, 4), weight=torch.ones(4)),
    ),
    "other_residual": (
        ValueError,
        r"residual must have shape \(2, 3, 4\)",
        dict(input=X, normalized_shape=4, residual=X[0]),
    ),
    "no_broadcast": (
        ValueError,
        r"scale must broadcast to input \(2, 3, 4\), got \(3, 1, 4\)",
        dict(input=X, normalized_shape=4, scale=torch.ones(3, 1, 4)),
    ),
    "device": (
        ValueError,
        r"bias is on meta but input is on cpu",
        dict(input=X, normalized_shape=4, bias=torch.ones(4, device="meta")),
    ),
    "residual_dtype": (
        ValueError,
        r"residual_dtype .* needs residual",
        dict(input=X, normalized_shape=4, residual_dtype=torch.float32),
    ),
    "dropout": (
        ValueError,
        r"dropout_p must be in \[0, 1\), got 1.0",
        dict(input=X, normalized_shape=4, dropout_p=1.0),
    ),
    "eps": (ValueError, r"eps must be at least 0, got -1", dict(input=X, normalized_shape=4, eps=-1.0)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, arguments = ERRORS[name]
    with contract.no_launch(), pytest.raises(error, match=message):
        fastattn.layer_norm(**arguments)


def test_second_gradient_of_16_bit_rows():
    """The short way on the CPU has a backward of its own, which can be differentiated as well."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(torch.bfloat16) for shape in ((5, 16), (16,), (16,))]

    def second(norm, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(norm(leaves[0], (16,), *leaves[1:]).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    truth = second(F.layer_norm, [t.double() for t in tensors])
    plain = second(lambda x, shape, *p: F.layer_norm(x.float(), shape, *(t.float() for t in p)).to(x.dtype), tensors)
    for i, triple in enumerate(zip(second(fastattn.layer_norm, tensors), truth, plain)):
        assert_close(f"second gradient {i}", *triple)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"weight": [1.0, 2.0]}, TypeError, "weight"),
        ({"eps": None}, TypeError, "eps must be a real number, got NoneType"),
        ({"eps": torch.tensor(1e-5)}, TypeError, "eps must be a real number, got Tensor"),
        ({"weight": torch.ones(4), "weight_offset": torch.zeros(4)}, TypeError, "weight_offset must be a real number"),
        ({"weight_offset": 1.0}, ValueError, r"weight_offset needs weight, got 1.0 with weight None"),
        ({"normalized_shape": 4.0}, TypeError, "normalized_shape"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, error, named):
    with pytest.raises(error, match=named):
        fastattn.layer_norm(torch.zeros(2, 4), **({"normalized_shape": 4} | arguments))


@pytest.mark.parametrize("kind", [np.float32, np.float64, int])
def test_numbers_of_other_kinds_are_numbers(kind):
    x, weight = torch.randn(3, 4), torch.randn(4)
    plain = fastattn.rms_norm(x, 4, weight, 1.0, weight_offset=2.0)
    assert torch.equal(fastattn.rms_norm(x, 4, weight, kind(1), weight_offset=kind(2)), plain)
