"""Train a transformer to tell texts apart: positive from negative reviews, or whatever your file says.

    python examples/train_classifier.py                            IMDb reviews, preset "quick": under 5 minutes on two cores
    python examples/train_classifier.py --preset best              reads 512 words instead of 256: the most accurate here
    python examples/train_classifier.py --preset original          the plain transformer of many tutorials, 10 epochs
    python examples/train_classifier.py --data mine.csv            your own .csv or .jsonl with the fields text and label

The folder --out receives the model after every epoch (config.json, model.safetensors, tokenizer.json, labels.json),
checkpoint.pt for --resume, metrics.jsonl, report.json, and report.html with the curves. The test texts are never trained on, and nothing
is chosen by their accuracy: the last epoch counts, and settings are compared with --validate, which does not look at them.
They are also given to a logistic regression on single words and pairs of words, a baseline that many neural networks do not reach.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, cast

import labelled
import numpy as np
import torch
import training
from labelled import Labelled
from report import write_report
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from training import TrainingError

from fastattn import linear_cross_entropy
from fastattn.models import Classifier, ClassifierConfig
from fastattn.models.pretrained import atomic_write

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "model": {
            "vocab_size": 30_000, "context_length": 256, "num_layers": 1, "num_heads": 4, "d_model": 64,
            "dropout": 0.3, "bigram_buckets": 2**17, "ngram_votes": 400_000,
        },
        "epochs": 2, "pretrain_epochs": 0, "batch_size": 32, "lr": 1e-3, "pretrain_lr": 2e-3, "weight_decay": 0.1,
        "average": 0.998, "word_dropout": 0.3,
        "dtype": "fp32",  # so small that converting to bf16 and back costs more than it saves
    },
    "best": {
        "model": {
            "vocab_size": 30_000, "context_length": 512, "num_layers": 1, "num_heads": 4, "d_model": 64,
            "dropout": 0.3, "bigram_buckets": 2**17, "ngram_votes": 400_000, "label_smoothing": 0.1,
        },
        "epochs": 2, "pretrain_epochs": 0, "batch_size": 32, "lr": 1e-3, "pretrain_lr": 3e-3, "weight_decay": 0.1,
        "average": 0.998, "word_dropout": 0.3,
        "dtype": "fp32",
    },
    "original": {
        "model": {
            "vocab_size": 10_000, "context_length": 60, "num_layers": 1, "num_heads": 8, "d_model": 512, "d_ff": 2048,
            "dropout": 0.1, "activation": "relu", "norm_first": False, "positions": "sinusoidal",
        },
        "epochs": 10, "pretrain_epochs": 0, "batch_size": 64, "lr": 1e-4, "pretrain_lr": 1e-4, "weight_decay": 0.0,
        "average": 0.0, "word_dropout": 0.0,
        "dtype": "auto",
    },
}  # fmt: skip


HELP = {
    "vocab_size": "words that are told apart, the most frequent ones",
    "context_length": "words of a text that are read, from both ends of a longer one",
    "num_layers": "encoder blocks",
    "num_heads": "attention heads a block; must divide --d-model",
    "d_model": "width of the encoder",
    "d_ff": "width of its feed-forward layers; default: 4 times --d-model",
    "dropout": "of embeddings, of each block's outputs and of the pooled text",
    "attention_dropout": "of attention weights",
    "activation": "of the feed-forward layers: relu, gelu, gelu_tanh, silu, ...",
    "norm_first": "pre-norm instead of post-norm blocks",
    "positions": "learned or sinusoidal",
    "pooling": "how a text becomes one vector: mean, cls or attention",
    "bigram_buckets": "size of the hashed embedding of neighbouring pairs of words; 0: none",
    "label_smoothing": "share of the label that the encoder's loss gives to all classes alike",
    "ngram_votes": "words, pairs and triples that vote beside the encoder; 0: none",
    "vote_share": "their share of the decision, in [0, 1]",
    "epochs": "passes over the training texts and their labels",
    "pretrain_epochs": "passes over the training texts before, guessing hidden words without labels",
    "batch_size": "texts a step",
    "lr": "peak learning rate",
    "pretrain_lr": "that of --pretrain-epochs",
    "weight_decay": "AdamW's, on matrices only",
    "average": "decay of the moving average of the weights that is evaluated; 0: none",
    "word_dropout": "share of the words that are hidden, in training and pre-training",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="imdb", help="a .csv or .jsonl file, or the built-in imdb or bbc (%(default)s)")
    add("--out", type=Path, default=Path("runs/classifier"), help="folder for everything written (%(default)s)")
    add("--preset", choices=PRESETS, default="quick", help="the settings that the options below change (%(default)s)")
    add("--test-size", type=int, help="texts held out; default 4904 for imdb, a fifth of others")
    add("--validate", action="store_true", help="to compare settings: hold out a fifth of the training texts instead")
    for field in dataclasses.fields(ClassifierConfig):
        if field.name in ("num_classes", "bias"):
            continue
        kind = {"float": float, "str": str}.get(str(field.type), int)
        how: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if field.name == "norm_first" else {"type": kind}
        )
        value = PRESETS["quick"]["model"].get(field.name, field.default)
        told = f"{HELP[field.name]} (quick: {value})" if value is not None else HELP[field.name]
        add(f"--{field.name.replace('_', '-')}", **how, help=told)
    for name, value in PRESETS["quick"].items():
        if name in HELP:
            add(f"--{name.replace('_', '-')}", type=type(value), help=f"{HELP[name]} (quick: {value})")
    add("--seed", type=training.seed_number, default=0, help="of weights, data's order and dropout (%(default)s)")
    add("--device", default="auto", help="auto takes the GPU if there is one; or cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("auto", "fp32", "bf16"), help="auto: bf16 autocast where it is fast (quick: fp32)")
    add("--baseline", action=argparse.BooleanOptionalAction, default=True, help="fit the logistic regression as well")
    add("--tensorboard", action=argparse.BooleanOptionalAction, help="write --out/tensorboard (if it is installed)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on after the last complete epoch in --out")
    either("--overwrite", action="store_true", help="start anew where --out already holds a checkpoint")
    arguments = parser.parse_args(argv)
    preset = PRESETS[arguments.preset]
    for name, value in preset.items():
        if name != "model" and getattr(arguments, name) is None:
            setattr(arguments, name, value)
    given = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(ClassifierConfig)}
    arguments.model = preset["model"] | {name: value for name, value in given.items() if value is not None}
    for name, least in (("epochs", 1), ("batch_size", 1), ("pretrain_epochs", 0), ("weight_decay", 0)):
        if not getattr(arguments, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.model["vocab_size"] < 3:
        least = "3 (the padding, the unknown word and a known one)"
        parser.error(f"--vocab-size must be at least {least}, got {arguments.model['vocab_size']}")
    if arguments.pretrain_epochs and not arguments.word_dropout:
        parser.error("--pretrain-epochs guesses the words that --word-dropout hides: it must be above 0")
    for name in ("lr", "pretrain_lr"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name)}")
    for name in ("average", "word_dropout"):
        if not 0.0 <= getattr(arguments, name) < 1.0:
            parser.error(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(arguments, name)}")
    return arguments


def baseline_accuracy(train: Labelled, test: Labelled) -> float:
    """Of logistic regression on the tf-idf of words and pairs of words.

    Raises:
        ValueError: no word occurs in two texts, or they are all of one class.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise TrainingError("the baseline needs scikit-learn: pip install scikit-learn, or --no-baseline") from error
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(features, LogisticRegression(max_iter=1000))
    return float(model.fit(train.texts, train.labels).score(test.texts, test.labels))


