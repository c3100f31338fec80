"""`fastattn.nn.MultiheadAttention` against torch's with the same weights."""

import copy
import pickle

import pytest
import torch

import fastattn

B, L, S, E, H = 3, 7, 9, 16, 4
PADDING = torch.zeros(B, S, dtype=torch.bool).index_fill_(1, torch.tensor([7, 8]), True)
PADDING[1] = torch.arange(S) > 2
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)

CONSTRUCTOR = {
    "default": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "kdim_vdim": {"kdim": 10, "vdim": 12},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "both_extras": {"add_bias_kv": True, "add_zero_attn": True},
}
CALLS = {
    "plain": {},
    "no_weights": {"need_weights": False},
    "per_head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding_float": {"key_padding_mask": torch.randn(B, S), "need_weights": False},
    "mask": {"attn_mask": CAUSAL},
    "mask_float": {"attn_mask": torch.randn(L, S)},
    "mask_3d": {"attn_mask": torch.rand(B * H, L, S) > 0.7, "need_weights": False},
    "mask_and_padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "causal_hint": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal_hint_weights": {"attn_mask": CAUSAL, "is_causal": True},
}


def pair(**options):
    """Torch's module and ours, built from one seed; training mode."""
    modules = []
    for cls in (torch.nn.MultiheadAttention, fastattn.nn.MultiheadAttention):
        torch.manual_seed(0)
        modules.append(cls(E, H, **options))
    return modules


def inputs(options):
    torch.manual_seed(1)
    shapes = [(L, B, E), (S, B, options.get("kdim", E)), (S, B, options.get("vdim", E))]
    tensors = [torch.randn(shape) for shape in shapes]
    return [t.transpose(0, 1).contiguous() if options.get("batch_first") else t for t in tensors]


def assert_same(ours, theirs, atol=2e-6):
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_outputs_weights_and_gradients_equal_torchs(name, call):
    theirs, ours = pair(**CONSTRUCTOR[name])
    results, grads = [], []
    for module in (theirs, ours):
        leaves = [t.requires_grad_() for t in inputs(CONSTRUCTOR[name])]
        out, weights = module(*leaves, **CALLS[call])
        loss = out.sin().sum() + (0 if weights is None else weights.square().sum())
        results.append((out, weights))
        grads.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    assert_same(results[1], results[0])
    assert results[1][0].is_contiguous()  # out.view(...) works, as with torch's layer where the length comes first
    assert_same(grads[1], grads[0], atol=1e-5)


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_state_and_initialisation_are_torchs(name):
    theirs, ours = pair(**CONSTRUCTOR[name])
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(clone(*inputs(CONSTRUCTOR[name])), ours(*inputs(CONSTRUCTOR[name])))


@pytest.mark.parametrize("same", ["self_attention", "shared_memory"])
def test_one_packed_projection_and_unbatched_input(same):
    theirs, ours = pair()
    x, memory = torch.randn(L, E), torch.randn(S, E)
    for q, kv in [(x, x), (x[:, None], x[:, None])] if same == "self_attention" else [(x, memory)]:
        assert_same(ours(q, kv, kv), theirs(q, kv, kv))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_fully_padded_sample_gives_the_bias_never_nan(training, need_weights):
    _, ours = pair(batch_first=True)
    ours.train(training)
    x = torch.randn(B, L, E)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
    assert torch.isfinite(out).all()
    assert weights is None or not weights[1].any()


def test_returned_weights_are_the_ones_that_were_used_after_dropout():
    _, ours = pair(dropout=0.5, batch_first=True)
    x = torch.randn(B, L, E)
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    value = torch.nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    value = value.unflatten(2, (H, E // H)).transpose(1, 2)
    assert torch.allclose(ours.out_proj((weights @ value).transpose(1, 2).flatten(2)), out, atol=1e-6)
    assert 0.2 < (weights == 0).double().mean() < 0.8


def test_torchs_encoder_calls_our_forward_in_eval_too(monkeypatch):
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    torch.manual_seed(0)
    layer.self_attn = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    calls = []
    forward = fastattn.nn.MultiheadAttention.forward
    monkeypatch.setattr(
        fastattn.nn.MultiheadAttention, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        out = encoder(torch.randn(B, L, E), src_key_padding_mask=padding)
    assert len(calls) == 2
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: ((q[0, 0], k, v), {}), ValueError, "3 dimensions, or 2 for one sequence"),
        (
            lambda q, k, v: ((torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged), k, v), {}),
            ValueError,
            "query must be dense, got a nested tensor",
        ),
        (lambda q, k, v: ((q[..., 1:], k, v), {}), ValueError, "query must have 16 features"),
        (lambda q, k, v: ((q, k, v[1:]), {}), ValueError, "same length and batch size"),
        (lambda q, k, v: ((q[:, :2], k, v), {}), ValueError, "same batch size"),
        (
            lambda q, k, v: ((q, k, v), {"key_padding_mask": PADDING.T}),
            ValueError,
            r"key_padding_mask must have shape \(3, 9\)",
        ),
        (
            lambda q, k, v: ((q, k, v), {"attn_mask": CAUSAL.T}),
            ValueError,
            r"attn_mask must have shape \(7, 9\) or \(12, 7, 9\)",
        ),
        (lambda q, k, v: ((q, k, v), {"attn_mask": CAUSAL.int()}), TypeError, "attn_mask must be bool"),
        (lambda q, k, v: ((q, k, v), {"is_causal": True}), RuntimeError, "is a hint about attn_mask"),
    ],
    ids=["rank", "nested", "features", "lengths", "batch", "padding", "mask", "mask_dtype", "hint"],
)
def test_bad_arguments_are_named(change, error, message):
    arguments, options = change(*inputs({}))
    with pytest.raises(error, match=message):
        pair()[1](*arguments, **options)


def test_one_graph_for_every_length_with_weights():
    """What `need_weights`, the default, returns does not tie a compiled module to a length."""
    torch._dynamo.reset()
    layer = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, mask: layer(x, x, x, attn_mask=mask), dynamic=True, fullgraph=True, backend=count
    )
    for length in (5, 9, 12):
        x, mask = torch.randn(2, length, E), torch.ones(length, length, dtype=torch.bool).triu(1)
        for a, b in zip(compiled(x, mask), layer(x, x, x, attn_mask=mask)):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize("average", [True, False])
def test_a_backward_hook_with_weights_that_nobody_uses(average):
    """Torch's hook stands between the module and its outputs, and gives an output without a gradient None."""
    _, ours = pair()
    q, k, v = (t.requires_grad_() for t in inputs({}))
    torch.autograd.backward(ours(q, k, v, average_attn_weights=average)[0].sin().sum())
    expected = [t.grad for t in (q, k, v, *ours.parameters())]
    for tensor in (q, k, v, *ours.parameters()):
        tensor.grad = None
    seen = []
    ours.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: seen.append(grad_outputs))
    ours(q, k, v, average_attn_weights=average)[0].sin().sum().backward()
    assert seen[0][1] is None
    assert_same([t.grad for t in (q, k, v, *ours.parameters())], expected)
