r"""Write text with a GPT that examples/train_gpt.py or finetune_gpt.py trained.

python examples/generate.py runs/gpt --prompt "ROMEO:"
python examples/generate.py runs/gpt --prompt "To be, or" --temperature 0          the most likely words
echo "JULIET:" | python examples/generate.py runs/gpt --prompt - --samples 3 --seed 1
python examples/generate.py runs/gpt --interactive --stop $'\n\n'                  a prompt a line
python examples/generate.py runs/gpt --prompts prompts.txt > answers.jsonl         a file of them, .txt (a line each) or .jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import torch
import training
from corpus import DataError
from streaming import decode_stream
from training import TrainingError

from fastattn.models import GPT


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--prompt", default="\n", help="the text to continue; - reads it from standard input (an empty line)")
    either("--prompts", type=Path, help="a file of prompts; the result is a line of JSON for each")
    either("--interactive", action="store_true", help="ask for one prompt after the other")
    add("--tokens", type=int, default=300, help="tokens to write (%(default)s)")
    add("--samples", type=int, default=1, help="how many continuations, one after the other (%(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="higher is wilder, 0 takes the likeliest (%(default)s)",
    )
    add("--top-k", type=int, help="choose among the k likeliest tokens")
    add("--top-p", type=float, default=0.95, help="choose among the likeliest tokens that reach p (%(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what was said is less likely (%(default)s)")
    add("--stop", action="append", default=[], help="end before this text; may be given several times")
    add("--seed", type=training.seed_number, help="repeats a result; by default every call writes something new")
    add("--device", default="auto", help="auto takes the GPU if there is one")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples must be at least 1, got {arguments.samples}")
    return arguments


def options(arguments: argparse.Namespace, sample: int = 0) -> dict[str, Any]:
    """What `GPT.stream` takes."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    seed = None if arguments.seed is None else arguments.seed + sample
    return {name: getattr(arguments, name) for name in names} | {"seed": seed}


class Writer:
    """A model, its tokenizer, and how to write with them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = training.choose_device(arguments.device)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
        self.tokenizer = corpus.load_tokenizer(arguments.model)
        self.model = GPT.from_pretrained(arguments.model, device=self.device, dtype=dtype)
        self.end = self.tokenizer.token_to_id(corpus.END_OF_TEXT)
        self.count = 0

    def tokens(self, prompt: list[int], sample: int) -> Iterator[int]:
        """What follows the prompt, up to the end of the text."""
        given = torch.tensor([prompt], device=self.device)
        with training.named_by_options(self.arguments):
            stream = self.model.stream(given, self.arguments.tokens, **options(self.arguments, sample))
        for token in stream:
            self.count += 1
            if token.item() == self.end:
                return
            yield int(token)

    def continuation(self, text: str, sample: int = 0) -> Iterator[str]:
        """The text that follows, piece by piece."""
        prompt = corpus.encode_prompt(self.tokenizer, text)
        return decode_stream(self.tokenizer, prompt, self.tokens(prompt, sample), self.arguments.stop)

    def show(self, text: str, sample: int = 0) -> None:
        pieces = self.continuation(text, sample)
        print(text + next(pieces, ""), end="", flush=True)  # what is wrong is told before anything is written
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank, or the field `prompt` of a .jsonl file's."""
    # (`splitlines` would cut strings at characters that JSON allows in them)
    lines = [line for line in corpus.read_file(path, "--prompts").split("\n") if line.strip()]
    if path.suffix.lower() != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: every line needs the field prompt ({error!r})") from error


def run(arguments: argparse.Namespace) -> None:
    writer, start = Writer(arguments), time.perf_counter()
    if arguments.interactive:
        print("A prompt, please; an empty line ends.", file=sys.stderr)
        while text := input("> "):
            writer.show(text)
        return
    if arguments.prompts:
        for text in read_prompts(arguments.prompts):
            for sample in range(arguments.samples):
                completion = "".join(writer.continuation(text, sample))
                print(json.dumps({"prompt": text, "completion": completion}), flush=True)
    else:
        text = corpus.read_stdin().rstrip("\n") if arguments.prompt == "-" else arguments.prompt
        for sample in range(arguments.samples):
            if arguments.samples > 1:
                print(f"--- sample {sample + 1} of {arguments.samples}")
            writer.show(text, sample)
    seconds = time.perf_counter() - start
    print(f"[{writer.count} tokens in {seconds:.1f} s, {writer.count / seconds:.0f} tokens/s]", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except BrokenPipeError:  # whoever read this has seen enough
        training.drop_stdout()
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except EOFError:  # the end of what --interactive reads
        print()
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
