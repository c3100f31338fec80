"""Attention beyond one backward pass: transforms, double backward, compilation, checkpointing, determinism."""

import mmap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.layout import as_gradient, as_output, new_gradient, new_output
from fastattn.ops.attention import attention_backward_op, attention_op
from tests import reference, sanitizer
from tests.compare import assert_close, max_error
from tests.test_attention import BACKENDS, CASES, run

FEATURES = ["causal_more_queries", "gqa", "bias_shared_by_batch", "softcap", "sinks", "alibi", "mask_keys", "pair_all"]
TRANSFORMS = ["grad", "vmap", "vmap_of_grad", "jvp", "forward_ad", "hessian"]


def small(requires_grad=True, dtype=torch.float32, n=20, nk=24, heads=2, kv_heads=1, dim=8):
    torch.manual_seed(0)
    shapes = [(1, heads, n, dim), (1, kv_heads, nk, dim), (1, kv_heads, nk, dim)]
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def double_gradients(function, tensors, seed=5):
    """Gradients of a random combination of the first gradients, with respect to the inputs and grad_outputs."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = list(function(*leaves))
    draws = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    draws = [d.masked_fill(torch.isinf(y), 0.0).requires_grad_() for d, y in zip(draws, outputs)]
    first = torch.autograd.grad(outputs, leaves, draws, create_graph=True)
    weights = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype) for g in first]
    return torch.autograd.grad(first, [*leaves, *draws], weights)


@pytest.mark.parametrize("causal", [False, True])
def test_double_backward_of_the_short_way_matches_fp64(causal):
    """Without a feature, an LSE or a mask, the CPU takes PyTorch's own kernel, with a backward beside the op's."""
    tensors = small(n=24, kv_heads=2)
    got, truth, plain = (
        double_gradients(lambda *qkv, f=f: (f(*qkv, causal=causal),), [t.to(dtype) for t in tensors])
        for f, dtype in (
            (fastattn.attention, torch.float32),
            (lambda *qkv, causal: reference.attention(*qkv, causal=causal)[0], torch.float64),
            (lambda *qkv, causal: reference.attention(*qkv, causal=causal)[0], torch.float32),
        )
    )
    for i, triple in enumerate(zip(got, truth, plain)):
        assert_close(f"second gradient {i}", *triple, relative=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_double_backward_matches_fp64(name, backend):
    case = CASES[name]
    tensors, options = case.inputs(torch.float32)
    factors = None
    if case.dropout_p:
        drawn = int(torch.randint(torch.iinfo(torch.int64).max, (1,), generator=torch.manual_seed(3)))
        keep = reference.philox_keep(drawn, (1, case.heads, case.n, case.nk), case.dropout_p)
        factors = keep.double() / (1 - case.dropout_p)

    def ours(*leaves):
        qkv, named = case.split(leaves)
        torch.manual_seed(3)
        return fastattn.attention(*qkv, **named, **options, dropout_p=case.dropout_p, return_lse=True)

    def naive(*leaves):
        qkv, named = case.split(leaves)
        return reference.attention(*qkv, **named, **options, dropout_factors=factors)

    with fastattn.backend.use(backend):
        got = double_gradients(ours, tensors)
    truth = double_gradients(naive, [t.double() for t in tensors])
    plain = double_gradients(naive, tensors)
    for i, triple in enumerate(zip(got, truth, plain)):
        assert_close(f"second gradient {i}", *triple, relative=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [fastattn.attention, fastattn.scaled_dot_product_attention])
def test_forward_mode_of_the_short_way(op, requires_grad):
    """PyTorch's fused kernel has no forward derivative, so dual tensors must not reach it."""
    query, key, value = small(requires_grad, n=24, kv_heads=2)
    tangent = torch.randn_like(query)
    with torch.autograd.forward_ad.dual_level():
        out = op(torch.autograd.forward_ad.make_dual(query, tangent), key, value)
        got = torch.autograd.forward_ad.unpack_dual(out).tangent
    inputs = [t.detach().double() for t in (query, key, value)]
    _, truth = torch.func.jvp(lambda q: reference.attention(q, *inputs[1:])[0], (inputs[0],), (tangent.double(),))
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_match_fp64_and_are_never_silently_zero(transform):
    q, k, v = small(requires_grad=False, n=6, nk=7, dim=4)
    tangent = torch.randn_like(q)

    def ours(q, k=k, v=v):
        return fastattn.attention(q, k, v, causal=True, softcap=3.0)

    def naive(q):
        return reference.attention(q, k.double(), v.double(), causal=True, softcap=3.0)[0]

    def apply(f, q, tangent):
        def scalar(q):
            return f(q).sin().sum()

        if transform == "grad":
            return torch.func.grad(scalar)(q)
        if transform == "vmap":
            return torch.vmap(f)(torch.stack([q, 2 * q]))
        if transform == "vmap_of_grad":
            return torch.vmap(torch.func.grad(scalar))(torch.stack([q, 2 * q]))
        if transform == "jvp":
            return torch.func.jvp(f, (q,), (tangent,))[1]
        if transform == "hessian":
            return torch.func.hessian(scalar)(q)
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(q, tangent))).tangent

    got, truth = apply(ours, q, tangent), apply(naive, q.double(), tangent.double())
    assert truth.abs().max() > 0.01
    assert max_error(got, truth) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", ["none", "all"])
