"""Measure a trained model on examples that it has not seen.

    python examples/evaluate.py runs/finetuned --data runs/finetuned/val.jsonl --metrics perplexity,accuracy
    python examples/evaluate.py runs/qa --data questions.jsonl --metrics squad                       exact match and F1
    python examples/evaluate.py runs/translation --data pairs.jsonl --metrics bleu,chrf
    python examples/evaluate.py runs/gpt --data text:book.txt                                        perplexity of plain text
    python examples/evaluate.py runs/classifier --data reviews.csv                                   accuracy, F1, confusion

A GPT reads what finetune_gpt.py reads. `perplexity` is that of the completions' tokens; `accuracy` takes the likeliest of
all completions that occur in the data; the other metrics compare the greedy answer with the completion (and with the
further `answers`). A classifier reads what train_classifier.py reads; of the data that it was trained on, it gets the texts
that were held out. The result is a table, and JSON in --out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import completions
import corpus
import labelled
import numpy as np
import torch
import training
from completions import Example
from corpus import DataError
from labelled import Labelled
from tokenizers import Tokenizer
from training import TrainingError

from fastattn.models import GPT
from fastattn.models.pretrained import atomic_write

MOST_CHOICES = 100


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="folder of a GPT or of a classifier")
    add("--data", required=True, help="examples, see finetune_gpt.py; for a classifier see train_classifier.py")
    add("--metrics", help=f"of a GPT, with commas: {', '.join(METRICS)} (perplexity)")
    add("--limit", type=int, help="measure that many examples only, the first ones")
    add(
        "--held-out",
        type=int,
        help="classifier: that many texts, held out as its training does (default: the texts that it held out of this "
        "--data; all, if it was trained on other data)",
    )
    add("--max-new-tokens", type=int, default=64, help="longest answer (%(default)s)")
    add("--out", type=Path, help="file for the result (default: evaluation.json in the model's folder)")
    add("--device", default="auto", help="auto takes the GPU if there is one")
    arguments = parser.parse_args(argv)
    arguments.metrics = arguments.metrics and arguments.metrics.split(",")
    if unknown := [name for name in arguments.metrics or () if name not in METRICS]:
        parser.error(f"--metrics has {', '.join(unknown)}; known: {', '.join(METRICS)}")
    for name in ("limit", "held_out", "max_new_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def need(module: str, package: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"the metric {metric} needs a package: pip install {package}") from error


@dataclass
class Subject:
    """A GPT and the examples that it is measured on."""

    model: GPT
    tokenizer: Tokenizer
    examples: list[Example]
    max_new_tokens: int

    @cached_property
    def said(self) -> list[str]:
        """The greedy answer to each prompt."""
        prompts = completions.encode_prompts(self.tokenizer, self.examples, self.model.config.context_length)
        answers = completions.answer(self.model, self.tokenizer, prompts, self.max_new_tokens)
        return [text.strip() for text in answers]

    @property
    def accepted(self) -> list[list[str]]:
        """The answers that count as right."""
        return [[text.strip() for text in (e.completion, *e.answers)] for e in self.examples]


def perplexity(subject: Subject) -> dict[str, float]:
    length = subject.model.config.context_length
    sequences, cut = completions.encode(subject.tokenizer, subject.examples, length)
    tokens = sum(len(sequence.ids) - sequence.start for sequence in sequences)
    loss = -completions.log_likelihoods(subject.model, sequences).sum() / tokens
    result = {"loss": float(loss), "perplexity": math.exp(loss), "tokens": tokens}
    return result | {"completions_cut_to_the_context": cut} if cut else result


def accuracy(subject: Subject) -> dict[str, Any]:
    """Of the likeliest among all completions that occur, the end of the text included."""
    names = sorted({example.completion for example in subject.examples})
    if not 2 <= len(names) <= MOST_CHOICES:
        raise DataError(f"accuracy chooses among 2 to {MOST_CHOICES} different completions; the data has {len(names)}")
    if not all(example.prompt for example in subject.examples):
        raise DataError("accuracy needs a prompt in every example")
    metrics = need("sklearn.metrics", "scikit-learn", "accuracy")
    choices = [Example(example.prompt, name) for example in subject.examples for name in names]
    sequences, _ = completions.encode(subject.tokenizer, choices, subject.model.config.context_length)
    scores = completions.log_likelihoods(subject.model, sequences).reshape(-1, len(names))
    truth = [names.index(example.completion) for example in subject.examples]
    return classification(metrics, truth, scores.argmax(1).tolist(), [name.strip() for name in names])


def classification(metrics: Any, truth: list[int], predicted: list[int], names: list[str]) -> dict[str, Any]:
    classes = list(range(len(names)))
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "most_frequent_class": max(Counter(truth).values()) / len(truth),
        "macro_f1": float(metrics.f1_score(truth, predicted, labels=classes, average="macro", zero_division=0.0)),
        "classes": names,
        "confusion": metrics.confusion_matrix(truth, predicted, labels=classes).tolist(),
    }


def squad(subject: Subject) -> dict[str, float]:
    """Exact match and F1 of the words, in percent, by the rules of SQuAD (Rajpurkar et al., 2016)."""
    text = need("torchmetrics.functional.text", "torchmetrics", "squad")
    said = [{"prediction_text": answer, "id": str(i)} for i, answer in enumerate(subject.said)]
    wanted = [
        {"answers": {"answer_start": [0] * len(accepted), "text": accepted}, "id": str(i)}
        for i, accepted in enumerate(subject.accepted)
    ]
    return {name: float(value) for name, value in text.squad(said, wanted).items()}


def _references(subject: Subject) -> list[list[str | None]]:
    """sacrebleu's form: the first reference of every example, then the second where there is one, ..."""
    accepted = subject.accepted
    return [[each[i] if i < len(each) else None for each in accepted] for i in range(max(map(len, accepted)))]


