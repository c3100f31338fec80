"""What the example scripts make of damaged models, of characters that are none, and of encodings: one line that names the file."""

import importlib
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig

pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture
def gpt(tmp_path: Path, scripts: None) -> Path:
    import corpus

    tokenizer = corpus.train_tokenizer("the king and the queen of the night \n" * 20, 300)
    config = GPTConfig(tokenizer.get_vocab_size(), context_length=16, num_layers=1, num_heads=2, d_model=16)
    GPT(config).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "tokenizer.json").write_text(tokenizer.to_str())
    return tmp_path / "gpt"


@pytest.fixture
def classifier(tmp_path: Path, scripts: None) -> Path:
    import labelled

    words = labelled.train_tokenizer(["a good film", "a bad film"], 100)
    config = ClassifierConfig(words.get_vocab_size(), 2, context_length=8, num_layers=1, num_heads=2, d_model=16)
    Classifier(config).save_pretrained(tmp_path / "classifier")
    (tmp_path / "classifier" / "tokenizer.json").write_text(words.to_str())
    (tmp_path / "classifier" / "labels.json").write_text('["bad", "good"]')
    return tmp_path / "classifier"


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script, expects status 1, and returns the line that it said."""

    def call(script: str, *arguments: object) -> str:
        assert __import__(script).main([str(argument) for argument in arguments]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        return line

    return call


SCRIPTS: dict[str, list[Any]] = {
    "generate": ["--tokens", 1],
    "export": ["--out", "exported"],
    "evaluate": ["--data", "text:nothing"],
    "finetune_gpt": ["--data", "sentiment", "--out", "finetuned"],
    "attention_map": ["--text", "king"],
    "serve": ["--port", 0],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_file_is_named(
    script: str, name: str, gpt: Path, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "serve":
        pytest.importorskip("uvicorn")
    monkeypatch.chdir(tmp_path)
    content = (gpt / name).read_bytes()
    (gpt / name).write_bytes(content[: len(content) // 2])
    assert str(gpt / name) in fails(script, gpt, *SCRIPTS[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_folder_that_is_not_there(
    script: str, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "serve":
        pytest.importorskip("uvicorn")
    monkeypatch.chdir(tmp_path)
    assert "the folder runs/mistyped does not exist" in fails(script, "runs/mistyped", *SCRIPTS[script])


@pytest.mark.parametrize("content", ["[", "3", '["good"]'])
def test_labels_that_do_not_fit(content: str, classifier: Path, fails: Callable[..., str]) -> None:
    (classifier / "labels.json").write_text(content)
    assert str(classifier / "labels.json") in fails("attention_map", classifier, "--text", "good")


def test_settings_and_shards_that_are_missing(gpt: Path, classifier: Path) -> None:
    (gpt / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        GPT.from_pretrained(gpt)
    settings = json.loads((classifier / "config.json").read_text())
    del settings["vocab_size"]
    (classifier / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"classifier: .* 'vocab_size'"):
        Classifier.from_pretrained(classifier)


def test_a_lone_surrogate(gpt: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    """Of JSON's escapes, and of bytes on the command line that are not UTF-8."""
    path, row = tmp_path / "rows.jsonl", '{"text": "a", "prompt": "a", "completion": "b"}\n'
    path.write_text(row + row.replace('"a"', r'"a\ud800"'))
    assert "row 2: character 1 is the lone surrogate \\ud800" in fails("prepare", path, "--out", tmp_path)
    assert "line 2: character 1 is the lone surrogate \\ud800" in fails("evaluate", gpt, "--data", path)
    assert "the lone surrogate \\udcff" in fails("generate", gpt, "--prompt", "\udcff")
    assert "the lone surrogate \\udcff" in fails("attention_map", gpt, "--text", "\udcff")


