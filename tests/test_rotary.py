"""Rotary position embedding: the contract, offsets of a cache, writing in place, and the frequencies of transformers."""

import copy
import pickle

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastattn
from tests import contract, reference
from tests.compare import max_error
from tests.contract import BACKENDS, DTYPES, Op


def rotary(
    batch=2, heads=(3, 1), tokens=5, dim=8, rotary_dim=None, interleaved=False, factor=1.0, by_token=False, **at
):
    """A case. `at`: positions, or offset (an int, or a list with one for each sequence)."""
    rotary_dim = rotary_dim or dim
    offset = torch.tensor(at["offset"]) if isinstance(at.get("offset"), list) else at.get("offset", 0)
    positions = torch.tensor(at["positions"]) if "positions" in at else None
    frequencies = fastattn.rotary_frequencies(rotary_dim, base=100.0)[0]
    cos, sin = (factor * table for table in fastattn.rotary_tables(rotary_dim, 40, base=100.0))
    rows = torch.arange(tokens) + (offset[:, None] if isinstance(offset, torch.Tensor) else offset)
    rows = rows if positions is None else positions
    if by_token:
        cos, sin, positions, offset = cos[rows], sin[rows], None, 0
        cos, sin = (t.expand(batch, -1, -1) if t.dim() == 3 else t[None] for t in (cos, sin))

    def ours(query, key):
        return fastattn.rotary(query, key, cos, sin, positions=positions, offset=offset, interleaved=interleaved)

    def definition(query, key):
        complete = rows.expand(len(query), tokens).double()
        kind = torch.float64 if query.dtype == torch.float64 else torch.float32
        return reference.rotary(
            query, key, inverse_frequencies=frequencies.to(kind), positions=complete.to(kind),
            interleaved=interleaved, factor=factor,
        )  # fmt: skip

    shapes = {"query": (batch, heads[0], tokens, dim), "key": (batch, heads[1], tokens, dim)}
    return Op(ours, definition, shapes, grows=("query", "key"), left_to_compiler=True)


CASES = {
    "halves": rotary(),
    "interleaved": rotary(interleaved=True),
    "many_tokens_and_heads": rotary(1, (9, 4), 37, 128, offset=2),
    "partial": rotary(dim=11, rotary_dim=6, offset=3),
    "partial_interleaved": rotary(dim=9, rotary_dim=4, interleaved=True),
    "width_no_power_of_2": rotary(dim=24),
    "one_pair": rotary(dim=2),
    "decoding": rotary(tokens=1, offset=[7, 30]),
    "an_offset_for_each_sequence": rotary(offset=[0, 17], interleaved=True),
    "positions": rotary(positions=[4, 0, 9, 9, 39]),
    "positions_for_each_sequence": rotary(positions=[[4, 0, 9, 9, 39], [1, 2, 3, 0, 0]]),
    "a_row_for_each_token": rotary(positions=[[4, 0, 9, 9, 39], [1, 2, 3, 0, 0]], by_token=True),
    "a_row_for_each_token_of_all": rotary(offset=6, by_token=True),
    "scaled_tables": rotary(factor=1.25),
}
SOME = ["halves", "interleaved", "partial", "an_offset_for_each_sequence", "scaled_tables"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, backend):
    contract.check_values(CASES[name], backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SOME)
def test_contract(name, backend):
    contract.check_strides(CASES[name], backend)
    contract.check_determinism(CASES[name], backend)
    contract.check_double_backward(CASES[name], backend)
    contract.check_registration(CASES[name], backend)
    contract.check_transforms(CASES[name], backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["halves", "partial_interleaved"])
def test_compiles(name, dynamic):
    contract.check_compiles(CASES[name], "eager", dynamic)


def tensors(requires_grad=True, tokens=5, dim=8):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(2, heads, tokens, dim, generator=generator) for heads in (3, 1)]
    return [x.requires_grad_(requires_grad) for x in made]


