"""attention_maps of the example models, examples/attention_map.py, and the map that serve.py sends."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig, attention_maps
from fastattn.models.layers import SelfAttention

SIZES = {"context_length": 24, "num_layers": 2, "num_heads": 4, "d_model": 16}
LLAMA = {"positions": "rotary", "norm": "rms_norm", "gated": True, "num_kv_heads": 2, "window": 5}
MODELS: dict[str, Callable[[], GPT | Classifier]] = {
    "GPT": lambda: GPT(GPTConfig(50, **SIZES)),
    "Llama, window": lambda: GPT(GPTConfig(50, **SIZES, **LLAMA)),
    "classifier, mean": lambda: Classifier(ClassifierConfig(50, 2, **SIZES)),
    "classifier, cls": lambda: Classifier(ClassifierConfig(50, 2, **SIZES, pooling="cls", norm_first=False)),
}


def with_opinions(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_maps_summarise_the_matrices_that_the_model_multiplied_with(make: Callable[[], Any]) -> None:
    model = with_opinions(make()).eval()
    causal, cls = isinstance(model, GPT), int(getattr(model.config, "pooling", "") == "cls")
    seen: list[tuple[Any, ...]] = []
    hooks = [
        m.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
        for m in model.modules()
        if isinstance(m, SelfAttention)
    ]
    tokens = torch.randint(50, (20,))
    model.hidden(tokens[None])
    for hook in hooks:
        hook.remove()
    maps = attention_maps(model, tokens)
    assert (maps.last is not None) == bool(causal or cls)
    for layer, (module, (x,), options, out) in enumerate(seen):
        query, key, value = (t[0].double() for t in module.heads(x, rotary=options.get("rotary")))
        key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
        scores, length = query @ key.mT / query.shape[-1] ** 0.5, query.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        visible = (distance >= 0) | (not causal)
        if getattr(model.config, "window", None):
            visible &= distance < model.config.window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        expected = module.out_proj((weights @ value).transpose(0, 1).flatten(1).float())
        torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)
        mean = (weights.sum(1) / visible.sum(0)).float()
        torch.testing.assert_close(maps.received[layer], mean[:, cls:], rtol=1e-4, atol=1e-6)
        if maps.last is not None:
            row = weights[:, -1 if causal else 0].float()
            torch.testing.assert_close(maps.last[layer], row[:, cls:], rtol=1e-4, atol=1e-6)


def test_maps_leave_the_model_as_it_was() -> None:
    model = MODELS["GPT"]().train()
    token = torch.zeros(1, dtype=torch.int64)
    for bad, error, message in (
        (token[None], ValueError, "tokens must have 1 dimension"),
        (token[:0], ValueError, "tokens must hold at least one token, got length 0"),
        (token.expand(25), ValueError, "tokens has 25 positions"),
        (token - 1, ValueError, r"tokens must be in \[0, .*\(vocab_size\), got -1"),
        (token.float(), TypeError, "tokens must be an int64 tensor, got dtype float32"),
    ):
        with pytest.raises(error, match=message):
            attention_maps(model, bad)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def reviewer(tmp_path: Path, scripts: None) -> Path:
    """An untrained classifier of 8 tokens, as train_classifier.py saves one."""
    import labelled

    words = labelled.train_tokenizer(["a good film, a bad film"], 100)
    config = ClassifierConfig(words.get_vocab_size(), 2, context_length=8, num_layers=2, num_heads=2, d_model=16)
    with_opinions(Classifier(config)).save_pretrained(tmp_path / "reviews")
    (tmp_path / "reviews" / "tokenizer.json").write_text(words.to_str())
    (tmp_path / "reviews" / "labels.json").write_text('["bad", "good"]')
    return tmp_path / "reviews"


def call(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    import attention_map

    code = attention_map.main([str(argument) for argument in arguments])
    printed = "".join(capsys.readouterr())
    assert code == status, printed
    return printed


def test_the_script_draws_a_text_and_a_page(reviewer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "A <good> film,\n   bad"
    assert "attention received, most first: " in call(capsys, reviewer, "--text", text)
    assert (reviewer / "attention.png").read_bytes().startswith(b"\x89PNG")
    page = (reviewer / "attention.html").read_text()
    shown = re.search(r'<p id="text">(.*?)</p>', page, re.DOTALL)
    assert shown is not None
    assert re.sub("</?span>", "", shown[1]) == text.replace("<", "&lt;").replace(">", "&gt;")
    (maps,) = re.findall(r"const maps = (.*);", page)
    assert np.array(json.loads(maps)["received"]).shape == (4, shown[1].count("<span>"))
    assert "http" not in page


@pytest.mark.parametrize("window", [None, 3])
def test_a_model_that_attends_to_all_alike_is_even(window: int | None) -> None:
    """Without queries all scores are 0."""
    import attention_map
    import corpus

    config = GPTConfig(vocab_size=300, context_length=16, num_layers=2, num_heads=2, d_model=8, window=window)
    model = GPT(config)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.in_proj.weight)
    tokenizer = corpus.train_tokenizer("a b c d", 300)
    found = attention_map.map_text(model, tokenizer.encode("a b c d e f g h"), "a b c d e f g h")
    np.testing.assert_allclose(found.relative("received"), 1.0, rtol=1e-5)
    seen = found.relative("last")
    np.testing.assert_allclose(seen[-(window or len(seen)) :], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(seen[: len(seen) - (window or len(seen))], 0.0)


def test_a_long_text_keeps_both_ends(reviewer: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("good start " + "film " * 20 + "bad end")
    printed = call(capsys, reviewer, "--file", tmp_path / "long.txt", "--out", tmp_path / "new" / "map")
    assert "has 24 tokens, of which the model reads 8" in printed
    page = (tmp_path / "new" / "map.html").read_text()
    assert page.count(" [...] ") == 1
    assert "<span>good</span> <span>start</span>" in page
    assert "<span>bad</span> <span>end</span></p>" in page


def test_what_cannot_be_drawn(reviewer: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "the text is empty" in call(capsys, reviewer, "--text", " ", status=1)
    assert "holds no config.json" in call(capsys, tmp_path, "--text", "a", status=1)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert "is not UTF-8" in call(capsys, reviewer, "--file", tmp_path / "latin.txt", status=1)