class Trainer:
    """One run: its texts, model, optimizer and position."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.device = training.choose_device(arguments.device)
        self.dtype = training.choose_dtype(arguments.dtype, self.device)
        saved = self.out / "checkpoint.pt"
        training.check_out(self.out, [saved] if saved.exists() else [], arguments)
        data = labelled.read(arguments.data)
        size = arguments.test_size
        if size is None:
            size = 4904 if arguments.data == "imdb" else len(data.texts) // 5
        self.train, self.test = labelled.parts(data, size, arguments.validate)
        self.tokenizer = labelled.train_tokenizer(self.train.texts, arguments.model["vocab_size"])
        self.unknown = self.tokenizer.token_to_id(labelled.UNKNOWN)
        settings = arguments.model | {"vocab_size": self.tokenizer.get_vocab_size(), "num_classes": len(data.names)}
        with training.named_by_options(arguments):
            self.config = ClassifierConfig(**settings)
            torch.manual_seed(arguments.seed)
            self.model = Classifier(self.config)
        length = self.config.context_length
        self.tokens = [labelled.encode(self.tokenizer, part.texts, length) for part in (self.train, self.test)]
        if self.config.ngram_votes:
            self.model.votes.learn_ngrams(labelled.batches(self.tokens[0], self.train.labels, 64))
        self.model.to(self.device)
        self.averaged = AveragedModel(self.model, avg_fn=self._average) if arguments.average else None
        self.optimizer = training.make_optimizer(self.model, arguments.lr, arguments.weight_decay)
        names = (
            "epochs", "pretrain_epochs", "batch_size", "lr", "pretrain_lr", "weight_decay", "average", "word_dropout", "seed"
        )  # fmt: skip
        identity = {
            "model": dataclasses.asdict(self.config),
            "data": {"sha256": data.digest(), "test_size": size, "validate": arguments.validate},
            "training": {name: getattr(arguments, name) for name in names} | {"dtype": str(self.dtype)},
        }
        self.checkpoint = training.Checkpoint(saved, identity)
        self.epoch = 0
        if saved.exists() and not arguments.overwrite:
            progress = self.checkpoint.load(self.model, self.optimizer, self.device)
            self.epoch = progress["epoch"]
            if self.averaged is not None:
                with training.readable(saved):
                    self.averaged.load_state_dict(progress["averaged"])
        self.metrics = training.Metrics(self.out / "metrics.jsonl", self.epoch, tensorboard=arguments.tensorboard)

    def _average(self, average: torch.Tensor, new: torch.Tensor, steps: torch.Tensor | int) -> torch.Tensor:
        """Exponential moving average, of fewer steps at the start so that the random weights are soon forgotten."""
        return average.lerp(new, 1 - min(self.arguments.average, (1 + float(steps)) / (10 + float(steps))))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train.texts) / self.arguments.batch_size)

    @property
    def result(self) -> Classifier:
        """The model that counts: the moving average where there is one."""
        if self.averaged is None or self.averaged.n_averaged == 0:
            return self.model
        return cast(Classifier, self.averaged.module)

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        precision = "fp32" if self.dtype == torch.float32 else "bf16 autocast"
        kind = "validation (of the training part)" if self.arguments.validate else "test"
        before = f"{self.arguments.pretrain_epochs} + " if self.arguments.pretrain_epochs else ""
        return (
            f"data   {self.arguments.data}: {len(self.train.texts):,} training and {len(self.test.texts):,} {kind} texts, "
            f"{len(self.train.names)} classes\n"
            f"model  preset {self.arguments.preset}: {parameters:,} parameters, {self.config.num_layers} layers, "
            f"width {self.config.d_model}, {self.config.context_length} tokens\n"
            f"run    {before}{self.arguments.epochs} epochs of {self.steps_per_epoch} steps on {self.device} in {precision}, "
            f"into {self.out}"
        )

    @property
    def pretraining(self) -> bool:
        return self.epoch < self.arguments.pretrain_epochs

    def train_epoch(self, stop: training.StopSignal) -> dict[str, float] | None:
        """Mean loss and accuracy over the epoch; None where a signal cut it short."""
        arguments, steps = self.arguments, self.steps_per_epoch
        epoch, epochs, peak, label = self.epoch, arguments.pretrain_epochs, arguments.pretrain_lr, "pre-training "
        if not self.pretraining:
            epoch, epochs, peak, label = epoch - epochs, arguments.epochs, arguments.lr, ""
        random = np.random.default_rng((arguments.seed, self.epoch))
        loss_sum, right, seen, start = 0.0, 0, 0, time.perf_counter()
        batches = labelled.batches(self.tokens[0], self.train.labels, arguments.batch_size, random)
        interval = 0.5 if sys.stderr.isatty() else 15.0
        progress = tqdm(batches, f"{label}epoch {epoch + 1}/{epochs}", steps, mininterval=interval, leave=False)
        self.model.train()
        for step, (tokens, mask, labels) in enumerate(progress, epoch * steps):
            if stop.received:
                return None
            lr = training.learning_rate(step, epochs * steps, peak, min(100, steps))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            hidden = torch.rand(tokens.shape) < arguments.word_dropout
            if self.pretraining:
                loss, hits, count = self._guess(tokens, mask, hidden)
            else:
                loss, hits, count = self._classify(tokens.masked_fill(hidden, self.unknown), mask, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.averaged is not None and not self.pretraining:
                self.averaged.update_parameters(self.model)
            loss_sum, right, seen = loss_sum + loss.item() * count, right + hits, seen + count
            if not math.isfinite(loss_sum):
                raise TrainingError(f"the loss is not finite at step {step + 1}: try a smaller learning rate")
            accuracy = "" if self.pretraining else f", accuracy {right / seen:.1%}"
            progress.set_postfix_str(f"loss {loss_sum / seen:.3f}{accuracy}", refresh=False)
        record = {"loss": loss_sum / seen, "seconds": time.perf_counter() - start}
        if self.pretraining:
            return {"pretrain_loss": record["loss"], "seconds": record["seconds"]}
        return {"train_loss": record["loss"], "train_accuracy": right / seen, "seconds": record["seconds"]}

    def _classify(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int, int]:
        """(mean loss, texts labelled rightly, texts)"""
        labels = labels.to(self.device)
        with training.autocast(self.device, self.dtype):
            logits, loss = self.model(tokens.to(self.device), mask.to(self.device), labels)
        return loss, int((logits.argmax(-1) == labels).sum()), len(labels)

    def _guess(self, tokens: Tensor, mask: Tensor, hidden: Tensor) -> tuple[Tensor, int, int]:
        """(mean loss of guessing the hidden words from the others (Devlin et al., 2018), 0, hidden words)"""
        wanted = (hidden & mask & (tokens != self.unknown)).to(self.device)
        read, mask = tokens.masked_fill(hidden, self.unknown).to(self.device), mask.to(self.device)
        with training.autocast(self.device, self.dtype):
            states = self.model.hidden(read, mask)[0]
            states = states[:, states.shape[1] - read.shape[1] :][wanted]  # without the token of "cls" pooling
            words = self.model.token_embedding.weight
            loss = linear_cross_entropy(states, words, tokens.to(self.device)[wanted], reduction="sum")
        count = int(wanted.sum())
        return loss / max(1, count), 0, count

    @torch.no_grad()
    def test_probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities (texts, classes), labels (texts,)) of the test texts."""
        model = self.result.eval()
        probabilities, labels = [], []
        for tokens, mask, batch in labelled.batches(self.tokens[1], self.test.labels, 64):
            with training.autocast(self.device, self.dtype):
                logits, _ = model(tokens.to(self.device), mask.to(self.device))
            probabilities.append(logits.float().softmax(-1).cpu())
            labels.append(batch)
        return torch.cat(probabilities).numpy(), torch.cat(labels).numpy()

    def save(self) -> None:
        self.result.save_pretrained(self.out)
        with atomic_write(self.out / "tokenizer.json") as file:
            file.write(self.tokenizer.to_str().encode())
        with atomic_write(self.out / "labels.json") as file:
            file.write(json.dumps(self.train.names).encode())
        averaged = None if self.averaged is None else self.averaged.state_dict()
        self.checkpoint.save(self.model, self.optimizer, self.device, epoch=self.epoch, averaged=averaged)

    def run(self) -> int:
        """Train to the last epoch, or until a signal; the exit status is returned."""
        with training.StopSignal() as stop:
            while self.epoch < self.arguments.pretrain_epochs + self.arguments.epochs:
                record = self.train_epoch(stop)
                if record is None:
                    assert stop.received is not None
                    training.say(
                        f"{stop.received.name}: {self.epoch} complete epochs are saved; --resume goes on after them"
                    )
                    return 128 + stop.received
                self.epoch += 1
                if "pretrain_loss" in record:
                    self.metrics.write(step=self.epoch, **record)
                    self.save()
                    loss, seconds = record["pretrain_loss"], record["seconds"]
                    training.say(f"epoch {self.epoch}: pre-training loss {loss:.3f} ({seconds:.0f} s)")
                    continue
                probabilities, labels = self.test_probabilities()
                accuracy = float((probabilities.argmax(1) == labels).mean())
                loss = float(-np.log(probabilities[np.arange(len(labels)), labels].clip(1e-12)).mean())
                self.metrics.write(step=self.epoch, **record, test_loss=loss, test_accuracy=accuracy)
                self.save()
                training.say(
                    f"epoch {self.epoch}: training loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.2%}; "
                    f"test loss {loss:.3f}, accuracy {accuracy:.2%} ({record['seconds']:.0f} s)"
                )
        return 0

    def finish(self) -> None:
        """Measure the final model, fit the baseline, write report.json, curves.png and report.html."""
        probabilities, labels = self.test_probabilities()
        report = evaluate(probabilities, labels)
        lines = [
            f"\ntest accuracy {report['accuracy']:.2%}, macro F1 {report['f1']:.2%}, calibration error {report['ece']:.2%}"
        ]
        if self.arguments.baseline:
            lines.append(f"logistic regression on words and pairs {self.baseline(report)}")
        lines.append("confusion (rows: truth, columns: prediction)")
        for name, row in zip(self.train.names, report["confusion"]):
            lines.append(f"  {name:>12} " + " ".join(f"{count:6d}" for count in row))
        with atomic_write(self.out / "report.json") as file:
            file.write(json.dumps(report, indent=2).encode() + b"\n")
        plot(self.metrics, report, self.train.names, self.out / "curves.png")
        write_report(
            self.out / "report.html",
            f"Classifier of {self.arguments.data}",
            results={name: value for name, value in report.items() if isinstance(value, float)},
            pictures=[self.out / "curves.png"],
            settings={**vars(self.arguments), "model": dataclasses.asdict(self.config)},
            samples=self.examples(probabilities, labels),
        )
        lines.append(f"report {self.out / 'report.html'}, figures {self.out / 'report.json'}, model {self.out}")
        training.say("\n".join(lines))

    def baseline(self, report: dict[str, Any]) -> str:
        """What logistic regression reaches, also put into the report, and how the model compares; or why there is none."""
        try:
            report["baseline_accuracy"] = baseline_accuracy(self.train, self.test)
        except ValueError as error:
            return f"is left out, the data is too small for it: {str(error).splitlines()[0]}"
        points = round(100 * (report["accuracy"] - report["baseline_accuracy"]), 2)
        verdict = f"{abs(points):.2f} points {'better' if points > 0 else 'WORSE'}" if points else "as good"
        return f"{report['baseline_accuracy']:.2%}: the model is {verdict}"

    def examples(self, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, str]:
        """The test texts that the model was most sure of, rightly and wrongly, each under what it said."""
        names, sure, right = self.train.names, probabilities.max(1), probabilities.argmax(1) == labels
        chosen = [(sure * mask).argmax() for mask in (right, ~right) if mask.any()]
        return {
            f"{names[probabilities[i].argmax()]} ({sure[i]:.1%} sure), in truth {names[labels[i]]}": self.test.texts[i]
            for i in chosen
        }


