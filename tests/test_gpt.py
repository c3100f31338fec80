"""The example GPT against an independent plain-PyTorch GPT with the same weights, and what is special about it."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor

import fastattn.backend
from fastattn.eager import products
from fastattn.models import GPT, GPTConfig, KVCache, attention_maps
from fastattn.models.decoding import TokenReader, can_read_tokens
from fastattn.models.sampling import penalise_repetition, sample
from tests import contract

TINY = GPTConfig(vocab_size=61, context_length=24, num_layers=2, num_heads=3, d_model=24, d_ff=40)
VARIANTS = {
    "default": TINY,
    "no-bias": GPTConfig(61, context_length=24, num_layers=2, num_heads=2, d_model=24, bias=False),
    "untied": GPTConfig(61, context_length=24, num_layers=1, num_heads=1, d_model=16, tie_weights=False),
}


def make(config: GPTConfig = TINY, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
    for parameter in model.parameters():  # away from zero biases and unit norms, which would hide their misuse
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def batch(config: GPTConfig = TINY, rows: int = 2, length: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def reference_logits(state: dict[str, Tensor], config: GPTConfig, tokens: Tensor) -> Tensor:
    """GPT-2 written out, head by head, from the weights alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].mT + state.get(f"{name}.bias", 0.0)

    x = state["token_embedding.weight"][tokens] + state["position_embedding.weight"][: tokens.shape[1]]
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    width = config.d_model // config.num_heads
    for index in range(config.num_layers):
        name = f"blocks.{index}"
        query, key, value = linear(norm(x, f"{name}.norm1"), f"{name}.attention.in_proj").split(config.d_model, dim=-1)
        heads = []
        for start in range(0, config.d_model, width):
            q, k, v = (t[..., start : start + width] for t in (query, key, value))
            scores = (q @ k.mT / math.sqrt(width)).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"{name}.attention.out_proj")
        inner = linear(norm(x, f"{name}.norm2"), f"{name}.feed_forward.linear1")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, f"{name}.feed_forward.linear2")
    return norm(x, "norm") @ state.get("output.weight", state["token_embedding.weight"]).mT


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients_are_those_of_a_plain_gpt(config: GPTConfig) -> None:
    model = make(config)
    tokens, targets = batch(config)
    targets = targets.clone()
    targets[0, :5] = -100
    exact = {name: p.detach().double().requires_grad_() for name, p in model.state_dict(keep_vars=True).items()}
    expected = reference_logits(exact, config, tokens)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()

    logits, none = model(tokens)
    assert none is None
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    none, value = model(tokens, targets)
    assert none is None
    torch.testing.assert_close(value.double(), expected_loss, rtol=1e-5, atol=0)
    value.backward()
    for name, parameter in model.named_parameters():
        largest = exact[name].grad.abs().max()
        assert (parameter.grad - exact[name].grad).abs().max() < 1e-4 * largest, name


ROTARY = GPTConfig(
    61, context_length=24, num_layers=2, num_heads=2, d_model=24, positions="rotary", num_kv_heads=1, window=3
)
LLAMA = replace(
    ROTARY, num_heads=4, num_kv_heads=2, head_dim=8, norm="rms_norm", activation="silu", gated=True, bias=False, qkv_bias=True,
    window=None,
)  # fmt: skip
FAMILIES = {**VARIANTS, "rotary, grouped, window": ROTARY, "Llama": LLAMA}


