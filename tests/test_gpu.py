"""The same cases and definitions on a real GPU, and what only one can show: `make gpu`. Skipped, visibly, everywhere else."""

import copy
import dataclasses

import pytest
import torch

import fastattn
from fastattn.models import GPT, GPTConfig
from tests import (
    contract,
    elsewhere,
    test_attention_calculus,
    test_block_mask,
    test_decode,
    test_feed_forward,
    test_loss,
    test_normalization,
    test_rotary,
    test_varlen,
)
from tests.compare import assert_close
from tests.test_attention import CASES, DTYPES, check, run

pytestmark = pytest.mark.gpu


FAMILIES = {
    "normalization": test_normalization.CASES | test_normalization.WIDE,
    "feed forward": test_feed_forward.CASES,
    "rotary": test_rotary.CASES,
    "loss": test_loss.CASES,
}
FEATURES = {
    "normalization": [*test_normalization.FEATURES, *test_normalization.DROPOUT],
    "feed forward": [*test_feed_forward.FEATURES, *test_feed_forward.DROPOUT],
    "rotary": test_rotary.SOME,
    "loss": test_loss.SOME,
}
FEATURES_OF = [(family, name) for family, names in FEATURES.items() for name in names]


@pytest.fixture
def on_gpu(monkeypatch):
    """Ours runs on the GPU; inputs, definitions and comparisons stay on the CPU."""
    elsewhere.install(monkeypatch, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, cases in FAMILIES.items() for name in cases])
def test_values(family, name, dtype, on_gpu):
    contract.check_values(FAMILIES[family][name], "triton", dtype)


@pytest.mark.parametrize(("family", "name"), FEATURES_OF)
def test_contract(family, name, on_gpu):
    contract.check_determinism(FAMILIES[family][name], "triton")
    contract.check_double_backward(FAMILIES[family][name], "triton")


@pytest.mark.parametrize(("family", "name"), [at for at in FEATURES_OF if at[0] != "loss"])
def test_registration(family, name, on_gpu):
    contract.check_registration(FAMILIES[family][name], "triton")


def test_registration_of_losses(on_gpu):
    test_loss.test_registration("none", "triton")
    test_loss.test_registration_of_cross_entropy("triton")