def test_opcheck(features, backend):
    on = features == "all"
    q, k, v = small(n=6, nk=7)
    mask, bias = torch.rand(1, 1, 6, 7) > 0.3, torch.randn(1, 2, 6, 1, requires_grad=True)
    slopes, sinks = torch.rand(2).expand(1, 2), torch.randn(2, requires_grad=True)
    tensors = (mask, None, bias, slopes, sinks, torch.tensor([7])) if on else (None,) * 6
    arguments = (q, k, v, *tensors, 0.3, None, 0, 2.0 if on else 0.0, 0.2 if on else 0.0)
    with fastattn.backend.use(backend):
        torch.library.opcheck(attention_op, arguments)
        out, lse = (y.detach() for y in attention_op(*arguments))
        rest = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        grads = (torch.randn_like(out), torch.randn_like(lse))
        tail = (*rest[3:], on, on)
        torch.library.opcheck(attention_backward_op, (*grads, *rest[:3], out, lse, *tail))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic):
    def step(q, k, v, bias):
        return fastattn.attention(q.transpose(1, 2), k, v, causal=True, bias=bias, window=(9, None)).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33):
        q, k, v = small(n=n)
        q = q.detach().transpose(1, 2).contiguous().requires_grad_()
        bias = torch.randn(2, n, 24, requires_grad=True)
        got = torch.autograd.grad(compiled(q, k, v, bias), (q, k, v, bias))
        expected = torch.autograd.grad(step(q, k, v, bias), (q, k, v, bias))
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_export_keeps_the_op():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return fastattn.attention(q, k, v, causal=True)

    q, k, v = small(requires_grad=False)
    program = torch.export.export(Layer(), (q, k, v))
    assert any("fastattn.attention" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(q, k, v), Layer()(q, k, v))


def test_autocast_runs_in_its_dtype():
    q, k, v = small()
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_dropout(backend):
    q, k, v = small()

    def layer(q):
        return fastattn.attention(q, k, v, dropout_p=0.5)

    with fastattn.backend.use(backend):
        torch.manual_seed(1)
        (plain,) = torch.autograd.grad(layer(q).sin().sum(), q)
        torch.manual_seed(1)
        (replayed,) = torch.autograd.grad(checkpoint(layer, q, use_reentrant=False).sin().sum(), q)
    assert torch.equal(plain, replayed)


def test_both_backends_drop_the_same_weights():
    q, k, _ = small(requires_grad=False, n=40, nk=48)
    values = torch.eye(48).expand(1, 1, 48, 48)  # the output is the matrix of weights
    outs = []
    for backend in BACKENDS:
        torch.manual_seed(2)
        with fastattn.backend.use(backend):
            outs.append(fastattn.attention(q, k, values, dropout_p=0.3))
    assert torch.equal(outs[0] == 0, outs[1] == 0)
    assert 0.25 < (outs[0] == 0).double().mean() < 0.35


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gqa", "bias_shared_by_batch", "pair_all"])
def test_backward_is_deterministic_bit_for_bit(name, backend):
    tensors, options = CASES[name].inputs(torch.float32)
    with fastattn.backend.use(backend):
        first, second = (run(CASES[name], tensors, options, torch.float32)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1]))


@pytest.mark.parametrize(("rows", "stride"), [(150, 1 << 24), (33, 1 << 27)], ids=["rows_16m_apart", "copied"])
def test_offsets_beyond_32_bits(rows, stride, monkeypatch):
    """The last row lies more than 2^31 elements into the (lazily allocated) storage."""
    monkeypatch.setattr(sanitizer.Launch, "register", lambda *arguments: None)  # it keeps a state per element
    monkeypatch.setattr(sanitizer.Launch, "access", lambda *arguments: None)
    memory = mmap.mmap(-1, (rows - 1) * stride * 2 + 32)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 1, rows, 16), (0, 0, stride, 1))
    near = torch.randn(1, 1, rows, 16).half()
    far.copy_(near)
    with fastattn.backend.use("triton"):
        leaves = [[x.detach().requires_grad_() for _ in range(3)] for x in (far, near)]
        outs = [fastattn.attention(*qkv, causal=True) for qkv in leaves]
        assert torch.equal(*outs)
        grads = [torch.autograd.grad(out.float().square().sum(), qkv) for out, qkv in zip(outs, leaves)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_results_of_many_heads_keep_their_rows_where_kernels_reach_them():
    """Heads side by side would put these rows 2^25 elements apart, and a kernel's 32-bit offsets would wrap around."""
    query = torch.empty(1, 3, 1 << 19, 64, device="meta").transpose(1, 2)
    results = [new_output(query, 64), as_output(query, query), new_gradient(query), as_gradient(query)]
    assert all(result.is_contiguous() for result in results)
    few = query[:, : 1 << 18]
    results = [new_output(few, 64), as_output(few, few), new_gradient(few), as_gradient(few)]
    assert all(result.stride(2) == 1 << 24 for result in results)
