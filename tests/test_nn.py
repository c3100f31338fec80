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


@pytest.mark.parametrize("kind", [fastattn.nn.LayerNorm, fastattn.nn.RMSNorm])
@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((), ValueError, "must have at least one dimension"),
        ((4, -1), ValueError, "must be at least 0, got -1"),
        (4.0, TypeError, "must be an integer, got float"),
        ((4.0,), TypeError, "must be an integer, got float"),
        (True, TypeError, "must be an integer, got bool"),
        ("4", TypeError, "must be an integer, got str"),
    ],
)
def test_norms_of_no_shape(kind, shape, error, message):
    with pytest.raises(error, match=f"normalized_shape {message}"):
        kind(shape, elementwise_affine=False)


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
    for arguments, message in (((8, 2.5), "d_hidden must be an integer, got float"), (("8", 4), "d_model must be")):
        with pytest.raises(TypeError, match=message):
            fastattn.nn.GatedFeedForward(*arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastattn.nn.LayerNorm(8),
        lambda: fastattn.nn.RMSNorm(8),
        lambda: fastattn.nn.FeedForward(8),
        lambda: fastattn.nn.GatedFeedForward(8),
        lambda: fastattn.nn.MultiheadAttention(8, 2, add_bias_kv=True),
        lambda: fastattn.nn.Transformer(8, 2, 1, 1, 8),
        lambda: fastattn.nn.LinearCrossEntropyLoss(8, 5),
        lambda: fastattn.nn.RotaryEmbedding(8),
    ],
)
def test_modules_follow_the_device_context(make):
    with torch.device("meta"):
        module = make()
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}


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


LOSS_OPTIONS = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}


@pytest.mark.parametrize("shape", [(6, 7), (2, 7, 3), (7,)], ids=str)
def test_cross_entropy_is_torchs(shape):
    weight = torch.rand(7)
    ours = fastattn.nn.CrossEntropyLoss(weight, **LOSS_OPTIONS)
    theirs = nn.CrossEntropyLoss(weight, **LOSS_OPTIONS)
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    logits = torch.randn(shape)
    target = torch.randint(7, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    soft = torch.softmax(torch.randn(shape), min(1, len(shape) - 1))
    torch.testing.assert_close(
        fastattn.nn.CrossEntropyLoss(weight)(logits, soft), nn.CrossEntropyLoss(weight)(logits, soft)
    )
    with pytest.raises(ValueError, match="target must be int64 class indices with z_loss"):
        fastattn.nn.CrossEntropyLoss(z_loss=0.1)(logits, soft)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_is_a_linear_layer_and_a_loss(bias):
    weight = torch.rand(7)
    torch.manual_seed(0)
    module = fastattn.nn.LinearCrossEntropyLoss(4, 7, bias=bias, weight=weight, **LOSS_OPTIONS, z_loss=0.2, softcap=5.0)
    torch.manual_seed(0)
    linear = nn.Linear(4, 7, bias=bias)
    expected = {"weight": weight} | {f"linear.{name}": value for name, value in linear.state_dict().items()}
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    x, target = torch.randn(2, 5, 4), torch.randint(7, (2, 5))
    same = fastattn.nn.CrossEntropyLoss(weight, **LOSS_OPTIONS, z_loss=0.2, softcap=5.0)
    torch.testing.assert_close(module(x, target), same(linear(x).movedim(-1, 1), target))
    for options, message in (
        ({"reduction": "max"}, "reduction must be"),
        ({"weight": torch.ones(3)}, "weight must have"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.nn.LinearCrossEntropyLoss(4, 7, **options)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has none")
def test_linear_cross_entropy_is_torchs():
    theirs = nn.LinearCrossEntropyLoss(4, 7, bias=True, weight=torch.rand(7), label_smoothing=0.1)
    ours = fastattn.nn.LinearCrossEntropyLoss(4, 7, bias=True, weight=torch.ones(7), label_smoothing=0.1)
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(5, 4), torch.randint(7, (5,))
    torch.testing.assert_close(ours(x, target), theirs(x, target))


def test_linear_cross_entropy_calls_a_layer_that_is_more_than_its_weight():
    module, x, target = fastattn.nn.LinearCrossEntropyLoss(4, 7), torch.randn(2, 5, 4), torch.randint(7, (2, 5))
    module.linear.register_forward_hook(lambda layer, inputs, logits: 2.0 * logits)  # as adapters and wrappers act
    expected = nn.functional.cross_entropy(2.0 * (x @ module.linear.weight.t()).flatten(0, 1), target.flatten())
    torch.testing.assert_close(module(x, target), expected)


CHANGED = {
    "attention": lambda x: fastattn.nn.MultiheadAttention(12, 2)(x, x, x)[0],
    "encoder": lambda x: fastattn.nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0)(x),
    "feed_forward": lambda x: fastattn.nn.FeedForward(12)(x),
    "norm": lambda x: fastattn.layer_norm(x, (12,), residual=x)[0],
    "rotary": lambda x: fastattn.nn.RotaryEmbedding(4)(x.unflatten(2, (3, 4)).transpose(1, 2))[0],
    "losses": lambda x: fastattn.nn.LinearCrossEntropyLoss(12, 7, reduction="none")(x, x.argmax(2) % 7),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGED)
def test_outputs_can_be_changed_in_place(name, backend):
    """As torch's can: an output that autograd knows as a view, or that the backward reads again, cannot."""
    x = torch.randn(2, 5, 12, requires_grad=True)
    gradients = []
    for change in (torch.Tensor.mul_, torch.mul):
        torch.manual_seed(0)
        with fastattn.backend.use(backend):
            change(CHANGED[name](x), torch.arange(5.0).view(5, *(1,) * (name != "losses"))).square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*gradients)
