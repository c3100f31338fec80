"""Hand a trained model to other software, and check that it still says the same.

    python examples/export.py runs/gpt --out exported          Hugging Face's format: AutoModelForCausalLM and AutoTokenizer read it
    python examples/export.py runs/classifier --out exported   a torch.export program: classifier.pt2, tokenizer.json, labels.json

The program takes tokens (batch, length) int64 and mask (batch, length) bool, True = token, and gives probabilities
(batch, classes); batch and length may be any. It is loaded with torch.export.load after `import fastattn`, whose ops it calls.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import corpus
import labelled
import torch
import training
from corpus import DataError
from torch import Tensor, nn
from training import TrainingError

import fastattn
from fastattn.models import GPT, Classifier
from fastattn.models.pretrained import atomic_write


class Probabilities(nn.Module):
    """(tokens, mask) → (batch, classes)"""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, mask)[0]
        return logits.float().softmax(-1)


def batch(model: Classifier, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, the texts of different lengths."""
    random = torch.Generator().manual_seed(length)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=random)
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=random)
    return tokens, torch.arange(length) < lengths


@torch.no_grad()
def export_classifier(folder: Path, out: Path) -> str:
    """Write the program, load it again and compare it with the model; what was found is returned."""
    model, _, _ = labelled.load_classifier(folder, torch.device("cpu"))
    whole, longest = Probabilities(model).eval(), model.config.context_length
    if longest < 4:
        raise DataError(f"the context of {longest} tokens is too short for a length that varies")
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)},) * 2
    program = torch.export.export(whole, batch(model, 3, min(longest, 7)), dynamic_shapes=shapes)
    with atomic_write(out / "classifier.pt2") as file:
        torch.export.save(program, file)
    loaded = torch.export.load(out / "classifier.pt2").module()
    error = 0.0
    for rows, length in ((1, 1), (2, 3), (5, longest)):
        inputs = batch(model, rows, length)
        error = max(error, (loaded(*inputs) - whole(*inputs)).abs().max().item())
    if not error < 1e-5:
        raise DataError(f"the program differs from the model by {error:.2g} in a probability")
    for name in ("tokenizer.json", "labels.json"):
        shutil.copyfile(folder / name, out / name)
    return f"{out / 'classifier.pt2'}: probabilities within {error:.1g} of the model's, for batches of 1 to 5 texts"


@torch.no_grad()
def export_gpt(folder: Path, out: Path) -> str:
    """Write Hugging Face's files, and compare the logits with transformers' where it is installed."""
    model, tokenizer = GPT.from_pretrained(folder), corpus.load_tokenizer(folder)
    model.save_pretrained(out)
    with atomic_write(out / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    with atomic_write(out / "tokenizer_config.json") as file:
        file.write(b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return f"{out}: written; not compared, since transformers is not installed"
    other = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.arange(min(16, model.config.context_length))[None] % model.config.vocab_size
    ours, theirs = model(tokens)[0], other(tokens).logits
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error < 1e-4:
        raise DataError(f"transformers' logits differ by {error:.2g} of the largest")
    return f"{out}: transformers' {type(other).__name__} gives the same logits, within {error:.1g} of the largest"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that a training script wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported files, another one")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that --out may hold")
    arguments = parser.parse_args(argv)
    if arguments.out.resolve() == arguments.model.resolve():
        parser.error(f"--out {arguments.out} is the model's own folder: take another one")
    try:
        export = export_classifier if labelled.is_classifier(arguments.model) else export_gpt
        if not arguments.overwrite:
            training.refuse_models(arguments.out, "add --overwrite, or change --out")
        training.make_folder(arguments.out)
        training.say(f"fastattn {fastattn.__version__}: {export(arguments.model, arguments.out)}")
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
