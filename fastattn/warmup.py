"""Compile a model's kernels ahead of time, for a GPU that need not be there, into Triton's cache.

    python -m fastattn.warmup --arch sm_90                      a GPT of GPT-2's size: training and generation in bf16
    python -m fastattn.warmup runs/gpt --arch sm_80             the model that a folder holds (only its config.json is read)
    python -m fastattn.warmup --arch gfx942 --steps training,packed,generation --dtype fp16

The first step on a GPU compiles every kernel that it launches, for about a minute; with a warm cache it loads them. The
cache is `~/.triton/cache`, or where the environment variable TRITON_CACHE_DIR points, on this machine or in an image that is
copied to it; it holds for the same versions of Triton and fastattn. Batch sizes and lengths do not matter, dtypes and widths do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.interpreting import interpreting
from fastattn.models import GPT, Classifier, GPTConfig
from fastattn.models.pretrained import read_json
from fastattn.ops import normalization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = ("training", "packed", "generation")
GPT2 = GPTConfig(vocab_size=50257, context_length=1024, num_layers=12, num_heads=12, d_model=768)


@dataclass(frozen=True)
class Compiled:
    """A kernel that was asked for.

    Attributes:
        kernel: its name.
        seconds: what compiling it took, or loading it.
        cached: whether it was in the cache before.
    """

    kernel: str
    seconds: float
    cached: bool


def architectures() -> dict[str, str]:
    """The GPUs that kernels can be compiled for, with a product of each: {"sm_90": "H100", ...}."""
    from fastattn.kernels.targets import TARGETS

    return {name: target.product for name, target in TARGETS.items()}


def this_machines() -> str | None:
    """The architecture of this machine's GPU, or None without one."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def warm(
    function: Callable[[], object], arch: str, report: Callable[[Compiled], object] = lambda compiled: None
) -> list[Compiled]:
    """Compile the kernels that `function` launches, into Triton's cache.

    Args:
        function: calls fastattn with CPU tensors; nothing of fastattn's is computed, so what it gets back are numbers without
            meaning. Sizes may be small, but widths, dtypes and options have to be those of the real call.
        arch: one of `architectures()`.
        report: is told of each kernel as soon as it is there.

    Returns:
        the kernels, in order.

    Raises:
        ValueError: an architecture that is not known.
        RuntimeError: Triton is missing, or interprets (TRITON_INTERPRET=1).

    Example:
        >>> query = torch.zeros(1, 8, 128, 64, dtype=torch.bfloat16)
        >>> kernels = warm(lambda: fastattn.attention(query, query, query, causal=True), "sm_90")  # doctest: +SKIP
    """
    if not fastattn.backend.triton_available():
        raise RuntimeError("triton is not installed: pip install triton")
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is 1: an interpreted kernel is never compiled")
    from triton import knobs

    from fastattn.kernels.stand_in import stand_in

    found: list[Compiled] = []

    def listener(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        found.append(Compiled(src.name, times.total / 1e6, cache_hit))
        report(found[-1])

    with stand_in(arch), fastattn.backend.use("triton"), _autocast_as_on_a_gpu(), knobs.compilation.scope():
        knobs.compilation.listener = listener
        function()
    return found


@contextmanager
def _autocast_as_on_a_gpu() -> Iterator[None]:
    """Norms of 16-bit numbers give fp32 there, and on the CPU, whose tensors stand in for the GPU's, 16 bits."""
    devices = normalization.AUTOCAST_TO_FP32
    normalization.AUTOCAST_TO_FP32 = (*devices, "cpu")
    try:
        yield
    finally:
        normalization.AUTOCAST_TO_FP32 = devices


def read_config(folder: Path) -> tuple[type[GPT] | type[Classifier], Any]:
    """(class, config) of the model that a folder holds; its weights are not read.

    Raises:
        FileNotFoundError, TypeError, ValueError: the folder holds no model, or one of another kind.
    """
    settings = read_json(folder / "config.json")
    kind = Classifier if settings.get("model") == "Classifier" else GPT
    return kind, kind._from_files(settings, {})[0]


def model_steps(kind: type[GPT] | type[Classifier], config: Any, dtype: torch.dtype, steps: Sequence[str]) -> None:
    """Run `steps` of a small model whose kernels are those of `config`: one block, short sequences.

    Training computes in `dtype` under autocast, with fp32 weights; generation has its weights in `dtype`.
    """
    model = kind(dataclasses.replace(config, num_layers=1))
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if dtype != torch.float32:
        autocast = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    length = min(64, config.context_length)
    for odd in (0, 1):  # Triton compiles anew for strides that 16 does not divide, such as a row's of the log-sum-exp
        tokens = torch.zeros(2, max(1, length - odd), dtype=torch.long)
        ends = torch.tensor([0, tokens.shape[1] // 2, tokens.shape[1]], dtype=torch.int32)
        with autocast():
            if isinstance(model, Classifier):
                model(tokens, tokens == 0, tokens[:, 0])[1].backward()
                continue
            losses = [model(tokens, tokens)[1]] if "training" in steps else []
            losses += [model(tokens[:1], tokens[:1], cu_seqlens=ends)[1]] if "packed" in steps else []
        for loss in losses:
            loss.backward()
    if isinstance(model, GPT) and "generation" in steps:
        model = model.to(dtype).eval()
        for batch, length in ((2, 64), (1, 1024)):  # a long cache is divided among programs, a short one is not
            prompt = torch.zeros(batch, max(1, min(length, config.context_length - 2)), dtype=torch.long)
            model.generate(prompt, 2, temperature=0.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="folder of a saved model; without it, GPT-2's size")
    parser.add_argument("--arch", help="GPU, such as sm_90 or gfx942; default: this machine's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="what is computed in (%(default)s)")
    parser.add_argument("--steps", default="training,generation", help=f"of {','.join(STEPS)} (%(default)s)")
    arguments = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    if not fastattn.backend.triton_available():
        parser.error("triton is not installed: pip install triton")
    arch, known = arguments.arch or this_machines(), architectures()
    if arch not in known:
        names = ", ".join(f"{name} ({product})" for name, product in known.items())
        what = "--arch must be given, as this machine has no GPU" if arch is None else f"unknown architecture {arch!r}"
        parser.error(f"{what}; known: {names}")
    steps = arguments.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"--steps must be of {', '.join(STEPS)}, got {', '.join(unknown)}")
    try:
        kind, config = read_config(arguments.model) if arguments.model else (GPT, GPT2)
    except (FileNotFoundError, TypeError, ValueError) as error:
        parser.error(str(error))
    if kind is Classifier and "training" not in steps:
        parser.error(f"--steps of a Classifier must have training, which is all it does, got {arguments.steps}")

    from triton import knobs

    def progress(compiled: Compiled) -> None:
        took = "in the cache already" if compiled.cached else f"compiled in {compiled.seconds:.1f} s"
        print(f"  {compiled.kernel:32} {took}", flush=True)

    try:
        if not knobs.cache.dir:
            raise OSError("it is empty")
        Path(knobs.cache.dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=knobs.cache.dir).close()
    except OSError as error:
        parser.error(f"the kernels cannot be written, TRITON_CACHE_DIR names another folder: {error}")
    print(f"{kind.__name__} for {arch} ({known[arch]}), {arguments.dtype}, into {knobs.cache.dir}", flush=True)
    try:
        found = warm(lambda: model_steps(kind, config, DTYPES[arguments.dtype], steps), arch, progress)
    except BrokenPipeError:  # whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped; what was compiled is in the cache", file=sys.stderr)
        return 130
    new = [compiled for compiled in found if not compiled.cached]
    seconds = sum(compiled.seconds for compiled in new)
    print(f"{len(found)} kernels: {len(new)} compiled in {seconds:.0f} s, {len(found) - len(new)} were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
