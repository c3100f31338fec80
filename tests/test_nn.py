"""Modules: the parameters, initialisation and results of torch's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn.nn
from tests.compare import assert_close
from tests.contract import BACKENDS

NORMS = {
    "layer_norm": (fastattn.nn.LayerNorm, nn.LayerNorm, (12,), {}),
    "layer_norm_2d": (fastattn.nn.LayerNorm, nn.LayerNorm, ((4, 3),), {"eps": 1e-3}),
    "layer_norm_without_bias": (fastattn.nn.LayerNorm, nn.LayerNorm, (12,), {"bias": False}),
    "layer_norm_without_parameters": (fastattn.nn.LayerNorm, nn.LayerNorm, (12,), {"elementwise_affine": False}),
    "rms_norm": (fastattn.nn.RMSNorm, nn.RMSNorm, (12,), {}),
    "rms_norm_2d": (fastattn.nn.RMSNorm, nn.RMSNorm, ((4, 3), 1e-3), {}),
    "rms_norm_without_parameters": (fastattn.nn.RMSNorm, nn.RMSNorm, (12,), {"elementwise_affine": False}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_torchs(name, backend):
    ours_class, torch_class, arguments, options = NORMS[name]
    ours, theirs = ours_class(*arguments, **options), torch_class(*arguments, **options)
    assert isinstance(ours, torch_class)
    assert repr(ours) == repr(theirs)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 4, 3) if "2d" in name else torch.randn(5, 12)
    with fastattn.backend.use(backend):
        got = ours(x)
    assert_close("output", got, copy.deepcopy(theirs).double()(x.double()), theirs(x))
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_feed_forward_is_two_linear_layers(gated):
    make = fastattn.nn.GatedFeedForward if gated else fastattn.nn.FeedForward
    torch.manual_seed(0)
    module = make(12, 20, activation="silu")
    torch.manual_seed(0)
    linear1, linear2 = nn.Linear(12, 20), nn.Linear(20, 12)
    gate = nn.Linear(12, 20) if gated else None
    layers = {"linear1": linear1, "linear2": linear2} | ({"gate": gate} if gated else {})
    expected = {f"{name}.{p}": v for name, layer in layers.items() for p, v in layer.state_dict().items()}
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[name]) for name, v in module.state_dict().items())
    x = torch.randn(2, 5, 12)
    hidden = nn.functional.silu(gate(x)) * linear1(x) if gated else nn.functional.silu(linear1(x))
    assert torch.allclose(module(x), linear2(hidden), atol=1e-6)
    for p in pickle.loads(pickle.dumps(module)).parameters():
        assert p.requires_grad


def test_feed_forward_options():
    module = fastattn.nn.FeedForward(8, bias=False, dtype=torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "linear1.weight": (32, 8),
        "linear2.weight": (8, 32),
    }
    assert module(torch.zeros(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for options, message in (
        ({"activation": "swish"}, "activation must be one of"),
        ({"recompute": "some"}, "recompute must be one of"),
        ({"d_hidden": 0}, "d_hidden must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.nn.FeedForward(8, **options)


@pytest.mark.parametrize("module", [fastattn.nn.LayerNorm(16), fastattn.nn.FeedForward(16, 24)], ids=["norm", "ffn"])
def test_modules_train_alike_on_both_backends(module):
    losses = {}
    for backend in BACKENDS:
        model = copy.deepcopy(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        with fastattn.backend.use(backend):
            for _ in range(4):
                x = torch.randn(8, 16, generator=generator)
                loss = (model(x) - x.flip(1)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses[backend] = loss.detach()
    assert torch.allclose(losses["eager"], losses["triton"], rtol=1e-5)