@pytest.mark.parametrize("config", [TINY, ROTARY], ids=["learned", "rotary"])
def test_packed_sequences_are_those_sequences_alone(config: GPTConfig) -> None:
    """Positions begin anew, no sequence sees another; together they are longer than the context."""
    model, lengths = make(config), [5, 0, 24, 1, 13]
    parts = [batch(config, 1, length, seed=length) for length in lengths]
    tokens, targets = (torch.cat(part, dim=1) for part in zip(*parts))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    alone = torch.cat([model(part)[0] for part, _ in parts if part.shape[1]], dim=1)
    expected = F.cross_entropy(alone[0].double(), targets[0])
    torch.testing.assert_close(model(tokens, cu_seqlens=cu_seqlens)[0], alone, rtol=1e-5, atol=1e-6)
    value = model(tokens, targets, cu_seqlens=cu_seqlens)[1]
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (value, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item() + 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, ROTARY], ids=["learned", "rotary"])
def test_a_cache_of_sequences_of_different_lengths(config: GPTConfig) -> None:
    """Each reads its next two tokens at its own position."""
    model, (tokens, _) = make(config).eval(), batch(config, rows=3)
    lengths, caches = [4, 9, 1], []
    for row, length in zip(tokens, lengths):
        caches.append(KVCache(config.context_length))
        model.hidden(row[None, :length], caches[-1])
    together = KVCache(config.context_length)
    together.blocks = [tuple(map(torch.cat, zip(*buffers))) for buffers in zip(*(cache.blocks for cache in caches))]
    together.length = torch.tensor(lengths, dtype=torch.int32)
    new = torch.stack([row[length : length + 2] for row, length in zip(tokens, lengths)])
    found = torch.cat([model.hidden(new[:, :1], together), model.hidden(new[:, 1:], together)], dim=1)
    assert together.length.tolist() == [6, 11, 3]
    for row, length, two in zip(tokens, lengths, found):
        torch.testing.assert_close(two, model.hidden(row[None])[0, length : length + 2], rtol=1e-4, atol=1e-5)


def test_packing_that_does_not_fit() -> None:
    model, (tokens, _) = make(), batch(rows=1, length=30)
    with pytest.raises(ValueError, match=r"cu_seqlens must end with the packed length 30, got \[0, 20\]"):
        model(tokens, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
    with pytest.raises(ValueError, match="a sequence has 30 tokens; context_length is 24"):
        model(tokens, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"packed tokens must have shape \(1, T\), got \(2, 30\)"):
        model(tokens.expand(2, -1), cu_seqlens=torch.tensor([0, 30], dtype=torch.int32))
    with pytest.raises(ValueError, match="only one of cache and cu_seqlens can be given"):
        model.hidden(tokens[:, :20], KVCache(24), cu_seqlens=torch.tensor([0, 8, 20], dtype=torch.int32))


def test_logits_and_loss_together() -> None:
    model, (tokens, targets) = make(), batch()
    logits, value = model(tokens, targets, return_logits=True)
    torch.testing.assert_close(value, model(tokens, targets)[1])
    assert logits.shape == (2, 24, TINY.vocab_size)


def test_weights_are_tied_unless_asked() -> None:
    tied, untied = make(), make(VARIANTS["untied"])
    assert tied.output_weight is tied.token_embedding.weight
    assert "output.weight" not in tied.state_dict()
    assert untied.output_weight is not untied.token_embedding.weight
    assert tied.num_parameters() == sum(p.numel() for p in tied.parameters())


def test_initial_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, context_length=32, num_layers=4, num_heads=2, d_model=64)
    model = GPT(config)
    assert abs(model(*batch(config, 8, 32))[1].item() - math.log(500)) < 0.1
    writers = [p for name, p in model.named_parameters() if name.endswith(("out_proj.weight", "linear2.weight"))]
    assert len(writers) == 2 * config.num_layers
    for parameter in writers:
        assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model = make(GPTConfig(61, context_length=24, num_layers=1, num_heads=2, d_model=16, **{name: 0.5}))
    tokens, _ = batch()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    torch.testing.assert_close(model(tokens)[0], model(tokens)[0], rtol=0, atol=0)