def evaluate(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Accuracy, macro F1, confusion matrix (truth, prediction), and the reliability of the stated confidence."""
    classes, predicted, confidence = probabilities.shape[1], probabilities.argmax(1), probabilities.max(1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    hits = confusion.diagonal()
    f1 = 2 * hits / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    stated = np.bincount(bin_of, confidence, bins) / np.maximum(count, 1)
    reached = np.bincount(bin_of, predicted == labels, bins) / np.maximum(count, 1)
    return {
        "accuracy": float(hits.sum() / len(labels)),
        "f1": float(f1.mean()),
        "confusion": confusion.tolist(),
        "ece": float((count * abs(stated - reached)).sum() / len(labels)),
        "reliability": [
            {"confidence": float(s), "accuracy": float(r), "texts": int(n)}
            for s, r, n in zip(stated, reached, count)
            if n
        ],
    }


def plot(metrics: training.Metrics, report: dict[str, Any], names: list[str], path: Path) -> None:
    """Loss, accuracy, confusion and reliability in one picture."""
    plt = training.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for axis, quantity in zip(axes[0], ("loss", "accuracy")):
        for part in ("train", "test"):
            axis.plot(*metrics.series(f"{part}_{quantity}"), marker="o", label={"train": "training"}.get(part, part))
        axis.set(xlabel="epoch", title=quantity)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if "baseline_accuracy" in report:
        value = report["baseline_accuracy"]
        axes[0, 1].axhline(value, color="gray", linestyle="--", label=f"logistic regression, {value:.1%}")
    for axis in axes[0]:
        axis.legend()
    confusion = np.array(report["confusion"])
    axes[1, 0].imshow(confusion, cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        dark = count > confusion.max() / 2
        axes[1, 0].text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    turned = {"rotation": 45, "ha": "right"} if sum(map(len, names)) > 30 else {}
    axes[1, 0].set_xticks(range(len(names)), names, **turned)
    axes[1, 0].set_yticks(range(len(names)), names)
    axes[1, 0].set(xlabel="prediction", ylabel="truth", title=f"test accuracy {report['accuracy']:.2%}")
    points = [(bin["confidence"], bin["accuracy"]) for bin in report["reliability"]]
    axes[1, 1].plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfect")
    axes[1, 1].plot(*zip(*points), marker="o", label="model")
    axes[1, 1].set(xlabel="stated confidence", ylabel="accuracy", title=f"calibration error {report['ece']:.2%}")
    axes[1, 1].legend()
    axes[1, 1].grid(alpha=0.3)
    training.save_picture(figure, path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return training.run_script(training.lock(arguments.out), lambda _: Trainer(arguments))


if __name__ == "__main__":
    sys.exit(main())