@pytest.mark.parametrize(("family", "name"), [at for at in FEATURES_OF if "dropout" not in at[1]])
def test_transforms(family, name, on_gpu):
    contract.check_transforms(FAMILIES[family][name], "triton")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("family", "name"),
    [("normalization", "everything"), ("feed forward", "gated"), ("rotary", "halves"), ("loss", "mean")],
)
def test_compiles(family, name, dynamic, on_gpu):
    contract.check_compiles(FAMILIES[family][name], "triton", dynamic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_matches_the_definition(name, dtype, on_gpu):
    check(CASES[name], dtype, "triton")


# Tiles are 32 by 32 in the interpreter, and up to 128 by 128 here: whole tiles, and a dense mask's blocks, take more tokens.
LONGER = {
    name: dataclasses.replace(
        case, n=13 * case.n, nk=13 * case.nk, window=case.window and tuple(side and 13 * side for side in case.window)
    )
    for name, case in CASES.items()
    if not case.packed
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LONGER)
def test_attention_over_many_tiles(name, dtype, on_gpu):
    check(LONGER[name], dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"weighted": True, "label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_loss_over_many_blocks(options, dtype, on_gpu):
    contract.check_values(test_loss.loss((5,), classes=20_011, logits=True, **options), "triton", dtype)


@pytest.mark.parametrize("name", test_attention_calculus.FEATURES)
def test_double_backward_of_attention(name, on_gpu):
    test_attention_calculus.test_double_backward_matches_fp64(name, "triton")


@pytest.mark.parametrize("transform", test_attention_calculus.TRANSFORMS)
def test_transforms_of_attention(transform, on_gpu):
    test_attention_calculus.test_transforms_match_fp64_and_are_never_silently_zero(transform)


@pytest.mark.parametrize("name", test_block_mask.MASKS)
def test_block_masks(name, on_gpu):
    test_block_mask.test_attention_is_that_with_the_dense_mask(name, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", test_varlen.CASES)
def test_packed_sequences(name, dtype, on_gpu):
    test_varlen.test_matches_the_definition(name, dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_decode.CASES)
def test_decoding(name, dtype, on_gpu):
    test_decode.test_matches_the_definition(name, dtype, "triton")


@pytest.mark.parametrize("name", ["one_token", "all_of_one_length", "several_tokens", "paged_odd"])
def test_decoding_appends_in_place(name, on_gpu):
    test_decode.test_appends_in_place_and_nothing_else(name, "triton")


@pytest.mark.parametrize("name", ["gqa", "bias_shared_by_batch", "pair_all"])
def test_attention_backward_is_deterministic(name):
    with torch.device("cuda"):
        tensors, options = CASES[name].inputs(torch.bfloat16)
        first, second = (run(CASES[name], tensors, options, torch.bfloat16)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1]))


def test_dropout_drops_the_same_weights_as_on_the_cpu():
    q, k = torch.randn(2, 1, 2, 150, 64).unbind()
    values = torch.eye(150).expand(1, 2, 150, 150)
    seed = torch.tensor([99])
    rest = (None, None, None, None, None, seed, 0.125, None, None, 0.0, 0.4)
    outs = [torch.ops.fastattn.attention(*(x.to(d) if isinstance(x, torch.Tensor) else x for x in (q, k, values, *rest)))[0]
            for d in ("cpu", "cuda")]  # fmt: skip
    assert torch.equal(outs[0] == 0, outs[1].cpu() == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_and_feed_forward_match_fp64(dtype):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(768, device="cuda")
    mlp = torch.nn.Sequential(torch.nn.Linear(768, 3072), torch.nn.GELU(), torch.nn.Linear(3072, 768)).cuda()
    x = torch.randn(300, 768, device="cuda")
    ours, plain, truth = [], [], []
    for results, kind, run_ours in ((ours, dtype, True), (plain, dtype, False), (truth, torch.float64, False)):
        n, m, leaf = copy.deepcopy(norm).to(kind), copy.deepcopy(mlp).to(kind), x.to(kind).requires_grad_()
        if run_ours:
            h = fastattn.layer_norm(leaf, (768,), n.weight, n.bias)
            y = fastattn.feed_forward(h, m[0].weight, m[0].bias, m[2].weight, m[2].bias)
        else:
            y = m(n(leaf))
        leaves = [leaf, *n.parameters(), *m.parameters()]
        results += [y, *torch.autograd.grad(y.float().sin().sum(), leaves)]
    for i, (a, b, c) in enumerate(zip(ours, truth, plain)):
        assert_close(f"result {i}", a, b, c)


def test_a_gpt_trains_to_the_same_losses_as_on_the_cpu():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, context_length=64, num_layers=2, num_heads=4, d_model=64)
    start = GPT(config)
    tokens = torch.randint(97, (4, 65))
    curves = []
    for device in ("cpu", "cuda"):
        model, x = copy.deepcopy(start).to(device), tokens.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(10):
            loss = model(x[:, :-1], x[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert torch.allclose(*curves, atol=1e-3)


def small_gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, context_length=64, num_layers=2, num_heads=4, d_model=64)).cuda()
    return model, torch.randint(97, (4, 65), device="cuda")


def test_the_host_never_waits_in_a_training_step():
    model, tokens = small_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    first = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = [step() for _ in range(3)][-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last < first


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_compiled_gpt_is_the_plain_one():
    model, tokens = small_gpt()
    results = []
    for run_model in (model, torch.compile(model, fullgraph=True)):
        loss = run_model(tokens[:, :-1], tokens[:, 1:])[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_decoding_step_in_a_cuda_graph():
    """Replayed with other queries and lengths in the same memory."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 256, 64, device="cuda").unbind()
    query, key, value = (torch.randn(3, heads, 1, 64, device="cuda") for heads in (8, 2, 2))
    lengths = torch.tensor([5, 100, 0], dtype=torch.int32, device="cuda")

    def step():
        return fastattn.attention_with_kv_cache(query, keys, values, lengths, key=key, value=value)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(2):
        query.normal_()
        lengths += 7
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, step())