def bleu(subject: Subject) -> dict[str, Any]:
    library = need("sacrebleu", "sacrebleu", "bleu")
    metric = library.BLEU()
    score = metric.corpus_score(subject.said, _references(subject)).score
    return {"bleu": score, "bleu_signature": str(metric.get_signature())}


def chrf(subject: Subject) -> dict[str, Any]:
    library = need("sacrebleu", "sacrebleu", "chrf")
    metric = library.CHRF()
    score = metric.corpus_score(subject.said, _references(subject)).score
    return {"chrf": score, "chrf_signature": str(metric.get_signature())}


def rouge(subject: Subject) -> dict[str, float]:
    """Mean F-measures, with stemming; of several references the best counts."""
    library = need("rouge_score.rouge_scorer", "rouge-score", "rouge")
    names = ("rouge1", "rouge2", "rougeL")
    scorer = library.RougeScorer(names, use_stemmer=True)
    scores = [scorer.score_multi(wanted, said) for wanted, said in zip(subject.accepted, subject.said)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


METRICS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "perplexity": perplexity,
    "accuracy": accuracy,
    "squad": squad,
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
}


def evaluate_gpt(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    tokenizer = corpus.load_tokenizer(arguments.model)
    model = GPT.from_pretrained(arguments.model, device=device, dtype=torch.float32)
    examples = completions.read(arguments.data)[: arguments.limit]
    subject = Subject(model, tokenizer, examples, arguments.max_new_tokens)
    result: dict[str, Any] = {"examples": len(examples)}
    for name in arguments.metrics or ["perplexity"]:
        result |= METRICS[name](subject)
    return result


def unseen(arguments: argparse.Namespace, data: Labelled) -> tuple[Labelled, str]:
    """The texts that a classifier is measured on, and which these are, in words."""
    run, size, count = labelled.trained_on(arguments.model), arguments.held_out, len(data.texts)
    own = run is not None and run["sha256"] == data.digest()
    if size:
        _, test = data.split(size, seed=0)  # the first of them are the test texts of a training on this data
        told = f"{size:,} of {count:,} texts, chosen by --held-out"
        if run is not None and own and size > run["test_size"]:
            told += f"; only {run['test_size']:,} of these are test texts of the training"
        return test, told
    if run is not None and own:
        _, test = labelled.parts(data, run["test_size"], run["validate"])
        return test, f"the {len(test.texts):,} of {count:,} texts that the training held out"
    if run is None:
        return data, f"all {count:,} texts; no checkpoint.pt in the model's folder tells whether it was trained on them"
    return data, f"all {count:,} texts; this is not the data that the model was trained on"


def evaluate_classifier(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if arguments.metrics:
        raise DataError("--metrics is of a GPT; a classifier's accuracy, F1 and confusion are always measured")
    metrics = need("sklearn.metrics", "scikit-learn", "accuracy")
    model, tokenizer, names = labelled.load_classifier(arguments.model, device)
    data = labelled.read(arguments.data)
    data, measured = unseen(arguments, data)
    if arguments.limit and arguments.limit < len(data.texts):
        data = data.select(np.arange(arguments.limit))
        measured = f"the first {arguments.limit:,} of {measured}"
    training.say(f"measures {measured}")
    if unknown := sorted(set(data.names) - set(names)):
        raise DataError(f"the data has the classes {unknown}, which the model does not know: {names}")
    tokens = labelled.encode(tokenizer, data.texts, model.config.context_length)
    predicted = labelled.probabilities(model, tokens).argmax(1).tolist()
    truth = [names.index(data.names[label]) for label in data.labels]
    return {"examples": len(truth), "measured": measured} | classification(metrics, truth, predicted, names)


def table(result: dict[str, Any]) -> str:
    """A line for each number; the confusion matrix below."""
    lines = []
    for name, value in result.items():
        if name not in ("measured", "classes", "confusion"):
            lines.append(f"  {name:<32} {value:.4f}" if isinstance(value, float) else f"  {name:<32} {value}")
    if "confusion" in result:
        width = max(8, *(len(name) + 1 for name in result["classes"]))
        lines.append("confusion (rows: truth, columns: prediction)")
        lines.append(" " * width + "".join(f"{name:>{width}}" for name in result["classes"]))
        for name, row in zip(result["classes"], result["confusion"]):
            lines.append(f"{name:>{width}}" + "".join(f"{count:>{width}}" for count in row))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        device = training.choose_device(arguments.device)
        if arguments.out:
            training.make_place(arguments.out)
        evaluate = evaluate_classifier if labelled.is_classifier(arguments.model) else evaluate_gpt
        result = evaluate(arguments, device)
        path = arguments.out or arguments.model / "evaluation.json"
        with atomic_write(path) as file:
            settings = {"model": str(arguments.model), "data": arguments.data}
            file.write(json.dumps(settings | result, indent=2).encode() + b"\n")
        training.say(f"{arguments.model} on {arguments.data}\n{table(result)}\nwritten to {path}")
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