def test_cached_generation_is_what_the_whole_sequence_gives() -> None:
    """Greedy and batched, past the end of the context, where the last half is read again."""
    model = make().eval()
    prompt, _ = batch(rows=3, length=5)
    tokens, window = prompt, prompt
    for _ in range(40):
        if window.shape[1] > TINY.context_length:
            window = window[:, -(TINY.context_length // 2) :]
        token = model(window)[0][:, -1].argmax(-1, keepdim=True)
        tokens, window = torch.cat([tokens, token], 1), torch.cat([window, token], 1)
    torch.testing.assert_close(model.generate(prompt, 40, temperature=0), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_in_pieces_through_the_cache(dtype: torch.dtype) -> None:
    model, (tokens, _) = make(dtype=dtype).eval(), batch()
    cache = KVCache(TINY.context_length)
    with torch.no_grad():
        exact = model.float().hidden(tokens)
        model.to(dtype)
        whole = model.hidden(tokens)
        pieces = torch.cat([model.hidden(piece, cache) for piece in tokens.split([7, 1, 9, 1, 6], dim=1)], dim=1)
    assert cache.length == 24
    assert (pieces - exact).abs().max() <= 2 * (whole - exact).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_reading_one_token_is_what_the_modules_give(
    name: str, rows: int, dtype: torch.dtype, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:  # as on a CPU where that pays
        monkeypatch.setattr(products, "_prefers_onednn", lambda *_: products.onednn_takes(dtype))
    model, (tokens, _) = make(FAMILIES[name], dtype=dtype).eval(), batch(FAMILIES[name], rows)
    results, caches = [], []
    with torch.inference_mode():
        assert can_read_tokens(model)
        reader = TokenReader(model, batch=rows if packed else 0)
        assert reader.output_weight.is_mkldnn == (packed and products.onednn_takes(dtype))
        for read in (reader, lambda token, cache: model.hidden(token[:, None], cache)[:, 0]):
            cache = KVCache(24)
            model.hidden(tokens[:, :5], cache)
            results.append(torch.stack([read(tokens[:, i], cache) for i in range(5, 24)]))
            assert cache.length == 24
            caches.append(torch.stack([torch.stack(pair) for pair in cache.blocks]).float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)
    torch.testing.assert_close(*caches, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[1].attention.register_forward_hook(lambda *_: None),
        lambda model: model.blocks[0].norm1.register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.blocks[0], "norm1", torch.nn.Sequential(model.blocks[0].norm1)),
        lambda model: setattr(model.norm, "forward", model.norm.forward),
        lambda model: model.blocks[0].double(),
        lambda model: setattr(model.blocks[0], "norm_first", False),
    ],
    ids=["hook", "pre-hook", "another module", "another forward", "another dtype", "norms behind"],
)
def test_a_changed_model_runs_through_its_modules(change) -> None:
    model = make()
    with torch.inference_mode():
        assert can_read_tokens(model)
        with fastattn.backend.use("triton"):
            assert not can_read_tokens(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert not can_read_tokens(model)
        change(model)
        assert not can_read_tokens(model)


def test_hooks_run_for_every_token() -> None:
    model, (prompt, _) = make().eval(), batch(length=4)
    expected, calls = model.generate(prompt, 10, temperature=0), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(None))
    assert torch.equal(model.generate(prompt, 10, temperature=0), expected)
    assert len(calls) == 10


def greedy(model: GPT, prompt: Tensor, new: int) -> Tensor:
    for _ in range(new):
        prompt = torch.cat([prompt, model(prompt)[0][:, -1:].argmax(2)], 1)
    return prompt


def test_a_subclass_generates_by_its_own_hidden() -> None:
    class Negated(GPT):
        def hidden(self, *args, **options):
            return -super().hidden(*args, **options)

    model, (prompt, _) = make().eval(), batch(length=4)
    model.__class__ = Negated
    assert torch.equal(model.generate(prompt, 5, temperature=0), greedy(model, prompt, 5))


def test_an_output_layer_that_is_more_than_its_weight_is_called() -> None:
    """A hook, as adapters have them, and a layer without a weight of its own, as quantised ones are."""
    plain, (tokens, targets) = make(VARIANTS["untied"]).eval(), batch(VARIANTS["untied"], length=8)
    doubled, expected = copy.deepcopy(plain), copy.deepcopy(plain)
    doubled.output.register_forward_hook(lambda module, inputs, output: 2 * output)
    expected.output.weight.data *= 2
    torch.testing.assert_close(doubled(tokens)[0], expected(tokens)[0])
    logits, loss = doubled(tokens, targets)
    assert logits is None
    torch.testing.assert_close(loss, expected(tokens, targets)[1])
    wrapped = copy.deepcopy(plain)
    wrapped.output = torch.nn.Sequential(plain.output)
    torch.testing.assert_close(wrapped(tokens)[0], plain(tokens)[0])
    for model in (doubled, wrapped):
        assert torch.equal(model.generate(tokens, 5, temperature=0), greedy(model, tokens, 5))


@pytest.mark.parametrize("name", VARIANTS)
def test_pruned_everywhere(name: str) -> None:
    """Pruning makes weights anew before each forward of a layer: a layer that is never called keeps the graph of the first."""
    model, (tokens, targets) = make(VARIANTS[name]), batch(VARIANTS[name])
    for module in list(model.modules()):
        if hasattr(module, "weight"):
            prune.random_unstructured(module, "weight", 0.5)
    for _ in range(2):
        model(tokens, targets)[1].backward()


def test_a_prompt_longer_than_the_context_is_cropped() -> None:
    model = make()
    prompt, _ = batch(length=40)
    whole = model.generate(prompt, 5, seed=0)
    torch.testing.assert_close(whole[:, :40], prompt)
    torch.testing.assert_close(whole[:, 16:], model.generate(prompt[:, 16:], 5, seed=0))


def test_a_seed_repeats_and_global_state_is_untouched() -> None:
    model = make().train()
    prompt, _ = batch(length=4)
    before = torch.get_rng_state()
    first, again, other = (model.generate(prompt, 15, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(model.generate(prompt, 15), model.generate(prompt, 15))
    streamed = list(model.stream(prompt, 15, seed=5))
    assert torch.equal(torch.stack(streamed, 1), first[:, 4:])
    assert not any(token.is_inference() for token in (first, *streamed))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_smallest_temperatures_are_greedy(options: dict[str, float]) -> None:
    model, (prompt, _) = make(), batch(length=4)
    greedy = model.generate(prompt, 10, temperature=0)
    for temperature in (1e-30, 1e-37, 1e-40, 1e-50, 5e-324):
        assert torch.equal(model.generate(prompt, 10, temperature=temperature, **options), greedy)


def test_modules_in_evaluation_mode_stay_in_it() -> None:
    model = make().train()
    model.blocks[0].eval()
    model.token_embedding.eval()
    modes = [module.training for module in model.modules()]
    model.generate(batch(length=4)[0], 3)
    next(model.stream(batch(length=4)[0], 3))  # and is closed
    assert [module.training for module in model.modules()] == modes
    attention_maps(model, batch(length=4)[0][0])
    assert [module.training for module in model.modules()] == modes


def test_a_model_of_the_meta_device() -> None:
    config = GPTConfig(vocab_size=50, num_heads=4, d_model=32, positions="rotary")
    with torch.device("meta"):
        model = GPT(config)
        assert model(torch.zeros(1, 4, dtype=torch.int64))[0].is_meta
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(torch.zeros(1, 4, dtype=torch.int64))[0].is_meta
    trained, tokens = GPT(config), torch.randint(50, (2, 7))
    model.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(model(tokens)[0], trained(tokens)[0])


def test_sampling_frequencies() -> None:
    """Draws follow the tempered softmax, restricted to the prefix that top-k or top-p keeps."""
    probabilities = torch.tensor([0.05, 0.4, 0.0, 0.15, 0.3, 0.1])
    logits = probabilities.log().expand(200_000, -1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
        drawn = sample(logits, temperature, top_k, top_p, generator)
        return torch.bincount(drawn, minlength=6) / len(drawn)

    def kept(*tokens: int) -> Tensor:
        mask = torch.zeros(6)
        mask[list(tokens)] = 1
        return probabilities * mask / (probabilities * mask).sum()

    squared = probabilities.square() / probabilities.square().sum()
    everything = (frequencies(), frequencies(temperature=0.5), frequencies(top_k=3), frequencies(top_p=0.65))
    expected = (probabilities, squared, kept(1, 4, 3), kept(1, 4))
    for drawn, exact in zip(everything, expected):
        assert (drawn - exact).abs().max() < 0.005
        assert (drawn[exact == 0] == 0).all()
    assert (frequencies(top_k=2, top_p=0.5) - kept(1)).abs().max() == 0  # 0.4 / 0.7 alone reaches one half
    assert (frequencies(temperature=0) - kept(1)).abs().max() == 0
    assert (frequencies(temperature=1e-30) - kept(1)).abs().max() == 0


def test_sampling_sums_integers() -> None:
    """A GPU refuses the cumulative sum of floats where PyTorch is to be deterministic: its last digits depend on the order."""
    with contract.recording("aten") as calls:
        sample(torch.randn(2, 50), 1.0, None, 0.9, torch.Generator())
    assert [arguments[0].dtype for op, arguments in calls if op.overloadpacket is torch.ops.aten.cumsum] == [
        torch.int64
    ]


def test_a_token_of_probability_zero_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by the smallest number that the generator gives, 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.zeros(*size))
    logits = torch.tensor([[-torch.inf, 0.0, 1.0]])
    assert sample(logits, 1.0, None, None, torch.Generator()).item() == 1


def test_saved_and_loaded(tmp_path) -> None:
    for name, config in VARIANTS.items():
        model = make(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        loaded = GPT.from_pretrained(tmp_path / name)
        assert loaded.config == config
        assert not loaded.training
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    assert GPT.from_pretrained(tmp_path / "default", dtype=torch.float32).norm.weight.dtype == torch.float32
    assert not list(tmp_path.rglob("*.tmp"))


def test_loading_names_what_is_wrong(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        GPT.from_pretrained(tmp_path)
    make(VARIANTS["no-bias"]).save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model": "Classifier"}, "holds a Classifier, not a GPT"),
        ({"wings": 2}, r"unknown settings \['wings'\]"),
        ({"d_model": 48}, "the tensors do not fit config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="is not a JSON object"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_heads": 5}, "d_model must be a multiple of num_heads, got 384 and 5"),
        ({"d_model": 1024, "num_heads": 2}, "must be at most 256, got 512"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ({"head_dim": 300}, "must be at most 256, got 300"),
        ({"positions": "rotary", "d_model": 30}, r"d_model / num_heads must be even with rotary positions, got 30 / 6"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim must be even with rotary positions, got 5"),
        ({"norm": "batch"}, "norm must be one of layer_norm, rms_norm, got 'batch'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"head_dim": -4}, "head_dim must be at least 1, got -4"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"norm_eps": -1}, "norm_eps must be at least 0 and finite, got -1"),
    ],
)
def test_bad_configurations(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**({"vocab_size": 10} | change))


def test_sizes_are_integers() -> None:
    for name, value in (("num_layers", 1.5), ("head_dim", 8.0), ("window", True)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {type(value).__name__}"):
            GPTConfig(**{"vocab_size": 10, name: value})
    assert type(GPTConfig(np.int64(10)).vocab_size) is int


def test_bad_calls() -> None:
    model, (tokens, targets) = make(), batch()
    for arguments, error, message in (
        ((tokens.int(),), TypeError, "tokens must be an int64 tensor, got dtype int32"),
        ((tokens[0],), ValueError, "tokens must have 2 dimensions"),
        ((torch.full((1, 2), 61),), ValueError, r"tokens must be in \[0, 61\)"),
        ((tokens, targets - 1000), ValueError, "targets must be in"),
        ((tokens, targets[:, 1:]), ValueError, "targets must have the shape of tokens"),
        ((tokens.repeat(1, 2),), ValueError, "context_length is 24"),
    ):
        with pytest.raises(error, match=message):
            model(*arguments)
    for settings, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, **({"max_new_tokens": 1} | settings))
    for settings in ({"max_new_tokens": 1.5}, {"top_k": 1.5}, {"seed": 1.5}, {"seed": 0.0}):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} must be an integer, got float"):
            model.generate(tokens, **({"max_new_tokens": 1} | settings))
    with pytest.raises(TypeError, match="tokens must be an int64 tensor, got list"):
        model.generate([[0]], 2)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(tokens[:, :0], 3)


def test_repetition_is_penalised_as_in_transformers() -> None:
    """Of positive and negative logits, of tokens that came twice; greedily, whatever came does not come again."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, tokens = torch.randn(3, 61), torch.randint(61, (3, 40))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits)
    torch.testing.assert_close(penalise_repetition(logits, tokens, 1.7), expected)
    prompt, _ = batch(length=4)
    for row in make().generate(prompt, 12, temperature=0, repetition_penalty=1e6)[:, 4:]:
        assert len(row.unique()) == 12


def test_empty_batch_and_no_new_tokens() -> None:
    model, (tokens, _) = make(), batch()
    assert model(tokens[:0])[0].shape == (0, 24, 61)
    assert torch.equal(model.generate(tokens, 0), tokens)


def train(config: GPTConfig, backend: str, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with fastattn.backend.use(backend):
        for step in range(steps):
            _, value = model(*batch(config, 2, config.context_length, seed=step % 2))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
    return losses


def test_triton_and_eager_train_alike() -> None:
    config = GPTConfig(vocab_size=40, context_length=32, num_layers=2, num_heads=2, d_model=32)
    eager, triton = train(config, "eager", 6), train(config, "triton", 6)
    assert eager[-1] < eager[0] - 0.2
    torch.testing.assert_close(torch.tensor(triton), torch.tensor(eager), rtol=2e-5, atol=0)


def test_autocast_trains_close_to_fp32() -> None:
    model, (tokens, targets) = make(), batch()
    exact = model(tokens, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, targets)[1]
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded.item() - exact.item()) < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
