"""examples/export.py: what it writes is read again and says the same."""

from pathlib import Path

import pytest
import torch

from fastattn.models import GPT, Classifier, ClassifierConfig, GPTConfig

pytestmark = pytest.mark.usefixtures("scripts")
VARIANTS = {
    "votes, bigrams": {"ngram_votes": 20, "bigram_buckets": 64},
    "cls, post-norm": {"pooling": "cls", "norm_first": False},
}


def export(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    import export

    assert export.main([str(argument) for argument in arguments]) == 0, capsys.readouterr()
    return capsys.readouterr().out


@pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # torch.export's own, of its tree specs
    "ignore:The given buffer is not writable",  # of PyTorch 2.12's torch.export, of its own file
)
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_classifier(settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import labelled

    words = labelled.train_tokenizer(["a good film", "a bad film"], 100)
    config = ClassifierConfig(
        words.get_vocab_size(), 2, context_length=24, num_layers=1, num_heads=2, d_model=16, **settings
    )
    model = Classifier(config).eval()
    if config.ngram_votes:
        texts = labelled.encode(words, ["a good film", "a bad film"], 24)
        model.votes.learn_ngrams(labelled.batches(texts, torch.tensor([1, 0]).numpy(), 2), least=1)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(words.to_str())
    (tmp_path / "model" / "labels.json").write_text('["bad", "good"]')
    assert "of the model's" in export(capsys, tmp_path / "model", "--out", tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "classifier.pt2").module()
    tokens = torch.randint(words.get_vocab_size(), (7, 11))
    mask = torch.arange(11) < torch.arange(1, 8)[:, None]
    torch.testing.assert_close(program(tokens, mask), model(tokens, mask)[0].softmax(-1))
    assert (tmp_path / "out" / "labels.json").read_text() == '["bad", "good"]'


def test_a_gpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import corpus

    tokenizer = corpus.train_tokenizer("the king and the queen of the night \n" * 20, 300)
    config = GPTConfig(tokenizer.get_vocab_size(), context_length=16, num_layers=1, num_heads=2, d_model=16)
    GPT(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer.to_str())
    assert "gives the same logits" in export(capsys, tmp_path / "model", "--out", tmp_path / "out")
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("the king")["input_ids"] == tokenizer.encode("the king").ids
