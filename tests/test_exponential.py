"""exp without the underflow that is slow on a CPU."""

import math

import pytest
import torch

from fastattn.eager.exponential import exp, exp_


@pytest.mark.parametrize("far", [False, True])
def test_exp(far):
    x = torch.tensor([0.0, 1.0, -1.0, 80.0, -86.0, -88.0, -104.0, -1e4, -math.inf, math.nan]).repeat(40)
    truth, got = x.double().exp(), exp_(x.clone(), far)
    assert torch.equal(got.isnan(), truth.isnan())
    rest = ~truth.isnan()
    assert ((got - truth)[rest].abs() <= 1e-6 * truth[rest] + 2e-38).all()
    assert (got[x == -math.inf] == 0.0).all()
    if far:
        assert not ((got > 0.0) & (got < torch.finfo(torch.float32).tiny)).any(), "a denormal number"


def test_gradients_and_tangents_pass():
    x = torch.randn(5, requires_grad=True)
    exp(x, True).sum().backward()
    assert torch.equal(x.grad, x.detach().exp())
    value, tangent = torch.func.jvp(lambda y: exp(y, True), (x.detach(),), (torch.ones(5),))
    assert torch.equal(value, tangent)
