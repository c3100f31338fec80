"""16-bit inputs, fp32 inside: statistics and sums over many rows keep the digits that the inputs have.

Parameters are fp32 here, as under autocast, so that a sum rounded to 16 bits on the way cannot hide in its result.
"""

import pytest
import torch

import fastattn
from fastattn.eager import normalization, products

BACKENDS = ["eager", "triton"]
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_are_kept_in_fp32(dtype, backend):
    """The mean of 100s and 101s lies between two bf16 numbers; the backward must not read a rounded one."""
    torch.manual_seed(0)
    x = 100 + torch.randint(0, 2, (6, 48)).to(dtype)
    weight = torch.ones(48, requires_grad=True)
    grad = torch.randn(6, 48).to(dtype)
    with fastattn.backend.use(backend):
        (got,) = torch.autograd.grad(fastattn.layer_norm(x, 48, weight), weight, grad)
    centred = x.double() - x.double().mean(1, keepdim=True)
    normalised = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(got.double(), (grad.double() * normalised).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_sums_over_several_blocks_of_rows(with_bias, dtype, monkeypatch):
    """fp32 parameters' gradients on the CPU, whose rows are made fp32 a block at a time; the last block is smaller."""
    monkeypatch.setattr(normalization, "SUMMED_NUMBERS", 40 * 24)
    x, grad = torch.randn(2, 75, 24).to(dtype), torch.randn(2, 75, 24).to(dtype)
    parameters = [torch.ones(24, requires_grad=True) for _ in range(1 + with_bias)]
    with fastattn.backend.use("eager"):
        got = torch.autograd.grad(fastattn.layer_norm(x, 24, *parameters), parameters, grad)
    x_hat = torch.nn.functional.layer_norm(x.double(), (24,))
    for sums, summands in zip(got, (grad.double() * x_hat, grad.double())):
        torch.testing.assert_close(sums.double(), summands.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("columns", [4, 8_200], ids=["narrow", "wide"])
def test_norm_parameter_gradients_add_in_fp32(columns, dtype, backend):
    """1 + eps is a number of the dtype, but 3 or 35 times as much is not."""
    rows, step = 35, 1 + torch.finfo(dtype).eps
    x, bias = torch.zeros(rows, columns, dtype=dtype), torch.zeros(columns, requires_grad=True)
    with fastattn.backend.use(backend):
        y = fastattn.layer_norm(x, columns, None, bias)
        (got,) = torch.autograd.grad(y, bias, torch.full_like(y, step))
    assert torch.equal(got, torch.full((columns,), rows * step))


@pytest.mark.parametrize("emulates", [False, True], ids=["16_bit_products", "fp32_products"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linear_parameter_gradients_add_in_fp32(dtype, backend, emulates, monkeypatch):
    """A running sum of 515 ones stops at 256 in bf16, one of 2,051 at 2,048 in fp16."""
    monkeypatch.setattr(products, "_emulates", lambda dtype: emulates and dtype in HALVES)
    rows = 515 if dtype == torch.bfloat16 else 2_051
    x = torch.ones(rows, 16, dtype=dtype)
    weight = torch.zeros(16, 16, dtype=dtype, requires_grad=True)
    bias = torch.zeros(16, dtype=dtype, requires_grad=True)
    with fastattn.backend.use(backend):
        y = fastattn.linear(x, weight, bias)
        grads = torch.autograd.grad(y, (weight, bias), torch.ones_like(y))
        bias2 = bias.detach().clone().requires_grad_()
        y = fastattn.feed_forward(x, weight, bias, torch.eye(16, dtype=dtype), bias2, activation="identity")
        grads += torch.autograd.grad(y, (weight, bias, bias2), torch.ones_like(y))
    for grad in grads:
        assert torch.equal(grad, torch.full_like(grad, rows))