TABLES = fastattn.rotary_tables(8, 40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_in_place_writes_what_a_copy_returns(interleaved, backend):
    options = {"interleaved": interleaved, "offset": 3}
    with fastattn.backend.use(backend):
        leaves = tensors()
        expected = fastattn.rotary(*leaves, *TABLES, **options)
        grads = torch.autograd.grad(expected, leaves, [y.cos() for y in expected])
        # a view of the query; and the key laid out with gaps
        whole = [torch.cat([leaves[0] * 1.0, leaves[0] * 1.0], 3), (leaves[1] * 1.0).transpose(2, 3).contiguous()]
        views = [whole[0][..., :8], whole[1].transpose(2, 3)]
        got = fastattn.rotary(*views, *TABLES, **options, inplace=True)
        assert [y.data_ptr() for y in got] == [x.data_ptr() for x in views]
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
        assert torch.equal(whole[0][..., :8], expected[0])
        assert torch.equal(whole[0][..., 8:], leaves[0])
        again = torch.autograd.grad(got, leaves, [y.detach().cos() for y in got])
        assert all(torch.equal(a, b) for a, b in zip(again, grads))
        with torch.no_grad():
            x = leaves[0].detach().clone()
            assert fastattn.rotary(x, None, *TABLES, **options, inplace=True)[1] is None
        assert torch.equal(x, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_is_seen_by_autograd(backend):
    """Whatever needs the numbers that were overwritten fails loudly, and a refused call overwrites nothing."""
    with fastattn.backend.use(backend):
        leaf, other = tensors()
        product = leaf * 1.0
        needs_product = product.square()
        fastattn.rotary(product, None, *TABLES, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            needs_product.sum().backward()
        before = leaf.detach().clone()
        with torch.no_grad():
            product = leaf.exp()
        held = (product * other).sum()
        with torch.no_grad():
            fastattn.rotary(product, None, *TABLES, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            held.backward()
        with pytest.raises(ValueError, match="inplace must be False: query is a leaf that needs a gradient"):
            fastattn.rotary(leaf, None, *TABLES, inplace=True)
        with pytest.raises(ValueError, match="inplace must be False: elements of key share memory"):
            fastattn.rotary(leaf * 1.0, other.detach().expand(2, 4, 5, 8), *TABLES, inplace=True)
        halves = torch.cat([leaf, leaf], 3).chunk(2, 3)
        with pytest.raises(RuntimeError, match="multiple views"):
            fastattn.rotary(*halves, *TABLES, inplace=True)
        assert torch.equal(halves[0], before)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_in_place_compiles(grad):
    def step(query, key):
        query, key = query * 2.0, key * 2.0
        fastattn.rotary(query, key, *TABLES, inplace=True)
        return query, key

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = tensors(grad)
    expected, got = step(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)  # (the compiler gets the definition, whose roundings are others)
    if grad:
        results = [torch.autograd.grad([y.sin().sum() for y in ys], inputs) for ys in (expected, got)]
        torch.testing.assert_close(*results)


def test_the_in_place_op_is_registered_right():
    query, key = tensors(False)
    torch.library.opcheck(torch.ops.fastattn.rotary_, (query, key, *(t[None] for t in TABLES), None, 2, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_tables(backend):
    inputs = [*tensors(), *(t.clone().requires_grad_() for t in TABLES)]
    grads = []
    for kind in (torch.float32, torch.float64):
        q, k, cos, sin = leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        if kind == torch.float32:
            with fastattn.backend.use(backend):
                outs = fastattn.rotary(q, k, cos, sin, offset=4)
        else:
            turn = torch.complex(cos[4:9], sin[4:9])
            z = [torch.complex(x[..., :4], x[..., 4:]) * turn for x in (q, k)]
            outs = [torch.cat([y.real, y.imag], -1) for y in z]
        grads.append(torch.autograd.grad(sum(y.sin().sum() for y in outs), leaves))
    assert all(max_error(a, b) < 1e-5 for a, b in zip(*grads))
    assert grads[0][2].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_tables_in_place(dtype):
    leaves = [
        *(x.detach().to(dtype).requires_grad_() for x in tensors()),
        *(t.clone().requires_grad_() for t in TABLES),
    ]
    grads = []
    for inplace in (False, True):
        query, key = (x * 1 for x in leaves[:2])
        outs = fastattn.rotary(query, key, *leaves[2:], inplace=inplace)
        assert (outs[0].data_ptr() == query.data_ptr()) == inplace
        grads.append(torch.autograd.grad(sum(y.sin().sum() for y in outs), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_refused_position_leaves_the_query_as_autograd_knows_it():
    leaf = tensors()[0]
    query = leaf * 1
    square = query.square()
    with pytest.raises(ValueError, match=r"positions .* must be in \[0, 40\)"):
        fastattn.rotary(query, None, *TABLES, positions=torch.full((5,), 40), inplace=True)
    torch.testing.assert_close(torch.autograd.grad(square.sum(), leaf)[0], 2 * leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_of_the_two(backend):
    query, key = tensors()
    with fastattn.backend.use(backend):
        for wanted, x in enumerate((query, key)):
            out = fastattn.rotary(query, key, *TABLES)[wanted]
            (grad,) = torch.autograd.grad(out.square().sum() / 2, x)
            torch.testing.assert_close(grad, x.detach())  # a rotation keeps the length


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)], ids=str)
def test_empty(shape, backend):
    query = torch.empty(shape, requires_grad=True)
    with fastattn.backend.use(backend):
        out, key = fastattn.rotary(query, torch.randn(shape[0], 2, *shape[2:]), *TABLES)
        (grad,) = torch.autograd.grad(out.sum(), query)
    assert out.shape == grad.shape == shape
    assert key.shape == (shape[0], 2, *shape[2:])


def test_autocast_changes_nothing():
    query, key = (x.detach().bfloat16() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        inside = fastattn.rotary(query, key, *TABLES)
    assert all(torch.equal(a, b) for a, b in zip(inside, fastattn.rotary(query, key, *TABLES)))
    assert inside[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_query_and_key_is_kept_for_the_backward(backend):
    held = []
    leaves = tensors()
    with (
        fastattn.backend.use(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x),
    ):
        fastattn.rotary(*leaves, *TABLES)
        assert "in one launch" in fastattn.explain(fastattn.rotary, *leaves, *TABLES) or backend == "eager"
    assert {tuple(x.shape) for x in held} == {(1, 40, 4)}


def test_a_kernel_gives_nan_outside_the_tables():
    from fastattn.kernels.rotary import rotate

    query = torch.ones(1, 1, 4, 8)
    positions = torch.tensor([[-1, 0, 39, 40]])
    out, _ = rotate(query, None, TABLES[0][None], TABLES[1][None], positions, 0, False, False, False)
    assert out[0, 0].isnan().all(1).tolist() == [True, False, False, True]
    assert not out[0, 0, 1:3].isnan().any()


Q, K = torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5, 8)
ROWS = torch.zeros(2, 5, 4)
ERRORS = {
    "rank": (ValueError, r"query must have 4 dimensions", (Q[0], None, *TABLES), {}),
    "key": (ValueError, r"key must be \(B, Hkv, N, D\) = \(2, Hkv, 5, 8\)", (Q, K[:1], *TABLES), {}),
    "key_dtype": (TypeError, r"key has dtype float16; allowed: float32", (Q, K.half(), *TABLES), {}),
    "too_wide": (ValueError, r"cos must be .* with 1 <= half <= 2", (Q[..., :4], None, *TABLES), {}),
    "sin": (ValueError, r"sin must have shape \(40, 4\)", (Q, K, TABLES[0], TABLES[1][:3]), {}),
    "rows": (ValueError, r"cos must be \(2 or 1, 5, half\)", (Q, K, ROWS[:, :4], ROWS[:, :4]), {}),
    "offset": (ValueError, r"offset must be in \[0, 40 rows - 5 tokens\], got 36", (Q, K, *TABLES), {"offset": 36}),
    "negative": (ValueError, r"offset must be in .* got -1", (Q, K, *TABLES), {"offset": -1}),
    "offset_kind": (TypeError, r"offset must be an integer, got float", (Q, K, *TABLES), {"offset": 1.5}),
    "offset_bool": (TypeError, r"offset must be an integer, got bool", (Q, K, *TABLES), {"offset": True}),
    "offsets": (ValueError, r"offset must have shape \(2,\)", (Q, K, *TABLES), {"offset": torch.zeros(3).long()}),
    "far": (ValueError, r"must be in \[0, 40\).* got 40", (Q, K, *TABLES), {"offset": torch.tensor([36, 0])}),
    "positions": (ValueError, r"positions must be \(5,\) or", (Q, K, *TABLES), {"positions": torch.zeros(4).long()}),
    "positions_dtype": (TypeError, r"positions has dtype float32", (Q, K, *TABLES), {"positions": torch.zeros(5)}),
    "both": (ValueError, r"only one of", (Q, K, *TABLES), {"positions": torch.zeros(5).long(), "offset": 1}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, arguments, options = ERRORS[name]
    with pytest.raises(error, match=message):
        fastattn.rotary(*arguments, **options)


def test_matches_transformers():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    query, key = (x.detach() for x in tensors(dim=16))
    frequencies, _ = fastattn.rotary_frequencies(16)
    angles = torch.cat([torch.outer(torch.arange(5.0), frequencies.float())] * 2, -1)[None]
    expected = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    got = fastattn.rotary(query, key, *fastattn.rotary_tables(config.head_dim, 5))
    by_token = fastattn.rotary(query, key, angles.cos()[..., :8], angles.sin()[..., :8])
    for ours in (got, by_token):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, expected))


RULES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024},
    "dynamic_short": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024},
    "yarn_options": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
        "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": 1.5
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("dim", "base"), [(128, 500_000.0), (64, 10_000.0), (20, 100.0)])
def test_frequencies_are_those_of_transformers(name, dim, base):
    rule, length = RULES[name], 4096
    original = rule.get("original_max_position_embeddings", 2048)
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=1, max_position_embeddings=original, rope_parameters={**rule, "rope_theta": base}
    )  # fmt: skip
    got, factor = fastattn.rotary_frequencies(dim, base=base, scaling=rule, length=length)
    if name == "default":
        expected, expected_factor = 1.0 / base ** (torch.arange(0, dim, 2) / dim), 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rule["rope_type"]](config, "cpu", seq_len=length)
    torch.testing.assert_close(got.float(), expected, rtol=2e-6, atol=0.0)
    assert factor == pytest.approx(expected_factor)
    cos, sin = fastattn.rotary_tables(dim, length, base=base, scaling=rule)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((length, dim // 2), factor**2))
    torch.testing.assert_close(sin[1], factor * expected.sin(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim must be even and at least 2, got 7"),
        ({"base": 1.0}, "base must be more than 1, got 1.0"),
        ({"scaling": {"rope_type": "longrope"}}, "rope_type must be one of default, linear, dynamic, yarn, llama3"),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0}}, "needed: factor, original_max_position_embeddings"),
        ({"scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "takes factor .* got factor, beta"),
        ({"scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
    ],
)
def test_bad_frequencies(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastattn.rotary_frequencies(**{"rotary_dim": 8, **arguments})


@pytest.mark.parametrize("base", ["1e4", True, torch.tensor(1e4)], ids=["text", "bool", "tensor"])
def test_a_base_that_is_no_number(base):
    with pytest.raises(TypeError, match="base must be a real number, got"):
        fastattn.rotary_tables(8, 4, base=base)


def test_module():
    scaling = {"rope_type": "linear", "factor": 2.0}
    module = fastattn.nn.RotaryEmbedding(8, 16, scaling=scaling, interleaved=True)
    query, key = (x.detach() for x in tensors())
    tables = fastattn.rotary_tables(8, 40, scaling=scaling)
    for offset in (3, 30):  # 30 is beyond the first 16 positions
        expected = fastattn.rotary(query, key, *tables, offset=offset, interleaved=True)
        assert all(torch.equal(a, b) for a, b in zip(module(query, key, offset=offset), expected))
    assert module.cos.shape[0] == 64
    assert not module.state_dict()
    assert list(module.parameters()) == []
    expected = module(query)[0]
    for other in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module).bfloat16(),
        module.to("meta").to_empty(device="cpu"),
    ):
        assert other.cos.dtype == torch.float32
        assert torch.equal(other(query)[0], expected)


def test_tables_that_grow_in_inference_under_a_compiler_can_train_afterwards():
    module, query = fastattn.nn.RotaryEmbedding(8, 4), torch.randn(1, 2, 20, 8)
    torch.compiler.reset()
    with torch.inference_mode():
        got = torch.compile(module, fullgraph=True, backend="aot_eager")(query)[0]
    leaf = query.clone().requires_grad_()
    rotated = module(leaf)[0]
    torch.testing.assert_close(got, rotated.detach())
    rotated.sum().backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("touch", [lambda m: m(torch.ones(1, 1, 9, 8)), lambda m: m.float()], ids=["longer", "moved"])
def test_tables_made_in_inference_mode_train(touch):
    module = fastattn.nn.RotaryEmbedding(8, 4)
    with torch.inference_mode():
        touch(module)
    query = torch.ones(1, 1, 3, 8, requires_grad=True)
    module(query)[0].sum().backward()
    assert query.grad is not None


def test_tables_follow_the_device_context():
    with torch.device("meta"):
        module = fastattn.nn.RotaryEmbedding(8, 4)
        assert fastattn.rotary_tables(8, 4)[0].is_meta
    assert fastattn.rotary_tables(8, 4, device="cpu")[0].device.type == "cpu"
    assert module(torch.ones(1, 1, 9, 8, device="meta"))[0].is_meta
    query = torch.ones(1, 1, 3, 8)  # as after load_state_dict(assign=True), which knows no tables
    assert torch.equal(module(query)[0], fastattn.nn.RotaryEmbedding(8, 4)(query)[0])


def test_tables_leave_the_meta_device_with_parameters_that_have_left_it():
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "rotary": fastattn.nn.RotaryEmbedding(8, 4)})
    model.load_state_dict(torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)}).state_dict(), assign=True)
    assert model.bfloat16()["rotary"].cos.is_meta
    made = fastattn.nn.RotaryEmbedding(8, 4)
    torch.testing.assert_close(dict(model.to("cpu")["rotary"].named_buffers()), dict(made.named_buffers()))


def test_module_names_an_offset_that_is_no_integer():
    with pytest.raises(TypeError, match="offset must be an int"):
        fastattn.nn.RotaryEmbedding(8, 4)(torch.ones(1, 1, 3, 8), offset=2.5)


def test_frequencies_of_no_integer():
    for arguments, name in (((16, 32.5), "length"), ((16.0, 32), "rotary_dim")):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got float"):
            fastattn.rotary_tables(*arguments)
    assert len(fastattn.rotary_tables(np.int64(16), np.int32(33))[0]) == 33


def test_growing_tables_compile():
    module = fastattn.nn.RotaryEmbedding(8, 4)
    query = torch.ones(1, 1, 9, 8)
    torch._dynamo.reset()
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(query)[0]
    assert torch.equal(got, module(query)[0])
