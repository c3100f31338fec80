"""examples/finetune_gpt.py and the packing of prompts with their completions."""

import dataclasses
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastattn.models import GPT, GPTConfig
from tests.scripts import EXAMPLES, kill_at_random, script

TINY = "--epochs 6 --batch-tokens 64 --lr 0.01 --warmup 2 --eval-every 5 --dtype fp32 --device cpu --val-fraction 0.2"
pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture
def start(tmp_path: Path, scripts: None) -> Path:
    """A model that was not trained, and its tokenizer."""
    import corpus

    folder = tmp_path / "start"
    tokenizer = corpus.train_tokenizer("red green blue is the colour of the sky? \n" * 20, 300)
    torch.manual_seed(0)
    GPT(
        GPTConfig(tokenizer.get_vocab_size(), context_length=24, num_layers=1, num_heads=2, d_model=16)
    ).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """The completion repeats one word of the prompt."""
    choose, path = random.Random(0), tmp_path / "colours.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(60):
            colour = choose.choice(["red", "green", "blue"])
            prompt = f"{number} the {'sky ' * choose.randrange(3)}is {colour}: colour?"
            file.write(json.dumps({"prompt": prompt, "completion": f" {colour}"}) + "\n")
    return path


@pytest.fixture
def finetune(capfd: pytest.CaptureFixture[str], scripts: None) -> Callable[..., str]:
    import finetune_gpt

    def call(model: Path, data: object, out: Path, *more: object, status: int = 0) -> str:
        try:
            code = finetune_gpt.main([str(a) for a in (model, "--data", data, "--out", out, *TINY.split(), *more)])
        except SystemExit as error:
            code = error.code
        printed = "".join(capfd.readouterr())
        assert code == status, printed
        return printed

    return call


def curve(out: Path) -> list[tuple[int, str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], name, r[name]) for r in records for name in ("loss", "val_loss", "final_val_loss") if name in r]


def test_the_packed_loss_is_that_of_the_completions_alone(start: Path) -> None:
    """Against every example by itself, padded: mean over the completions' tokens and the end of the text."""
    import completions
    import corpus
    from completions import Example

    tokenizer = corpus.load_tokenizer(start)
    examples = [
        Example("the sky is", " blue"),
        Example("", " the colour red"),
        Example("green green? " * 9, " is"),
        Example("of", " red" * 40),
    ]
    sequences, cut = completions.encode(tokenizer, examples, 24)
    assert cut == 1
    model = GPT.from_pretrained(start)
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    rows, losses = torch.zeros(len(sequences), 24, dtype=torch.int64), []
    for row, example, sequence in zip(rows, examples, sequences):
        assert sequence.length <= 24
        asked, said = sequence.ids[: sequence.start].tolist(), sequence.ids[sequence.start :].tolist()
        assert asked == completions.without_middle(tokenizer.encode(example.prompt).ids or [end], 18)
        assert said == [*tokenizer.encode(example.completion).ids, end][: len(said)]
        row[: sequence.length] = torch.from_numpy(sequence.ids[:-1])
    logits, _ = model(rows)
    for sequence, row in zip(sequences, logits):
        predicted = row[sequence.start - 1 : sequence.length]
        target = torch.from_numpy(sequence.ids[sequence.start :]).long()
        losses += F.cross_entropy(predicted.double(), target, reduction="none").tolist()
    tokens, targets, cu_seqlens = completions.pack(sequences)
    assert cu_seqlens.tolist() == np.cumsum([0, *(sequence.length for sequence in sequences)]).tolist()
    _, loss = model(tokens, targets, cu_seqlens=cu_seqlens)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_plain_text_is_read_to_its_end(start: Path) -> None:
    """Each token is predicted once, and a long text is not cut; every sequence's likelihood is its own."""
    import completions
    import corpus

    tokenizer, tied = corpus.load_tokenizer(start), GPT.from_pretrained(start)
    model = GPT(dataclasses.replace(tied.config, tie_weights=False)).eval()
    model.output.register_forward_hook(lambda module, inputs, logits: 3 * logits)  # as adapters have them
    text = "is the sky blue? " * 12
    sequences, cut = completions.encode(tokenizer, [completions.Example("", text), completions.Example("a", "b")], 24)
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    assert cut == 0
    assert len(sequences) > 3
    assert [*tokenizer.encode(text).ids, end] == [token for s in sequences[:-1] for token in s.ids[1:].tolist()]
    assert sequences[0].ids[0] == end
    for sequence, value in zip(sequences, completions.log_likelihoods(model, sequences, 30)):
        log_p = model(torch.from_numpy(sequence.ids[None, :-1]).long())[0][0].log_softmax(-1)
        each = log_p.gather(1, torch.from_numpy(sequence.ids[1:, None]).long())[sequence.start - 1 :]
        assert value == pytest.approx(each.sum().item(), rel=1e-5)


def test_no_prompt_is_trained_on_and_held_out() -> None:
    from completions import Example, split
    from corpus import DataError

    examples = [Example(f"question {n // 4}", f" {n}") for n in range(80)] + [
        Example("", f"text {n}") for n in range(20)
    ]
    train, val = split(examples, 0.1)
    assert len(val) == 10
    assert not {e.prompt for e in train if e.prompt} & {e.prompt for e in val}
    assert all(example in train for example in examples if example.prompt not in {e.prompt for e in val})
    assert sum(not e.prompt for e in train + val) == 20
    with pytest.raises(DataError, match="there is none to train on"):
        split(examples[:4], 0.5)


