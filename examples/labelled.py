"""Labelled texts: reading, deduplicating, splitting, tokenising by words, batching."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import DataError, load_tokenizer, read_documents
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from fastattn.models import Classifier
from fastattn.models.pretrained import read_json

PAD, UNKNOWN = "[PAD]", "[UNK]"


@dataclass(frozen=True)
class Labelled:
    """Texts with their labels, each text once.

    Attributes:
        texts: the texts.
        labels: (len(texts),) the class of each, as an index into `names`.
        names: the classes.
    """

    texts: list[str]
    labels: np.ndarray
    names: list[str]

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise DataError(f"a classifier needs at least two classes, found {self.names}")

    def select(self, indices: np.ndarray) -> Labelled:
        return Labelled([self.texts[i] for i in indices], self.labels[indices], self.names)

    def split(self, test_size: int, seed: int) -> tuple[Labelled, Labelled]:
        """(training, test) in a random order that depends on the seed alone."""
        if not 0 < test_size < len(self.texts):
            raise DataError(f"the test set must hold 1 to {len(self.texts) - 1} of the texts, got {test_size}")
        order = np.random.default_rng(seed).permutation(len(self.texts))
        return self.select(order[test_size:]), self.select(order[:test_size])

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self.labels.tolist(), self.names]).encode()).hexdigest()


def read(source: str) -> Labelled:
    """The labelled texts of a source of `corpus.read_documents`."""
    documents = read_documents(source)
    if any(document.label is None for document in documents):
        raise DataError(
            f"{source}: a classifier needs a label for every text (a .csv or .jsonl file with text and label)"
        )
    if nameless := [document.text for document in documents if not str(document.label).strip()]:
        raise DataError(f"{source}: an empty label in {len(nameless)} of the texts, first that of {nameless[0][:60]!r}")
    names = sorted({str(document.label) for document in documents})
    labels = np.array([names.index(str(document.label)) for document in documents])
    return Labelled([document.text for document in documents], labels, names)


def parts(data: Labelled, test_size: int, validate: bool) -> tuple[Labelled, Labelled]:
    """(texts that a run trains on, texts that it measures): with `validate` the second are a fifth of the training part."""
    train, test = data.split(test_size, seed=0)
    return train.split(len(train.texts) // 5, seed=1) if validate else (train, test)


def trained_on(folder: Path) -> dict[str, Any] | None:
    """The data of the run in a folder: {"sha256", "test_size", "validate"}; None where no checkpoint tells."""
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        data = state["identity"]["data"]
        return {"sha256": data["sha256"], "test_size": int(data["test_size"]), "validate": bool(data["validate"])}
    except Exception:  # torch.load raises many classes; the model is measured without it as well
        return None


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Lower-cased words and punctuation marks; the padding is token 0."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def kept(tokens: int, length: int) -> np.ndarray:
    """Which of a text's tokens are read: of a longer one the first and the last `length` / 2 (Sun et al., 2019)."""
    half = length // 2
    return np.arange(tokens) if tokens <= length else np.r_[: length - half, tokens - half : tokens]


def encode(tokenizer: Tokenizer, texts: list[str], length: int) -> list[np.ndarray]:
    """The tokens of each text that are read, at most `length`."""
    ids = (np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch_fast(texts))
    return [t[kept(len(t), length)] for t in ids]


def is_classifier(folder: Path) -> bool:
    """Whether the model in a folder is a `Classifier`; otherwise it is a `GPT`, or nothing."""
    try:
        return bool(read_json(folder / "config.json").get("model") == "Classifier")
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from error


def load_classifier(folder: Path, device: torch.device) -> tuple[Classifier, Tokenizer, list[str]]:
    """(model, tokenizer, names of the classes) of a folder that train_classifier.py wrote."""
    path, tokenizer = folder / "labels.json", load_tokenizer(folder)
    if not path.is_file():
        raise DataError(f"{folder} holds no {path.name}: it is not a folder that train_classifier.py wrote")
    model = Classifier.from_pretrained(folder, device=device)
    try:
        names = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged or incomplete: {error}") from error
    if len(names) != model.config.num_classes:
        raise DataError(f"{path} names {len(names)} classes, and the model has {model.config.num_classes}")
    return model, tokenizer, names


@torch.no_grad()
def probabilities(model: Classifier, tokens: list[np.ndarray]) -> np.ndarray:
    """(texts, classes), in the order of the texts; the model must be in evaluation mode."""
    device = next(model.parameters()).device
    found = np.empty((len(tokens), model.config.num_classes))
    for rows, mask, indices in batches(tokens, np.arange(len(tokens)), 64):
        logits, _ = model(rows.to(device), mask.to(device))
        found[indices.numpy()] = logits.float().softmax(-1).cpu().numpy()
    return found


def batches(
    tokens: list[np.ndarray], labels: np.ndarray, size: int, random: np.random.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens (B, T), mask (B, T), labels (B,)), texts of like length together so that little is padding.

    With `random` the texts are shuffled, sorted by length within pools of 50 batches, and the batches shuffled.
    """
    lengths = np.array([len(t) for t in tokens])
    order = np.arange(len(tokens)) if random is None else random.permutation(len(tokens))
    pool = len(tokens) if random is None else 50 * size
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in pools])
    starts = np.arange(0, len(order), size)
    if random is not None:
        random.shuffle(starts)
    for start in starts:
        chosen = order[start : start + size]
        rows = torch.zeros(len(chosen), max(1, lengths[chosen].max()), dtype=torch.int64)
        for row, index in zip(rows, chosen):
            row[: lengths[index]] = torch.from_numpy(tokens[index])
        mask = torch.arange(rows.shape[1]) < torch.from_numpy(lengths[chosen])[:, None]
        yield rows, mask, torch.from_numpy(labels[chosen])
