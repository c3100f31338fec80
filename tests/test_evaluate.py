"""examples/evaluate.py: each measure against numbers worked out by hand or from the model alone."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig

pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture
def gpt(tmp_path: Path, scripts: None) -> Path:
    import corpus

    folder = tmp_path / "gpt"
    tokenizer = corpus.train_tokenizer("red green blue is the colour of the sky? \n" * 20, 300)
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.get_vocab_size(), context_length=32, num_layers=1, num_heads=2, d_model=16)
    model = GPT(config)
    for parameter in model.parameters():  # so that it has opinions
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path, colours = tmp_path / "questions.jsonl", [" red", " green", " blue"]
    rows = [{"prompt": f"{n} sky is", "completion": colours[n % 3], "answers": [" grey"]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str], scripts: None, tmp_path: Path) -> Callable[..., Any]:
    """The result; or, where another exit status is expected, the message."""
    import evaluate

    def call(model: Path, data: object, *more: object, status: int = 0) -> Any:
        out = tmp_path / "result.json"
        given = (model, "--data", data, "--out", out, "--device", "cpu", *more)
        assert evaluate.main([str(argument) for argument in given]) == status
        printed = "".join(capfd.readouterr())
        return json.loads(out.read_text()) if status == 0 else printed

    return call


def test_perplexity_and_accuracy(evaluate: Callable[..., Any], gpt: Path, questions: Path) -> None:
    """Against the model read one example and one choice at a time."""
    pytest.importorskip("sklearn")
    import corpus

    result = evaluate(gpt, questions, "--metrics", "perplexity,accuracy")
    model, tokenizer = GPT.from_pretrained(gpt), corpus.load_tokenizer(gpt)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    choices = sorted({row["completion"] for row in rows})
    total, tokens, predicted = 0.0, 0, []
    for row in rows:
        scores = []
        for choice in choices:
            prompt = tokenizer.encode(row["prompt"]).ids
            ids = torch.tensor([*prompt, *tokenizer.encode(choice).ids, tokenizer.token_to_id(corpus.END_OF_TEXT)])
            log_p = model(ids[None, :-1])[0][0].log_softmax(-1).gather(1, ids[1:, None])[len(prompt) - 1 :]
            scores.append(log_p.sum().item())
            if choice == row["completion"]:
                total, tokens = total - scores[-1], tokens + len(log_p)
        predicted.append(choices[int(np.argmax(scores))])
    assert result["tokens"] == tokens
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result["accuracy"] == np.mean([row["completion"] == said for row, said in zip(rows, predicted)])
    assert result["most_frequent_class"] == pytest.approx(1 / 3)
    for truth, counts in zip(choices, result["confusion"]):
        said = [word for row, word in zip(rows, predicted) if row["completion"] == truth]
        assert counts == [said.count(choice) for choice in choices]


ANSWERS = ["The red", "grey", "blue green"]  # wanted: red, green or grey, blue
METRICS = {
    "squad": ("torchmetrics", {"exact_match": 200 / 3, "f1": (100 + 100 + 200 / 3) / 3}),
    "rouge": ("rouge_score", {"rouge1": (2 / 3 + 1 + 2 / 3) / 3, "rouge2": 0.0, "rougeL": (2 / 3 + 1 + 2 / 3) / 3}),
    "bleu": ("sacrebleu", {}),
    "chrf": ("sacrebleu", {}),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_answers_are_compared(
    evaluate: Callable[..., Any], gpt: Path, questions: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import completions

    package, expected = METRICS[metric]
    pytest.importorskip(package)
    monkeypatch.setattr(completions, "answer", lambda *_: ANSWERS)
    result = evaluate(gpt, questions, "--metrics", metric, "--limit", 3)
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    if metric in ("bleu", "chrf"):
        monkeypatch.setattr(completions, "answer", lambda *_: [" red", "green", "blue"])
        right = evaluate(gpt, questions, "--metrics", metric, "--limit", 3)[metric]
        assert 0 < result["chrf"] < right if metric == "chrf" else result["bleu"] <= right
        assert "nrefs:2" in result[f"{metric}_signature"] or "nrefs:var" in result[f"{metric}_signature"]


@pytest.mark.parametrize(
    ("metric", "package"), [("bleu", "sacrebleu"), ("rouge", "rouge-score"), ("squad", "torchmetrics")]
)
def test_a_missing_package_comes_with_its_install_line(
    evaluate: Callable[..., Any], gpt: Path, questions: Path, metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "sacrebleu",
        "rouge_score",
        "rouge_score.rouge_scorer",
        "torchmetrics",
        "torchmetrics.functional.text",
    ):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    message = evaluate(gpt, questions, "--metrics", metric, status=1)
    assert f"the metric {metric} needs a package: pip install {package}" in message


def test_plain_text_and_bad_data(evaluate: Callable[..., Any], gpt: Path, tmp_path: Path) -> None:
    import corpus

    text = tmp_path / "book.txt"
    text.write_text("the sky is blue. " * 30)
    count = len(corpus.load_tokenizer(gpt).encode(text.read_text()).ids) + 1  # the end of the text
    assert evaluate(gpt, f"text:{text}")["tokens"] == count
    assert "different completions; the data has 1" in evaluate(gpt, f"text:{text}", "--metrics", "accuracy", status=1)
    assert "is neither a .jsonl file nor a task" in evaluate(gpt, "nowhere", status=1)
    assert "holds no config.json" in evaluate(tmp_path, "nowhere", status=1)


def test_a_classifier(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    """The data's classes are fewer than the model's, in another order."""
    pytest.importorskip("sklearn")
    import labelled

    texts = [f"number {n} is {'good' if n % 3 else 'bad'}" for n in range(70)]
    tokenizer, folder = labelled.train_tokenizer(texts, 100), tmp_path / "classifier"
    torch.manual_seed(0)
    model = Classifier(
        ClassifierConfig(tokenizer.get_vocab_size(), 3, context_length=8, num_heads=2, d_model=16)
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "labels.json").write_text('["neither", "good", "bad"]')
    data = tmp_path / "reviews.jsonl"
    rows = [{"text": text, "label": text.split()[-1]} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(folder, data)
    confusion = np.zeros((3, 3), dtype=int)
    for row in rows:
        logits, _ = model(torch.tensor([tokenizer.encode(row["text"]).ids]))
        confusion[["neither", "good", "bad"].index(row["label"]), logits.argmax()] += 1
    assert result["confusion"] == confusion.tolist()
    assert result["accuracy"] == pytest.approx(confusion.trace() / 70)
    assert len(set(confusion.sum(0).tolist())) > 1
    assert evaluate(folder, data, "--held-out", 10)["examples"] == 10
    data.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "good"}\n')
    assert "has the classes ['x'], which the model does not know" in evaluate(folder, data, status=1)