def test_packs_hold_everything_once_within_the_budget() -> None:
    import completions

    lengths = [3, 9, 2, 20, 1, 7, 7]
    packs = completions.fill(lengths, 10, order=[6, 0, 1, 3, 2, 4, 5])
    assert packs == [[6, 0], [1], [3], [2, 4, 5]]
    assert sorted(index for chosen in packs for index in chosen) == list(range(7))


def test_a_prompt_that_is_too_long_keeps_both_ends(start: Path) -> None:
    """And where its completion begins says nothing about the completion."""
    import completions
    import corpus

    tokenizer = corpus.load_tokenizer(start)
    examples = [completions.Example("green green? " * 9, completion) for completion in (" red", " colour of the sky")]
    (short, long), _ = completions.encode(tokenizer, examples, 24)
    assert short.start == long.start == 18
    assert (short.ids[:18] == long.ids[:18]).all()
    assert len(short.ids) < len(long.ids)
    assert completions.without_middle(list(range(10)), 5) == [0, 1, 2, 8, 9]
    assert completions.without_middle([1, 2, 3], 3) == [1, 2, 3]
    assert completions.without_middle([1, 2, 3], 1) == [1]


def test_it_learns_and_an_interrupted_run_ends_alike(
    finetune: Callable[..., str], start: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune_gpt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed = finetune(start, colours, whole)
    assert "48 training and 12 validation examples" in printed
    assert "before fine-tuning" in printed
    losses = [value for _, name, value in curve(whole) if name == "val_loss"]
    assert losses[-1] < losses[0] / 3
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((whole / "val.jsonl").read_text().splitlines()) == 12

    step = finetune_gpt.Trainer.train_step

    def step_and_interrupt(self: finetune_gpt.Trainer) -> dict[str, float]:
        record = step(self)
        if self.step == 12:
            signal.raise_signal(signal.SIGTERM)
        return record

    monkeypatch.setattr(finetune_gpt.Trainer, "train_step", step_and_interrupt)
    assert "SIGTERM: saved after step 12" in finetune(start, colours, parts, status=128 + signal.SIGTERM)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert "exists: add --resume" in finetune(start, colours, parts, status=1)
    assert "training.lr was 0.01 and is 0.1" in finetune(start, colours, parts, "--resume", "--lr", 0.1, status=1)
    finetune(start, colours, parts, "--resume")
    assert curve(parts) == curve(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    finetune(start, colours, parts, "--overwrite")
    assert curve(parts) == curve(whole)


def test_a_killed_run_resumes_to_the_same_curve(
    finetune: Callable[..., str], start: Path, colours: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--epochs", "20", "--samples", "0")
    finetune(start, colours, whole, *more)
    arguments = [str(start), "--data", str(colours), "--out", str(killed), *TINY.split(), *more]
    kill_at_random(script("finetune_gpt.py", *arguments), killed, records=12)
    finetune(start, colours, killed, "--resume", *more)
    assert curve(killed) == curve(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


BAD_DATA = {
    "missing": (None, "is neither a .jsonl file nor a task (sentiment, topic, headline, trivia, translation"),
    "empty": ("\n", "is empty"),
    "field": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "line 2: needs the fields prompt and completion"),
    "not JSON": ("prompt, completion", "line 1: needs the fields"),
    "number": ('{"prompt": "a", "completion": 3}', "not strings"),
    "nothing to say": ('{"prompt": "a", "completion": ""}', "the completion is empty"),
    "one": ('{"prompt": "a", "completion": "b"}', "of 1 examples leaves none for one of the parts"),
}


@pytest.mark.parametrize(("content", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(finetune: Callable[..., str], start: Path, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    assert message in finetune(start, path, tmp_path / "out", status=1)


def test_bad_arguments(finetune: Callable[..., str], start: Path, colours: Path, tmp_path: Path) -> None:
    assert "is the folder of the model to start from" in finetune(start, colours, start, status=2)
    assert "holds no tokenizer.json" in finetune(tmp_path, colours, tmp_path / "out", status=1)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(start / "tokenizer.json"))
    assert "has no token <|endoftext|>" in finetune(start, colours, tmp_path / "out", status=1)
    assert "--epochs must be at least 1" in finetune(start, colours, tmp_path / "out", "--epochs", 0, status=2)
    assert "--weight-decay must be" in finetune(start, colours, tmp_path / "out", "--weight-decay", "nan", status=2)


def test_a_run_that_never_leaves_its_warm_up_says_so(
    finetune: Callable[..., str], start: Path, colours: Path, tmp_path: Path
) -> None:
    told = "is not less than the"
    assert told in finetune(start, colours, tmp_path / "out", "--warmup", 500, "--epochs", 1)
    assert told not in finetune(start, colours, tmp_path / "out", "--warmup", 1, "--epochs", 1, "--overwrite")


@pytest.mark.parametrize("task", ["sentiment", "topic", "headline", "trivia", "translation"])
def test_a_task_without_its_data_says_how_to_get_it(
    finetune: Callable[..., str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    import importlib.util

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--no-deps" in finetune(start, task, tmp_path / "out", status=1)
