"""What training scripts leave alone in a folder, what they refuse to write over, and what they make of damaged files."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.scripts import EXAMPLES

pytestmark = pytest.mark.usefixtures("scripts")
IDENTITY = {"training": {"lr": 0.1}}


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


def save(out: Path, step: int = 1) -> Any:
    """One process's checkpoint in `out`."""
    import checkpoints
    import parallel

    kept = checkpoints.Checkpoints(out, IDENTITY, parallel.Processes("none", torch.device("cpu")))
    kept.save(*model_and_optimizer(), step=step, best=1.0)
    return kept


def test_only_what_a_run_wrote_is_deleted(tmp_path: Path) -> None:
    """Beside it lie a trainer's checkpoint of another program, a text, a copy, and a sharded checkpoint of ours."""
    import checkpoints

    foreign = [tmp_path / name for name in ("checkpoint-20/model.bin", "checkpoint-7", "checkpoint-backup.pt")]
    for path in (*foreign, tmp_path / "checkpoint-5" / "run.json", tmp_path / "checkpoint-5" / ".metadata"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert checkpoints.find(tmp_path) == [tmp_path / "checkpoint-5"]
    save(tmp_path)
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert checkpoints.find(tmp_path) == [tmp_path / "checkpoint.pt"]
    assert not (tmp_path / "checkpoint-5").exists()


SCRIPTS: dict[str, list[str]] = {"train_gpt": [], "train_classifier": [], "finetune_gpt": ["no_model"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_cannot_begin_leaves_no_folder(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*SCRIPTS[script], "--data", "mistyped.csv", "--device", "cpu", "--out"]
    assert __import__(script).main([*given, "runs/new"]) == 1
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    assert __import__(script).main([*given, "mine"]) == 1
    assert (tmp_path / "mine").is_dir()
    error = capfd.readouterr().err
    assert ("the folder no_model does not exist" if script == "finetune_gpt" else "'mistyped.csv' is neither") in error


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("out", ["file", "file/below", "/proc/below", "/proc"])
def test_an_out_that_cannot_be_a_folder(
    script: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert __import__(script).main([*SCRIPTS[script], "--data", "x", "--out", out]) == 1
    assert capfd.readouterr().err.startswith(f"error: --out {out} cannot be a folder to write into: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_files_stays(tmp_path: Path) -> None:
    import training

    with training.lock(tmp_path / "out"):
        (tmp_path / "out" / "tokens").write_text("")
    assert (tmp_path / "out" / "tokens").exists()


def test_only_event_files_are_deleted(tmp_path: Path) -> None:
    import training

    events = tmp_path / "tensorboard"
    events.mkdir()
    for name in ("events.out.tfevents.1.host", "notes.txt"):
        (events / name).write_text("")
    training.Metrics(tmp_path / "metrics.jsonl", 0, tensorboard=False)
    assert [path.name for path in events.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["identity", "model", "optimizer", "cpu_generator", "progress"])
def test_a_checkpoint_without_one_of_its_parts(name: str, tmp_path: Path) -> None:
    from training import TrainingError

    kept = save(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state[name]
    torch.save(state, tmp_path / "checkpoint.pt")
    message = rf"checkpoint.pt cannot be read as a checkpoint \(KeyError: '{name}'\): .* --overwrite to start anew"
    with pytest.raises(TrainingError, match=message):
        kept.load(*model_and_optimizer())


def test_a_checkpoint_without_one_of_the_weights(tmp_path: Path) -> None:
    from training import TrainingError

    kept = save(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["model"]["bias"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        kept.load(*model_and_optimizer())


def test_metrics_survive_a_power_cut(tmp_path: Path) -> None:
    import training

    lines = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "lo\xffss": 2.0}', b'{"step": 2}', b"[3]", b"\0\0\0}", b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    metrics = training.Metrics(tmp_path / "metrics.jsonl", 9, tensorboard=False)
    assert metrics.records == [{"step": 1, "loss": 2.0}, {"step": 2}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == metrics.records


@pytest.mark.parametrize(
    ("files", "flag", "message"),
    [
        (["model.safetensors"], None, "a model that no checkpoint belongs to"),
        (["config.json"], "resume", "a model that no checkpoint belongs to"),
        (["config.json", "metrics.jsonl"], "resume", None),
        (["config.json"], "overwrite", None),
        (["checkpoint.pt", "config.json"], None, "add --resume to go on"),
        (["checkpoint.pt", "config.json"], "resume", None),
        ([], None, None),
    ],
)
def test_models_are_not_written_over(files: list[str], flag: str | None, message: str | None, tmp_path: Path) -> None:
    import checkpoints
    import training

    for name in files:
        (tmp_path / name).write_text("{}")
    arguments = argparse.Namespace(resume=flag == "resume", overwrite=flag == "overwrite")
    saved = checkpoints.find(tmp_path)
    if message is None:
        training.check_out(tmp_path, saved, arguments)
    else:
        with pytest.raises(training.TrainingError, match=message):
            training.check_out(tmp_path, saved, arguments)


def test_a_closed_pipe_does_not_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        training.say("lost")
        training.say("lost, too")


@pytest.mark.parametrize("script", ["train_gpt", "finetune_gpt", "train_classifier", "generate", "chat"])
@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_seeds_out_of_range(script: str, seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = __import__(script)
    given = {"generate": ["model"], "finetune_gpt": ["model", "--data", "x"]}.get(script, [])
    with pytest.raises(SystemExit):
        module.parse([*given, "--seed", seed])
    assert "argument --seed: must be in [0, 2**63)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and its tokens beside it."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("the king and the queen of the night \n" * 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import corpus

        corpus.prepare(str(folder / "text.txt"), folder, 300, 0.1)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", b"{"), ("manifest.json", b"{}"), ("manifest.json", b"[]"), ("train.bin", None)],
)
def test_damaged_tokens(name: str, content: bytes | None, tokens: Path) -> None:
    import corpus

    (folder,) = (path for path in tokens.iterdir() if path.is_dir())
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content if content is not None else b"\xff" * len(before))
    try:
        with pytest.raises(corpus.DataError, match=f"{name}.*: delete {folder} to build it anew"):
            corpus.prepare(str(tokens / "text.txt"), tokens, 300, 0.1)
    finally:
        (folder / name).write_bytes(before)


def test_the_picture_tells_a_part_from_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss in the report is the best model's on all of the validation text; nothing is written onto the curve."""
    import training

    metrics, drawn = training.Metrics(tmp_path / "metrics.jsonl", 0, tensorboard=False), []
    metrics.records += [{"step": 1, "loss": 3.0}, {"step": 1, "val_loss": 1.31}, {"step": 1, "final_val_loss": 1.423}]
    plt = training.pyplot()
    monkeypatch.setattr(plt, "close", drawn.append)
    training.plot_losses(metrics, {"uniform": 4.0}, tmp_path / "loss.png", "a run")
    (axes,) = drawn[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "the best model on all of it, 1.423" in labels
    assert "validation, a part of it" in labels
    assert not axes.texts


@pytest.mark.parametrize("unigram", [3.9001, 6.0999, 4.5])
def test_no_baseline_lies_on_the_frame_of_the_picture(
    unigram: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of losses from 4 to 6 alone, matplotlib's limits are 3.9 and 6.1."""
    import training

    metrics, drawn = training.Metrics(tmp_path / "metrics.jsonl", 0, tensorboard=False), []
    metrics.records += [{"step": step, "loss": 6.0 - step} for step in range(3)]
    plt = training.pyplot()
    monkeypatch.setattr(plt, "close", drawn.append)
    training.plot_losses(metrics, {"uniform": 6.0, "unigram": unigram}, tmp_path / "loss.png", "a run")
    low, high = drawn[0].axes[0].get_ylim()
    assert all(low + 0.03 * (high - low) < value < high - 0.03 * (high - low) for value in (6.0, unigram))


def test_the_smoothed_curve_stays_with_the_loss_of_a_short_run() -> None:
    """With a fixed length of 20 steps it stood far above the loss of a run of 60, as if training were behind validation."""
    import training

    falling = [6.0 - 0.05 * step for step in range(60)]
    assert all(abs(a - b) < 0.1 for a, b in zip(training.smooth(falling), falling))
    noisy = [3.0 + (-1) ** step for step in range(1000)]
    assert abs(training.smooth(noisy)[-1] - 3.0) < 0.1
    assert training.smooth([]) == []


def test_a_new_run_that_fails_leaves_the_old_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import train_gpt

    (tmp_path / "text.txt").write_text("the king and the queen of the night \n" * 50)
    tiny = "--context-length 8 --layers 1 --heads 2 --d-model 16 --vocab-size 300 --batch-size 2 --steps 4 --eval-batches 1"
    more = "--dtype fp32 --device cpu --warmup 0 --sample-tokens 0 --no-tensorboard --eval-every 9"
    given = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *tiny.split(), *more.split()]
    assert train_gpt.main(given) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert train_gpt.main([*given, "--overwrite", "--lr", "1e30"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert train_gpt.main([*given, "--overwrite", "--architecture", "llama", "--d-model", "30"]) == 1
    assert "even" in capsys.readouterr().err
    assert train_gpt.main([*given, "--overwrite", "--steps", "2"]) == 0
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    shutil.rmtree(tmp_path / "run")
