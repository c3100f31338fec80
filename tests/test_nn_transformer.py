"""Transformer layers and stacks against torch's with the same weights: what torch documents, as a table."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastattn
from tests.compare import assert_close

B, L, S, E, H, FF = 3, 6, 8, 16, 4, 20
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
CROSS = torch.zeros(L, S, dtype=torch.bool).index_fill_(1, torch.tensor([0, 5]), True)
PADDED = torch.arange(L) >= torch.tensor([[6], [4], [2]])  # at the right, as the nested-tensor path wants it
PADDED_LEFT = PADDED.flip(1)
MEMORY_PADDED = torch.arange(S) >= torch.tensor([[8], [3], [5]])

PER_HEAD = torch.rand(B * H, L, L, generator=torch.Generator().manual_seed(0)) > 0.6
PER_HEAD &= ~torch.eye(L, dtype=torch.bool)  # a row that sees nothing is NaN in torch

OPTIONS = {
    "default": {},
    "batch_first": {"batch_first": True},
    "norm_first": {"norm_first": True, "batch_first": True},
    "gelu": {"activation": "gelu", "layer_norm_eps": 1e-3, "batch_first": True},
    "callable": {"activation": torch.tanh},
    "module": {"activation": nn.GELU("tanh"), "norm_first": True},
    "no_bias": {"bias": False, "batch_first": True},
}
ENCODER_CALLS = {
    "plain": {},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal_bool": {"mask": CAUSAL.bool()},
    "padding": {"src_key_padding_mask": PADDED},
    "padding_left": {"src_key_padding_mask": PADDED_LEFT},
    "mask_and_padding": {"mask": CAUSAL.bool(), "src_key_padding_mask": PADDED},
    "mask_per_head": {"mask": PER_HEAD},
    "float_padding": {"src_key_padding_mask": torch.randn(B, L)},
}
DECODER_CALLS = {
    "plain": {},
    "causal": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "padding": {"tgt_key_padding_mask": PADDED, "memory_key_padding_mask": MEMORY_PADDED},
    "memory_mask": {"memory_mask": CROSS, "tgt_mask": CAUSAL.bool()},
    "all": {
        "tgt_mask": CAUSAL.bool(),
        "tgt_key_padding_mask": PADDED,
        "memory_mask": CROSS,
        "memory_key_padding_mask": MEMORY_PADDED,
    },
}
TRANSFORMER_CALLS = {
    "plain": {},
    "causal": {"tgt_mask": CAUSAL, "src_mask": nn.Transformer.generate_square_subsequent_mask(S)},
    "padding": {
        "src_key_padding_mask": MEMORY_PADDED,
        "memory_key_padding_mask": MEMORY_PADDED,
        "tgt_key_padding_mask": PADDED,
    },
}
MODES = ["train", "eval", "no_grad"]


@pytest.fixture(autouse=True)
def _fast_path():
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def stack(library, options, kind):
    """One of the modules, randomly initialised from one seed; no dropout."""
    torch.manual_seed(0)
    options = {"dim_feedforward": FF, "dropout": 0.0, **options}
    if kind == "transformer":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that nested tensors will not be used
            return library.Transformer(E, H, 2, 2, **options)
    layer_class = library.TransformerEncoderLayer if "encoder" in kind else library.TransformerDecoderLayer
    layer = layer_class(E, H, **options)
    if "layer" in kind:
        return layer
    norm = library.LayerNorm(E)
    stack_class = library.TransformerEncoder if "encoder" in kind else library.TransformerDecoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that nested tensors will not be used
        return stack_class(layer, 2, norm)


def compare(kind, options, lengths, call, mode, rows=None):
    """Ours against torch's in fp64, within the error of torch's in fp32: the output's `rows` and every gradient."""
    theirs, ours = stack(nn, options, kind), stack(fastattn.nn, options, kind)
    for parameter, own in zip(theirs.parameters(), ours.parameters()):
        nn.init.normal_(parameter, std=0.3)
        own.data.copy_(parameter.data)
    padding = call.get("src_key_padding_mask")  # torch's fast path, in C++, takes floats for bools and gives NaN
    torch.backends.mha.set_fastpath_enabled(padding is None or padding.dtype == torch.bool)
    results = []
    for module, dtype in ((copy.deepcopy(theirs), torch.float64), (theirs, torch.float32), (ours, torch.float32)):
        torch.manual_seed(1)
        leaves = [torch.randn(B, length, E).to(dtype).requires_grad_() for length in lengths]
        module.to(dtype).train(mode == "train")
        arguments = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
        inputs = leaves if options.get("batch_first") else [x.transpose(0, 1) for x in leaves]
        with torch.set_grad_enabled(mode != "no_grad"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about nested tensors and masks of two kinds
            out = module(*inputs, **arguments)
        out = out if options.get("batch_first") else out.transpose(0, 1)
        out = out if rows is None else out[rows]
        grads = [] if mode == "no_grad" else torch.autograd.grad(out.sin().sum(), [*leaves, *module.parameters()])
        results.append([out, *grads])
    for index, (truth, plain, got) in enumerate(zip(*results)):
        assert_close(f"gradient {index}" if index else "output", got, truth, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ENCODER_CALLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_encoder_layer(name, call, mode):
    arguments = {"src_mask" if key == "mask" else key: value for key, value in ENCODER_CALLS[call].items()}
    compare("encoder_layer", OPTIONS[name], (L,), arguments, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ENCODER_CALLS)
@pytest.mark.parametrize("name", ["default", "batch_first", "norm_first"])
def test_encoder(name, call, mode):
    padding = ENCODER_CALLS[call].get("src_key_padding_mask")
    # a padded position's output has no meaning, and torch's nested tensors make it 0
    rows = ~padding if padding is not None and padding.dtype == torch.bool else None
    compare("encoder", OPTIONS[name], (L,), ENCODER_CALLS[call], mode, rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", DECODER_CALLS)
@pytest.mark.parametrize("name", ["default", "norm_first", "gelu", "no_bias"])
def test_decoder_layer_and_decoder(name, call, mode):
    compare("decoder_layer", OPTIONS[name], (L, S), DECODER_CALLS[call], mode)
    compare("decoder", OPTIONS[name], (L, S), DECODER_CALLS[call], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", TRANSFORMER_CALLS)
@pytest.mark.parametrize("name", ["default", "batch_first", "norm_first"])
def test_transformer(name, call, mode):
    compare("transformer", OPTIONS[name], (S, L), TRANSFORMER_CALLS[call], mode)


KINDS = ["encoder_layer", "decoder_layer", "encoder", "decoder", "transformer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "no_bias"])
def test_state_initialisation_and_signature_are_torchs(kind, name):
    theirs, ours = stack(nn, OPTIONS[name], kind), stack(fastattn.nn, OPTIONS[name], kind)
    assert isinstance(ours, type(theirs))
    for method in ("__init__", "forward"):
        of_ours, of_theirs = (list(inspect.signature(getattr(type(m), method)).parameters) for m in (ours, theirs))
        assert of_ours == of_theirs
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert torch.equal(torch.rand(3), (stack(nn, OPTIONS[name], kind), torch.rand(3))[1])  # the generator's state too
    names = {type(m).__name__ for m in ours.modules()}
    replaced = [m for m in ours.modules() if type(m).__module__.startswith("fastattn")]
    assert {"MultiheadAttention", "LayerNorm"} <= names & {type(m).__name__ for m in replaced}
    inputs = [torch.randn(L, B, E)] * (1 if "encoder" in kind else 2)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(*inputs), ours(*inputs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_a_sample_that_is_all_padding_gives_numbers_and_leaves_the_others_alone(norm_first, mode):
    options = {"batch_first": True, "norm_first": norm_first}
    ours = stack(fastattn.nn, options, "encoder").train(mode == "train")
    x = torch.randn(B, L, E, requires_grad=True)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    with torch.set_grad_enabled(mode != "no_grad"):
        out = ours(x, src_key_padding_mask=padding)
        alone = ours(x[::2])
    assert torch.isfinite(out).all()
    assert torch.allclose(out[::2], alone, atol=1e-6)
    if mode != "no_grad":
        grads = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
        assert all(torch.isfinite(g).all() for g in grads)


def test_torchs_stack_of_our_layers_makes_no_nested_tensors():
    ours = stack(fastattn.nn, {"batch_first": True}, "encoder").eval()
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
        theirs = nn.TransformerEncoder(ours.layers[0], 2, fastattn.nn.LayerNorm(E)).eval()
    x = torch.randn(B, L, E)
    with torch.no_grad():
        out = theirs(x, src_key_padding_mask=PADDED)
        assert torch.equal(out, ours(x, src_key_padding_mask=PADDED))


def test_unbatched_input_is_a_batch_of_one():
    for kind in ("encoder", "transformer"):
        ours = stack(fastattn.nn, {"batch_first": True}, kind)
        inputs = [torch.randn(L, E)] * (1 if kind == "encoder" else 2)
        assert torch.allclose(ours(*inputs), ours(*[x[None] for x in inputs])[0], atol=1e-6)


def test_eval_runs_the_children_and_their_hooks():
    """torch's fast path computes around a swapped child, for example an adapter on linear1."""
    ours = stack(fastattn.nn, {"batch_first": True}, "encoder_layer").eval()
    x = torch.randn(B, L, E)

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with torch.no_grad():
        before = ours(x)
        ours.linear1.__class__ = Doubled
        swapped = ours(x)
        ours.linear1.__class__ = nn.Linear
        handle = ours.linear1.register_forward_hook(lambda module, args, out: 2 * out)
        hooked = ours(x)
        handle.remove()
        assert torch.equal(ours(x), before)
    assert torch.equal(swapped, hooked)
    assert not torch.allclose(swapped, before)


def test_dropout_acts_in_training_only():
    ours = stack(fastattn.nn, {"dropout": 0.5}, "encoder_layer")
    x = torch.randn(L, B, E)
    assert not torch.equal(ours(x), ours(x))
    for dropout in (ours.dropout, ours.dropout1, ours.dropout2):  # each of the three places counts
        for other in (ours.dropout, ours.dropout1, ours.dropout2):
            other.p = 0.5 if other is dropout else 0.0
        ours.self_attn.dropout = 0.0
        assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_compiles_to_one_graph():
    ours = stack(fastattn.nn, {"batch_first": True}, "encoder_layer")
    x = torch.randn(B, L, E)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, src_key_padding_mask=PADDED), ours(x, src_key_padding_mask=PADDED), atol=1e-6)
