"""Prompts and their completions: tasks on real data, your own JSONL, tokens packed without padding, answers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from corpus import DataError
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.loss_rules import IGNORE_INDEX
from fastattn.models import GPT

TRANSLATION_WHEEL = Path("data/homeassistant-2024.3.3-py3-none-any.whl")


@dataclass(frozen=True)
class Example:
    """What is given, and what shall follow: their texts are joined as they are, so a completion mostly begins with a space.

    Attributes:
        prompt: may be empty.
        completion: not empty.
        answers: other completions that are as good.
    """

    prompt: str
    completion: str
    answers: tuple[str, ...] = ()


def read(source: str) -> list[Example]:
    """Each example of a source once.

    Args:
        source: a .jsonl file with the fields `prompt` and `completion` (and perhaps `answers`, a list); one of TASKS; or
            text:SOURCE, where the completion is a whole text of a source of `corpus.read_documents`.
    """
    if source in TASKS:
        examples = TASKS[source]()
    elif source.startswith("text:"):
        examples = [Example("", document.text) for document in corpus.read_documents(source.removeprefix("text:"))]
    else:
        examples = _read_jsonl(Path(source))
    unique = list(dict.fromkeys(examples))
    if not unique:
        raise DataError(f"{source} is empty: there is no example in it")
    return unique


def _read_jsonl(path: Path) -> list[Example]:
    if not path.is_file():
        raise DataError(f"{str(path)!r} is neither a .jsonl file nor a task ({', '.join(TASKS)}, text:SOURCE)")
    examples = []
    for number, line in enumerate(corpus.read_file(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = Example(row["prompt"], row["completion"], tuple(row.get("answers", ())))
            if not all(isinstance(text, str) for text in (example.prompt, example.completion, *example.answers)):
                raise TypeError("the fields are not strings")
            if not example.completion:
                raise ValueError("the completion is empty")
            for text in (example.prompt, example.completion, *example.answers):
                corpus.whole(text)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else f"{error}"
            raise DataError(
                f"{path}, line {number}: needs the fields prompt and completion, in JSON ({reason})"
            ) from error
        examples.append(example)
    return examples


def to_jsonl(examples: Iterable[Example]) -> bytes:
    return b"".join(json.dumps(asdict(example)).encode() + b"\n" for example in examples)


def digest(examples: Iterable[Example]) -> str:
    return hashlib.sha256(to_jsonl(examples)).hexdigest()


def split(examples: list[Example], val_fraction: float) -> tuple[list[Example], list[Example]]:
    """(training, validation), in a fixed random order; no prompt is in both, and at least one example in each."""
    count = int(len(examples) * val_fraction)
    if not 0 < count < len(examples):
        raise DataError(
            f"--val-fraction {val_fraction} of {len(examples)} examples leaves none for one of the parts"
            " (an example that occurs twice is taken once)"
        )
    order = np.random.default_rng(0).permutation(len(examples))
    val = [examples[i] for i in order[:count]]
    asked = {example.prompt for example in val if example.prompt}
    train = [examples[i] for i in order[count:] if examples[i].prompt not in asked]
    if not train:
        raise DataError("all examples have the prompts of those held out: there is none to train on")
    return train, val


def _sentiment() -> list[Example]:
    return [Example(f"{d.text}\nSentiment:", f" {d.label}") for d in corpus.read_documents("imdb")]


def _topic() -> list[Example]:
    """Of a headline and the paragraph below it."""
    articles = ((d.text.strip().split("\n\n", 2), d.label) for d in corpus.read_documents("bbc"))
    return [Example("\n".join(parts[:2]) + "\nTopic:", f" {label}") for parts, label in articles]


def _headline() -> list[Example]:
    articles = (d.text.strip().partition("\n") for d in corpus.read_documents("bbc"))
    return [Example(f"{body.strip()}\nHeadline:", f" {headline.strip()}") for headline, _, body in articles]


def _trivia() -> list[Example]:
    spec = importlib.util.find_spec("redbot")
    folders = [Path(folder) / "ext" / "trivia" / "lists" for folder in (spec and spec.submodule_search_locations) or ()]
    if not folders or not folders[0].is_dir():
        raise DataError("the task 'trivia' needs a package: pip install --no-deps red-trivia==1.1.1")
    try:
        import yaml
    except ImportError as error:
        raise DataError("the task 'trivia' needs a package: pip install pyyaml") from error
    examples = []
    for path in sorted(folders[0].glob("*.yaml")):
        lists: dict[str, Any] = yaml.load(corpus.read_file(path), yaml.BaseLoader)  # all values are strings
        for question, answers in lists.items():
            if isinstance(answers, list) and answers:
                first, *others = (f" {answer}" for answer in answers)
                examples.append(Example(f"Question: {question}\nAnswer:", first, tuple(others)))
    return examples


def _translation() -> list[Example]:
    """English to German: the strings of a home automation's user interface that stand under one key in both languages."""
    if not TRANSLATION_WHEEL.is_file():
        command = "pip download --no-deps --only-binary=:all: --python-version 3.12 homeassistant==2024.3.3 -d data"
        raise DataError(f"the task 'translation' reads {TRANSLATION_WHEEL}: {command}")
    examples = []
    with zipfile.ZipFile(TRANSLATION_WHEEL) as wheel:
        names = set(wheel.namelist())
        for name in sorted(name for name in names if name.endswith("translations/en.json")):
            other = name.removesuffix("en.json") + "de.json"
            if other in names:
                english, german = (dict(_leaves(json.loads(wheel.read(file)))) for file in (name, other))
                pairs = ((text, german[key]) for key, text in english.items() if german.get(key))
                examples += [Example(f"English: {source}\nGerman:", f" {target}") for source, target in pairs if source]
    return examples


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), value