@pytest.mark.parametrize(("script", "option"), [("generate", "--prompt"), ("attention_map", "--file")])
def test_standard_input_that_is_not_utf_8(
    script: str, option: str, gpt: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    assert "standard input is not UTF-8 text" in fails(script, gpt, option, "-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--prompt", "a", "--prompts", "b"], "not allowed with argument --prompt"),
        (["--prompts", "b", "--interactive"], "not allowed with argument --prompts"),
        (["--help"], r"--interactive --stop $'\n\n'  "),
    ],
)
def test_what_generate_is_told(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    import generate

    with pytest.raises(SystemExit):
        generate.parse(["model", *arguments])
    assert message in "".join(capfd.readouterr())


@pytest.mark.parametrize("script", ["generate", "prepare", "attention_map"])
def test_scripts_end_quietly_where_nobody_reads(
    script: str, gpt: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a text\n" * 2000)
    arguments = {
        "generate": [gpt, "--tokens", 3, "--device", "cpu"],
        "prepare": [tmp_path / "a.txt", "--out", tmp_path, "--vocab-size", 257],
        "attention_map": [gpt, "--text", "a text", "--out", tmp_path / "map", "--device", "cpu"],
    }[script]

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert importlib.import_module(script).main([str(argument) for argument in arguments]) == 0
        stdout.flush()
    assert capfd.readouterr().err == ""


def test_words_as_they_are_shown() -> None:
    import attention_map

    assert [attention_map.plain(word) for word in (" $5", "\n", " ")] == ["$5", "\u21b5", "\u2423"]


def test_texts_as_long_as_books(tmp_path: Path) -> None:
    import corpus

    (tmp_path / "books.csv").write_text("text\n" + "long " * 40_000)
    assert len(corpus.read_documents(str(tmp_path / "books.csv"))[0].text) == 200_000


def test_what_is_wrong_with_a_source(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "utf16.txt").write_text("a king", encoding="utf-16")
    assert "iconv -f UTF-16 -t UTF-8" in fails("prepare", tmp_path / "utf16.txt", "--out", tmp_path)
    assert "--data is empty" in fails("prepare", "", "--out", tmp_path)


@pytest.mark.parametrize(("script", "option"), [("generate", "--prompts"), ("attention_map", "--file")])
def test_the_option_of_a_file_that_is_not_there(
    script: str, option: str, gpt: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "mistyped.txt"
    assert fails(script, gpt, option, path) == f"error: {option} {path} cannot be read: No such file or directory"


def test_where_a_result_cannot_be_written_is_known_before(
    gpt: Path, classifier: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    file = gpt / "config.json"
    data = ("--data", "nowhere.csv", "--device", "cpu", "--out")
    assert fails("evaluate", classifier, *data, gpt) == f"error: --out {gpt} is a folder: give the name of a file"
    assert f"--out {file} cannot be a folder to write into" in fails("evaluate", classifier, *data, file / "below")
    (tmp_path / "text").write_text("the king")
    said = fails("attention_map", gpt, "--file", tmp_path / "text", "--out", file / "below")
    assert f"--out {file} cannot be a folder to write into" in said


def test_metrics_are_of_a_gpt(classifier: Path, fails: Callable[..., str]) -> None:
    given = (classifier, "--data", "nowhere.csv", "--device", "cpu")
    assert "--metrics is of a GPT" in fails("evaluate", *given, "--metrics", "accuracy")


def test_an_export_does_not_write_over_a_model(
    gpt: Path, classifier: Path, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export

    monkeypatch.setitem(sys.modules, "transformers", None)
    before = {path: path.read_bytes() for path in classifier.iterdir()}
    assert "config.json cannot be a folder to write into" in fails("export", gpt, "--out", classifier / "config.json")
    assert "exists: add --overwrite, or change --out" in fails("export", gpt, "--out", classifier)
    if importlib.util.find_spec("gguf"):
        assert "exists: add --overwrite, or change --save" in fails("chat", "--save", classifier)
        file = classifier / "config.json"
        assert f"--save {file} cannot be a folder to write into: " in fails("chat", "--save", file)
    assert {path: path.read_bytes() for path in classifier.iterdir()} == before
    shutil.copytree(classifier, tmp_path / "copy")
    assert export.main([str(gpt), "--out", str(tmp_path / "copy"), "--overwrite"]) == 0
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path / "copy").state_dict(), GPT.from_pretrained(gpt).state_dict()
    )
