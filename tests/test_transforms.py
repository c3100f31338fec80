"""Derivatives through transforms that meet a compiler, and gradients in batches: right, or an error, never silently zero."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig
from tests.contract import BACKENDS

TARGET = torch.tensor([0, 3, -100])
CU_SEQLENS = torch.tensor([0, 2, 3], dtype=torch.int32)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# (a compiled function may not draw numbers from a generator of its own)
GAIN, BIAS, INWARD, OUTWARD, KEYS = random(4), random(4), random(5, 4), random(4, 5), random(1, 1, 4, 4)
COS, SIN = fastattn.rotary_tables(2, 8)


def attention(**options):
    return lambda x: fastattn.attention(x[None, None], KEYS, KEYS, **options)


OPS = {
    "layer_norm": lambda x: fastattn.layer_norm(x, 4, GAIN, BIAS),
    "layer_norm residual dropout": lambda x: fastattn.layer_norm(x, 4, residual=x, dropout_p=0.5)[0],
    "rms_norm": lambda x: fastattn.rms_norm(x, 4),
    "linear": lambda x: fastattn.linear(x, INWARD, activation="gelu"),
    "feed_forward": lambda x: fastattn.feed_forward(x, INWARD, None, OUTWARD, None, activation="silu"),
    "rotary": lambda x: fastattn.rotary(x[None, None], None, COS, SIN)[0],
    "cross_entropy": lambda x: fastattn.cross_entropy(x, TARGET, reduction="none"),
    "linear_cross_entropy none": lambda x: fastattn.linear_cross_entropy(x, INWARD, TARGET, reduction="none"),
    "linear_cross_entropy mean": lambda x: fastattn.linear_cross_entropy(x, INWARD, TARGET),
    "attention": attention(causal=True),
    "attention window": attention(window=(1, 0)),
    "attention softcap": attention(softcap=2.0),
    "varlen_attention": lambda x: fastattn.varlen_attention(*[x[:, None]] * 3, CU_SEQLENS, CU_SEQLENS, 2, 2),
}


def seeded(function, *arguments):
    torch.manual_seed(0)
    return function(*arguments)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastattn.backend.use(request.param):
        yield


@pytest.mark.filterwarnings("ignore:.*vmap:UserWarning")
@pytest.mark.parametrize("name", OPS)
def test_gradients_in_batches(name, backend):
    """`vectorize=True` takes rows of a Jacobian through the graph at once, as batched tensors."""
    x, f = random(3, 4), OPS[name]
    functional = torch.autograd.functional
    for derivative, function in ((functional.jacobian, f), (functional.hessian, lambda x: f(x).square().sum())):
        one_by_one = seeded(derivative, function, x)
        torch.testing.assert_close(seeded(partial(derivative, vectorize=True), function, x), one_by_one)
        assert one_by_one.any()


# without dropout, which draws a seed, and without packing, whose plain definition has to read the offsets (and says so)
@pytest.mark.parametrize("name", [name for name in OPS if "dropout" not in name and "varlen" not in name])
def test_forward_mode_in_a_compiled_function(name, backend):
    x, v, f = random(3, 4), random(3, 4) + 1.0, OPS[name]
    truth = torch.func.jvp(f, (x,), (v,))[1]
    assert truth.any()
    of_jvp = torch.compile(lambda x, v: torch.func.jvp(f, (x,), (v,))[1], backend="eager", fullgraph=True)
    torch.testing.assert_close(of_jvp(x, v), truth)
    compiled = torch.compile(f, backend="eager")
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, v))).tangent, truth)
    gradient = torch.func.grad(lambda x: f(x).square().sum())
    torch.testing.assert_close(torch.compile(gradient, backend="eager")(x), gradient(x))
    torch.compiler.reset()


@pytest.mark.parametrize("name", OPS)
def test_a_compiled_backward(name):
    """Compiled autograd traces what a gradient does in Python; it is one graph, and nothing of it is left behind."""
    x, f = random(3, 4).requires_grad_(), OPS[name]
    expected = seeded(lambda x: torch.autograd.grad(f(x).sum(), x), x)
    for _ in range(2):
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            seeded(lambda x: f(x).sum().backward(), x)
        torch.testing.assert_close(x.grad, expected[0])
        x.grad = None
    torch.compiler.reset()


def test_a_graph_without_tangents_refuses_them(backend):
    """The compiler keeps no guard on PyTorch's dual levels: what it traced without them holds the op itself."""
    compiled = torch.compile(OPS["feed_forward"], backend="eager")
    compiled(random(3, 4))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        compiled(forward_ad.make_dual(random(3, 4), random(3, 4)))
    torch.compiler.reset()


def test_a_tangent_of_the_incoming_gradient_is_not_lost(backend):
    x = random(3, 4).requires_grad_()
    y = fastattn.attention(*[x[None, None]] * 3, softcap=2.0)

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    tangent = random(*y.shape)
    with forward_ad.dual_level():
        try:
            got = forward_ad.unpack_dual(gradient(forward_ad.make_dual(torch.ones_like(y), tangent))).tangent
        except NotImplementedError:
            return
    torch.testing.assert_close(got, gradient(tangent))


TOKENS = torch.tensor([[3, 1, 4, 1], [5, 2, 6, 5]])
MODELS = {
    "gpt": (GPT(GPTConfig(vocab_size=8, context_length=4, num_layers=1, num_heads=2, d_model=8)), (TOKENS, TOKENS)),
    "classifier": (
        Classifier(ClassifierConfig(vocab_size=8, num_classes=3, num_layers=1, num_heads=2, d_model=8)).eval(),
        (TOKENS, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool(), torch.tensor([0, 2])),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_models_samples(name):
    """The checks of tokens and targets cannot look at the numbers of a batched tensor."""
    model, arguments = MODELS[name]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, *sample):
        return torch.func.functional_call(model, parameters, tuple(t[None] for t in sample))[1]

    gradients = torch.vmap(torch.func.grad(loss), (None, *[0] * len(arguments)))(parameters, *arguments)
    for i in range(2):
        model.zero_grad()
        model(*(t[i : i + 1] for t in arguments))[1].backward()
        for parameter, p in model.named_parameters():
            torch.testing.assert_close(gradients[parameter][i], p.grad)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_tensors_without_numbers(name):
    model, arguments = MODELS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(*map(mode.from_tensor, arguments))[1].shape == ()
    with torch.no_grad():
        traced = make_fx(lambda *a: model(*a)[1], tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
        torch.testing.assert_close(traced(*arguments), model(*arguments)[1])


def test_packed_sequences_and_block_masks_without_numbers():
    """A block mask keeps its meeting with a window for later calls: not one that was made of fake tensors."""
    mask = fastattn.BlockMask.document(torch.tensor([[0, 0, 1, 1]]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, cu_seqlens = mode.from_tensor(random(4, 1, 8)), mode.from_tensor(CU_SEQLENS)
        assert fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 2, 2).shape == (4, 1, 8)
        x = mode.from_tensor(KEYS)
        assert fastattn.attention(x, x, x, mask=mask, window=(0, 0)).shape == KEYS.shape
    torch.testing.assert_close(fastattn.attention(KEYS, KEYS, KEYS, mask=mask, window=(0, 0)), KEYS)
