"""The example classifier against an independent plain-PyTorch one with the same weights, and its treatment of padding."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models import Classifier, ClassifierConfig

SIZES = {"vocab_size": 50, "num_classes": 3, "context_length": 12, "num_heads": 2, "d_model": 16}
VARIANTS = {
    "pre-norm, learned, mean, bigrams": ClassifierConfig(**SIZES, bigram_buckets=64),
    "post-norm, sinusoidal, cls": ClassifierConfig(
        **SIZES, norm_first=False, positions="sinusoidal", pooling="cls", activation="relu"
    ),
    "attention pooling, no bias": ClassifierConfig(
        **SIZES, num_layers=1, pooling="attention", bias=False, label_smoothing=0.2
    ),
}


def make(config: ClassifierConfig) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(config)
    for parameter in model.parameters():  # away from zero biases and unit norms, which would hide their misuse
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([12, 5, 1, 9])
    return torch.randint(50, (4, 12)), torch.arange(12) < lengths[:, None], torch.tensor([0, 2, 1, 1])


def reference_logits(state: dict[str, Tensor], config: ClassifierConfig, tokens: Tensor) -> Tensor:
    """The classifier written out for one text without padding, (T,) → (num_classes,)."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].mT + state.get(f"{name}.bias", 0.0)

    def attend(x: Tensor, name: str) -> Tensor:
        heads = linear(x, f"{name}.in_proj").view(len(x), 3, config.num_heads, -1)
        query, key, value = heads.permute(1, 2, 0, 3)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return linear((weights @ value).permute(1, 0, 2).flatten(1), f"{name}.out_proj")

    def feed_forward(x: Tensor, name: str) -> Tensor:
        inner = linear(x, f"{name}.linear1")
        inner = inner.clamp_min(0) if config.activation == "relu" else F.gelu(inner, approximate="tanh")
        return linear(inner, f"{name}.linear2")

    x = state["token_embedding.weight"][tokens]
    if config.bigram_buckets:
        following = torch.cat([tokens[1:], tokens.new_zeros(1)])
        x = x + state["bigram_embedding.weight"][(tokens * 1_000_003 + following * 7_919) % config.bigram_buckets]
    if config.positions == "sinusoidal":
        x = x * math.sqrt(config.d_model)
    if config.pooling == "cls":
        x = torch.cat([state["cls"][0], x])
    if config.positions == "sinusoidal":
        rows = []
        for position in range(len(x)):
            angles = [position / 10_000 ** (2 * (i // 2) / config.d_model) for i in range(config.d_model)]
            rows.append([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)])
        x = x + torch.tensor(rows, dtype=x.dtype)
    else:
        x = x + state["position_embedding.weight"][: len(x)]
    for index in range(config.num_layers):
        name = f"blocks.{index}"
        if config.norm_first:
            x = x + attend(norm(x, f"{name}.norm1"), f"{name}.attention")
            x = x + feed_forward(norm(x, f"{name}.norm2"), f"{name}.feed_forward")
        else:
            x = norm(x + attend(x, f"{name}.attention"), f"{name}.norm1")
            x = norm(x + feed_forward(x, f"{name}.feed_forward"), f"{name}.norm2")
    x = norm(x, "norm") if config.norm_first else x
    if config.pooling == "cls":
        pooled = x[0]
    elif config.pooling == "mean":
        pooled = x.mean(0)
    else:
        pooled = (linear(x, "score").softmax(0) * x).sum(0)
    return linear(pooled, "output")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_unpadded_texts(config: ClassifierConfig) -> None:
    model, (tokens, mask, targets) = make(config), batch()
    exact = {name: p.detach().double().requires_grad_() for name, p in model.state_dict(keep_vars=True).items()}
    rows = [reference_logits(exact, config, row[keep]) for row, keep in zip(tokens, mask)]
    expected_loss = F.cross_entropy(torch.stack(rows), targets, label_smoothing=config.label_smoothing)
    expected_loss.backward()
    logits, loss = model(tokens, mask, targets)
    torch.testing.assert_close(logits.double(), torch.stack(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - exact[name].grad).abs().max()
        assert error <= 1e-4 * exact[name].grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_padding_does_not_matter(config: ClassifierConfig) -> None:
    model, (tokens, mask, _) = make(config), batch()
    other = torch.where(mask, tokens, (tokens + 7) % 50)
    torch.testing.assert_close(model(other, mask)[0], model(tokens, mask)[0], rtol=0, atol=0)
    torch.testing.assert_close(model(tokens[1:2, :5])[0], model(tokens, mask)[0][1:2])
    nothing = torch.zeros_like(mask)
    assert model(tokens, nothing)[0].isfinite().all()


def test_it_learns_whether_a_word_occurs() -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(vocab_size=50, num_classes=2, context_length=12, num_layers=1, num_heads=2, d_model=16)
    model = Classifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens = torch.randint(1, 50, (64, 12))
        tokens[::2, 5] = 7
        _, loss = model(tokens, targets=(tokens == 7).any(1).long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2


def test_saved_and_loaded(tmp_path) -> None:
    tokens, mask, _ = batch()
    for index, config in enumerate(VARIANTS.values()):
        model = make(config)
        model.save_pretrained(tmp_path / str(index))
        loaded = Classifier.from_pretrained(tmp_path / str(index))
        assert loaded.config == config
        assert torch.equal(loaded(tokens, mask)[0], model(tokens, mask)[0])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_built_on_meta_and_in_bf16(config: ClassifierConfig) -> None:
    model, (tokens, mask, targets) = make(config), batch()
    expected = model(tokens, mask)[0]
    with torch.device("meta"):
        empty = Classifier(config).eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(tokens, mask)[0], expected)
    logits, loss = model.bfloat16()(tokens, mask, targets)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"positions": "relative"}, "positions must be one of learned, sinusoidal, got 'relative'"),
        ({"activation": "x"}, "activation must be one of .* got 'x'"),
        ({"pooling": "max"}, "pooling must be one of mean, cls, attention, got 'max'"),
        ({"positions": "sinusoidal", "d_model": 15, "num_heads": 1}, "d_model must be even"),
        ({"bigram_buckets": -1}, "bigram_buckets must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"vote_share": 1.5}, r"vote_share must be in \[0, 1\]"),
        ({"ngram_votes": -1}, "ngram_votes must be at least 0"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
    ],
)
def test_bad_configurations(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**(SIZES | change))


def test_bad_calls() -> None:
    model, (tokens, mask, _) = make(VARIANTS["attention pooling, no bias"]), batch()
    for arguments, error, message in (
        ((tokens.int(),), TypeError, "tokens must be an int64 tensor, got dtype int32"),
        ((tokens[0],), ValueError, "tokens must have 2 dimensions"),
        ((tokens.repeat(1, 2),), ValueError, "context_length is 12"),
        ((tokens, mask.long()), TypeError, "mask must be a bool tensor, got dtype int64"),
        ((tokens, mask[:, 1:]), ValueError, "mask must have the shape of tokens"),
        ((tokens + 1000,), ValueError, r"tokens must be in \[0, .*\(vocab_size\)"),
        ((-1 - tokens, mask), ValueError, r"tokens must be in \[0, "),
        (
            (tokens, mask, torch.full((len(tokens),), 9)),
            ValueError,
            r"targets must be in \[0, .*\(num_classes\), got 9",
        ),
        ((tokens, mask, torch.zeros(len(tokens))), TypeError, "targets must be an int64 tensor, got dtype float32"),
        ((tokens, mask, tokens), ValueError, r"targets must have 1 dimensions \(batch\)"),
    ):
        with pytest.raises(error, match=message):
            model(*arguments)
    padded = tokens.masked_fill(~mask, -7)
    assert torch.equal(model(padded, mask)[0], model(tokens, mask)[0])


def ngrams_of(row: list[int]) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + n]) for n in (1, 2, 3) for i in range(len(row) - n + 1)}