TASKS: dict[str, Callable[[], list[Example]]] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "headline": _headline,
    "trivia": _trivia,
    "translation": _translation,
}


class Tokens(NamedTuple):
    """The tokens of an example, the end of the text included, and the index of its completion's first."""

    ids: np.ndarray
    start: int

    @property
    def length(self) -> int:
        """How many of them a model reads: the last one is only predicted."""
        return len(self.ids) - 1


def encode(tokenizer: Tokenizer, examples: Sequence[Example], context_length: int) -> tuple[list[Tokens], int]:
    """The tokens of each example, and how many completions had to be cut because the context is full.

    A completion of nothing, plain text, becomes as many sequences as it fills.
    """
    end, cut, encoded = corpus.end_of_text(tokenizer), 0, []
    completions = tokenizer.encode_batch([example.completion for example in examples])
    for example, prompt, completion in zip(examples, encode_prompts(tokenizer, examples, context_length), completions):
        ids = np.array([*prompt, *completion.ids, end], dtype=np.int32)
        size = context_length + 1
        if example.prompt:
            cut += len(ids) > size
            encoded.append(Tokens(ids[:size], len(prompt)))
        else:
            encoded += [Tokens(ids[start : start + size], 1) for start in range(0, len(ids) - 1, context_length)]
    return encoded, cut


def encode_prompts(tokenizer: Tokenizer, examples: Sequence[Example], context_length: int) -> list[list[int]]:
    """As `corpus.encode_prompt`; of a prompt longer than three quarters of the context, the middle is left out.

    What a text is about mostly stands at its beginning, and what is asked at its end. How much is left out must not
    depend on the completion: a model would read its length off the position where it begins.
    """
    end, room = corpus.end_of_text(tokenizer), context_length - context_length // 4
    encodings = tokenizer.encode_batch([example.prompt for example in examples])
    return [without_middle(encoding.ids or [end], room) for encoding in encodings]


def without_middle(tokens: list[int], length: int) -> list[int]:
    """The first and the last length / 2 of more than `length` tokens."""
    return tokens if len(tokens) <= length else tokens[: length - length // 2] + tokens[len(tokens) - length // 2 :]


class Pack(NamedTuple):
    """Sequences one after the other, as `GPT.forward` takes them.

    tokens (1, T), targets (1, T) with IGNORE_INDEX at all that does not predict a completion, cu_seqlens (sequences + 1,).
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> Pack:
        return Pack(*(tensor.to(device) for tensor in self))


def pack(sequences: Sequence[Tokens]) -> Pack:
    inputs = np.concatenate([sequence.ids[:-1] for sequence in sequences])
    targets = np.concatenate([sequence.ids[1:] for sequence in sequences]).astype(np.int64)
    ends = list(accumulate(sequence.length for sequence in sequences))
    for end, sequence in zip(ends, sequences):
        first = end - sequence.length  # of the inputs; the completion's first token is the target of the one before it
        targets[first : first + sequence.start - 1] = IGNORE_INDEX
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    return Pack(torch.from_numpy(inputs.astype(np.int64))[None], torch.from_numpy(targets)[None], cu_seqlens)


def fill(lengths: Sequence[int], budget: int, order: Iterable[int] | None = None) -> list[list[int]]:
    """Indices in that order (default: as they come), cut into packs of at most `budget` tokens, or of a single longer one."""
    packs: list[list[int]] = []
    room = 0
    for index in range(len(lengths)) if order is None else order:
        if lengths[index] > room:
            packs.append([])
            room = budget
        packs[-1].append(index)
        room -= lengths[index]
    return packs


@torch.no_grad()
def log_likelihoods(model: GPT, sequences: Sequence[Tokens], budget: int = 4096) -> np.ndarray:
    """(sequences,): the sum of the log-probabilities that the model gives to each completion's tokens, in nats."""
    device, found = model.output_weight.device, []
    for chosen in fill([sequence.length for sequence in sequences], budget):
        tokens, targets, cu_seqlens = pack([sequences[index] for index in chosen]).to(device)
        counted = (targets[0] != IGNORE_INDEX).nonzero()[:, 0]
        hidden = model.hidden(tokens, cu_seqlens=cu_seqlens)[0, counted]
        losses = F.cross_entropy(model.logits(hidden).float(), targets[0, counted], reduction="none")
        owner = torch.searchsorted(cu_seqlens, counted.int(), right=True) - 1
        found.append(torch.zeros(len(chosen), device=device).index_add(0, owner, -losses).cpu())
    return torch.cat(found).double().numpy()


@torch.no_grad()
def answer(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """The likeliest continuation of each prompt, up to the end of the text; prompts of one length are read together."""
    end, device = corpus.end_of_text(tokenizer), model.output_weight.device
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    texts = [""] * len(prompts)
    for alike in by_length.values():
        for start in range(0, len(alike), 32):
            chosen = alike[start : start + 32]
            given = torch.tensor([prompts[index] for index in chosen], device=device)
            new: list[Tensor] = []
            ended = torch.zeros(len(chosen), dtype=torch.bool, device=device)
            for token in model.stream(given, max_new_tokens, temperature=0):
                new.append(token)
                ended |= token == end
                if ended.all():
                    break
            for index, tokens in zip(chosen, torch.stack(new, dim=1).tolist()):
                tokens = tokens[: tokens.index(end)] if end in tokens else tokens
                texts[index] = tokenizer.decode(tokens)
    return texts
