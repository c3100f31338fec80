"""Write text with a GPT that examples/train_gpt.py trained.

python examples/generate.py runs/gpt --prompt "ROMEO:"
python examples/generate.py runs/gpt --prompt "To be, or" --temperature 0          the most likely words
echo "JULIET:" | python examples/generate.py runs/gpt --prompt - --samples 3 --seed 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import corpus
import torch
import training
from corpus import DataError
from tokenizers import Tokenizer
from training import TrainingError

from fastattn.models import GPT


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    add("--prompt", default="\n", help="the text to continue; - reads it from standard input")
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
    add("--seed", type=int, help="repeats a result; by default every call writes something new")
    add("--device", default="auto", help="auto takes the GPU if there is one")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (%(default)s)")
    return parser.parse_args(argv)


def decode_stream(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text that each token adds; a character whose bytes are spread over tokens comes with the last of them."""
    ids, start, shown = list(prompt), max(0, len(prompt) - 8), None
    for token in tokens:
        if shown is None:
            shown = tokenizer.decode(ids[start:])
        ids.append(token)
        text = tokenizer.decode(ids[start:])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        yield text[len(shown) :]
        start, shown = max(0, len(ids) - 8), None


def run(arguments: argparse.Namespace) -> None:
    device = training.choose_device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    tokenizer = corpus.load_tokenizer(arguments.model)
    model = GPT.from_pretrained(arguments.model, device=device, dtype=dtype)
    text = sys.stdin.read().rstrip("\n") if arguments.prompt == "-" else arguments.prompt
    prompt = corpus.encode_prompt(tokenizer, text)
    tokens = torch.tensor([prompt], device=device)
    start = time.perf_counter()
    for sample in range(arguments.samples):
        seed = None if arguments.seed is None else arguments.seed + sample
        new = model.stream(
            tokens,
            arguments.tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=seed,
        )
        if arguments.samples > 1:
            print(f"--- sample {sample + 1} of {arguments.samples}")
        print(text, end="", flush=True)
        for piece in decode_stream(tokenizer, prompt, (int(token) for token in new)):
            print(piece, end="", flush=True)
        print()
    seconds, count = time.perf_counter() - start, arguments.samples * arguments.tokens
    print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s]", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