def test_votes_of_ngrams(tmp_path: Path) -> None:
    """Against counting by hand: which n-grams are known, how they vote, beside the encoder, saved and loaded."""
    config = ClassifierConfig(**SIZES | {"vocab_size": 6}, ngram_votes=60, vote_share=0.7)
    model = make(config)
    lengths = torch.tensor([12, 5, 1, 9, 2, 12])
    tokens, mask = torch.randint(6, (6, 12)), torch.arange(12) < lengths[:, None]
    labels = torch.tensor([0, 2, 1, 1, 2, 0])
    texts = [ngrams_of(row[keep].tolist()) for row, keep in zip(tokens, mask)]
    seen = {
        g: [sum(g in text and label == c for text, label in zip(texts, labels)) for c in range(3)]
        for g in set().union(*texts)
    }
    known = {g: [n + 1 for n in counts] for g, counts in seen.items() if sum(counts) >= 2}
    batches = [(tokens[:4], mask[:4], labels[:4]), (tokens[4:, :12], mask[4:], labels[4:])]
    assert model.votes.learn_ngrams(batches, least=2) == len(known) < 60
    totals = [sum(counts[c] for counts in known.values()) for c in range(3)]
    model.votes.weight.data.fill_(0.5)
    for row, text in enumerate(texts):
        log_p = torch.tensor([[math.log(known[g][c] / totals[c]) for c in range(3)] for g in text if g in known])
        expected = 0.5 * (log_p - log_p.mean(1, keepdim=True)).sum(0) + model.votes.bias
        torch.testing.assert_close(model.votes(tokens, mask)[row], expected, rtol=1e-4, atol=1e-5)
    encoder = Classifier(dataclasses.replace(config, ngram_votes=0)).eval()
    encoder.load_state_dict(model.state_dict(), strict=False)
    apart = encoder(tokens, mask, labels), model.votes(tokens, mask)
    logits, loss = model(tokens, mask, labels)
    torch.testing.assert_close(logits, 0.3 * apart[0][0] + 0.7 * apart[1])
    torch.testing.assert_close(loss, (apart[0][1] + F.cross_entropy(apart[1], labels)) / 2)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Classifier.from_pretrained(tmp_path)(tokens, mask)[0], logits, rtol=0, atol=0)
    assert model.votes.learn_ngrams(batches[:1], least=2) < len(known)
    few = Classifier(dataclasses.replace(config, ngram_votes=3))
    assert few.votes.learn_ngrams(batches, least=1) == 3
