"""The same definitions on a real GPU: `make gpu`. Skipped, visibly, everywhere else."""

import copy

import pytest
import torch

import fastattn
from fastattn.models import GPT, GPTConfig
from tests.compare import assert_close
from tests.test_attention import CASES, DTYPES, check, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_matches_the_definition(name, dtype):
    with torch.device("cuda"):
        check(CASES[name], dtype, "triton")


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
