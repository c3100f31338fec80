"""Which words a trained model attends to, for every layer and head: a picture, and a page to look closer.

    python examples/attention_map.py runs/classifier --text "A wonderful film, but far too long."
    python examples/attention_map.py runs/gpt --file speech.txt --out runs/speech
    python examples/attention_map.py runs/classifier --data imdb --index 7          the text of that number of a source

Writes OUT.png and OUT.html, one file each that loads nothing. "received" is the mean attention that a word receives from all
that see it; "last" is what the last word of a prompt attends to, from which a GPT tells the next one. The bars compare with a
model that attends to all that it sees alike (in a GPT, the first words are seen with few others). Memory grows with
the length of the text, not with its square. Attention says what was read, not why a label was given.
The picture draws a box for a character that its font lacks (as of Chinese); the page shows it.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import corpus
import labelled
import numpy as np
import torch
import training
from corpus import DataError
from tokenizers import Encoding
from training import TrainingError

from fastattn.models import GPT, Classifier, attention_maps
from fastattn.models.pretrained import atomic_write

MEANINGS = {"received": "attention that a word receives", "last": "attention of the last word"}


@dataclass(frozen=True)
class TextMap:
    """A text, cut where the model's tokens end, and their attention.

    Attributes:
        pieces: (what stands before the token, the token's own characters), for each token that was read.
        rest: what stands after the last.
        weights: "received" and, of a model that reads one row out, "last": (layers, heads, tokens).
        alike: for each of them what it would be if the model attended to all that it sees alike: (tokens,).
    """

    pieces: list[tuple[str, str]]
    rest: str
    weights: dict[str, np.ndarray]
    alike: dict[str, np.ndarray]

    def relative(self, name: str) -> np.ndarray:
        """The mean of all heads, over what it would be if all were alike: (tokens,)."""
        return self.weights[name].mean((0, 1)) / self.alike[name]


def map_text(model: GPT | Classifier, encoding: Encoding, text: str) -> TextMap:
    """The map of a text, of which a classifier reads both ends and a GPT the end if it is too long.

    Raises:
        DataError: the text holds no token.
    """
    length = model.config.context_length
    if isinstance(model, Classifier):
        chosen = labelled.kept(len(encoding.ids), length)
    else:
        chosen = np.arange(len(encoding.ids))[-length:]
    if not len(chosen):
        raise DataError("the text is empty: there is nothing to attend to")
    device = next(model.parameters()).device
    maps = attention_maps(model, torch.tensor(np.array(encoding.ids)[chosen], device=device))
    pieces, end = [], encoding.offsets[chosen[0]][0]
    for before, index in zip([chosen[0] - 1, *chosen], chosen):
        start, stop = encoding.offsets[index]
        pieces.append((text[end:start] if index == before + 1 else " [...] ", text[max(start, end) : stop]))
        end = stop
    weights = {name: part.cpu().numpy() for name, part in maps._asdict().items() if part is not None}
    return TextMap(pieces, text[end:], weights, _alike(model, len(pieces)))


def _alike(model: GPT | Classifier, tokens: int) -> dict[str, np.ndarray]:
    """See `TextMap.alike`."""
    if isinstance(model, Classifier):
        everything = np.full(tokens, 1.0 / (tokens + (model.config.pooling == "cls")))
        return {"received": everything, "last": everything}
    reach = min(model.config.window or tokens, tokens)
    weight = 1.0 / np.minimum(np.arange(tokens) + 1, reach)  # of each word that a row sees
    sums, start = np.cumsum([0.0, *weight]), np.arange(tokens)
    end = np.minimum(start + reach, tokens)
    return {"received": (sums[end] - sums[start]) / (end - start), "last": np.full(tokens, weight[-1])}


def draw(found: TextMap, path: Path, title: str) -> None:
    """Heat maps, a row for each layer and head and a column for each token, and the words that matter most."""
    plt = training.pyplot()
    words = [word for _, word in found.pieces]
    shown = len(words) <= 64
    count = len(found.weights)
    layers, heads, _ = next(iter(found.weights.values())).shape
    width = min(16, max(8, 0.22 * len(words) + 3)) if shown else 14
    figure, axes = plt.subplots(
        2 * count, 1, figsize=(width, count * (3.6 + 0.22 * layers * heads)), layout="constrained", squeeze=False,
        height_ratios=[1 + 0.12 * layers * heads, 1] * count,
    )  # fmt: skip
    for (name, weights), heat, bars in zip(found.weights.items(), axes[::2, 0], axes[1::2, 0]):
        rows = weights.reshape(layers * heads, -1)
        step = max(1, len(words) // 400)
        starts = np.arange(0, len(words), step)  # of a long text, the strongest of a few neighbours
        rows = np.maximum.reduceat(rows / rows.max(axis=1, keepdims=True).clip(1e-12), starts, axis=1)
        extent = (-0.5, len(words) - 0.5, layers * heads - 0.5, -0.5)
        heat.imshow(rows, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        heat.set_yticks(range(layers * heads), [f"layer {i // heads}, head {i % heads}" for i in range(layers * heads)])
        if shown:
            heat.set_xticks(range(len(words)), [plain(word) for word in words], rotation=90)
        heat.set(title=f"{MEANINGS[name]} (black: 0, brightest: the most of its row)", xlabel="" if shown else "token")
        relative = found.relative(name)
        top = np.argsort(-relative, kind="stable")[:20]
        bars.bar(range(len(top)), relative[top], color="tab:orange")
        bars.axhline(1, color="gray", linestyle="--", linewidth=0.8)
        bars.set_xticks(range(len(top)), [plain(words[i]) for i in top], rotation=90)
        bars.set(title="the words with the most, mean of all heads (dashed: an even share)", ylabel="÷ even share")
    figure.suptitle(title)
    training.save_picture(figure, path, dpi=110)
    plt.close(figure)


def plain(word: str) -> str:
    """A token in one line, its white space made visible."""
    return word.replace("\n", "\u21b5").strip() or "\u2423"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
  body {{ font: 16px/1.8 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }}
  #text {{ white-space: pre-wrap }}  #text span {{ border-radius: 3px }}  label {{ margin-right: 1rem }}
</style>
<h1>{title}</h1>
<p>{verdict}</p>
<p><label>attention <select id="name"></select></label> <label>of <select id="head"></select></label></p>
<p id="text">{text}</p>
<script>
const maps = {maps};
const at = id => document.getElementById(id), spans = at("text").querySelectorAll("span");
const fill = (id, names) => names.forEach((name, i) => at(id).add(new Option(name, i)));
const first = Object.values(maps)[0];
fill("name", Object.keys(maps));
fill("head", ["all heads, their mean", ...first.map((_, i) => `layer ${{Math.floor(i / {heads})}}, head ${{i % {heads}}}`)]);
const show = () => {{
  const rows = Object.values(maps)[at("name").value], head = +at("head").value;
  const row = head ? rows[head - 1] : rows[0].map((_, t) => rows.reduce((sum, r) => sum + r[t], 0) / rows.length);
  const most = Math.max(...row, 1e-12);
  spans.forEach((span, t) => {{
    span.style.background = `rgba(255, 120, 0, ${{(row[t] / most).toFixed(3)}})`;
    span.title = `${{(100 * row[t]).toFixed(2)}} %`;
  }});
}};
at("name").onchange = at("head").onchange = show;
show();
</script>
</html>
"""


def page(found: TextMap, title: str, verdict: str) -> str:
    """The text, each word on a background that is the stronger the more attention it got, for every layer and head."""
    heads = next(iter(found.weights.values())).shape[1]
    maps = {name: np.round(rows.reshape(-1, rows.shape[2]), 6).tolist() for name, rows in found.weights.items()}
    spans = [f"{html.escape(before)}<span>{html.escape(word)}</span>" for before, word in found.pieces]
    text = "".join(spans) + html.escape(found.rest)
    return PAGE.format(
        title=html.escape(title), verdict=html.escape(verdict), text=text, maps=json.dumps(maps), heads=heads
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="folder that train_classifier.py, train_gpt.py or finetune_gpt.py wrote")
    text = parser.add_mutually_exclusive_group(required=True).add_argument
    text("--text", help="the review or prompt")
    text("--file", type=Path, help="a UTF-8 file that holds it; - reads standard input")
    text("--data", help="a source of train_classifier.py, of which --index chooses a text")
    add("--index", type=int, default=0, help="number of the text in --data (%(default)s)")
    add("--out", type=Path, help="name of the files without .png and .html; default: attention in the model's folder")
    add("--device", default="auto", help="auto takes the GPU if there is one")
    return parser.parse_args(argv)


def read_text(arguments: argparse.Namespace) -> str:
    if arguments.text is not None:
        return str(arguments.text)
    if arguments.data is not None:
        documents = corpus.read_documents(arguments.data)
        if not 0 <= arguments.index < len(documents):
            raise DataError(
                f"--index must be in [0, {len(documents)}), the texts of {arguments.data}, got {arguments.index}"
            )
        return documents[arguments.index].text
    return corpus.read_stdin() if str(arguments.file) == "-" else corpus.read_file(arguments.file, "--file")


def look(arguments: argparse.Namespace) -> None:
    text, device = corpus.whole(read_text(arguments)), training.choose_device(arguments.device)
    if arguments.out:
        training.make_folder(arguments.out.parent)
    model: GPT | Classifier
    if labelled.is_classifier(arguments.model):
        model, tokenizer, names = labelled.load_classifier(arguments.model, device)
        tokens = labelled.encode(tokenizer, [text], model.config.context_length)
        (row,) = labelled.probabilities(model, tokens)
        verdict = ", ".join(f"{names[i]} {row[i]:.1%}" for i in np.argsort(-row))
    else:
        tokenizer = corpus.load_tokenizer(arguments.model)
        model, verdict = GPT.from_pretrained(arguments.model, device=device), ""
    encoding = tokenizer.encode(text)
    found = map_text(model, encoding, text)
    if len(found.pieces) < len(encoding.ids):
        training.say(f"note: the text has {len(encoding.ids):,} tokens, of which the model reads {len(found.pieces):,}")
    out = arguments.out or arguments.model / "attention"
    title = f"{arguments.model.name}{f': {verdict}' if verdict else ''}"
    draw(found, out.with_name(f"{out.name}.png"), title)
    with atomic_write(out.with_name(f"{out.name}.html")) as file:
        file.write(page(found, arguments.model.name, verdict).encode())
    if verdict:
        training.say(verdict)
    for name in found.weights:
        top = [plain(found.pieces[i][1]) for i in np.argsort(-found.relative(name), kind="stable")[:10]]
        training.say(f"attention {name}, most first: {' '.join(top)}")
    training.say(f"picture {out}.png, page {out}.html")


def main(argv: list[str] | None = None) -> int:
    try:
        look(parse(argv))
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
