"""How long the first steps take: importing, and compiling each op's kernels for a GPU that need not be there.

    python -m bench.startup                    import time with and without Triton; seconds of the first call of each op
    python -m bench.startup --arch sm_100      for another GPU
    python -m bench.startup --runs 1           no repetition of the imports

Everything runs in processes of its own with an empty cache. "of it compiling" is what `python -m fastattn.warmup` saves.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.arguments import count
from fastattn.warmup import architectures

REPOSITORY = Path(__file__).resolve().parents[1]
HIDE_TRITON = "import sys, importlib.util as u; find = u.find_spec; sys.modules['triton'] = None; "
HIDE_TRITON += "u.find_spec = lambda name, package=None: None if name == 'triton' else find(name, package); "
IMPORTS = {
    "import torch": "import torch",
    "import fastattn": "import fastattn",
    "import fastattn, without triton": HIDE_TRITON + "import fastattn",
    "import fastattn and the kernels": "import fastattn, fastattn.kernels.attention",
}
FIRST_CALLS = {
    "attention": "cases.attention(flags=('causal',))",
    "attention, every feature": "cases.attention(flags=('window', 'mask', 'bias', 'alibi', 'softcap', 'sinks', 'dropout'))",
    "varlen_attention": "cases.varlen_attention()",
    "attention_with_kv_cache": "cases.kv_cache()",
    "layer_norm": "cases.normalization()",
    "feed_forward": "cases.feed_forward()",
    "feed_forward, gated": "cases.feed_forward(activation='silu', gated=True)",
    "rotary": "cases.rotary()",
    "cross_entropy": "cases.cross_entropy()",
    "linear_cross_entropy": "cases.linear_cross_entropy()",
    "GPT training step": "cases.training_step(batch=1)",
    "GPT decoding step": "cases.decode_step()",
}
MEASURE = """
import sys, time, torch
from bench.codegen import cases
from fastattn.warmup import warm
start = time.perf_counter()
found = warm(lambda: {call}, "{arch}")
print(len(found), time.perf_counter() - start, sum(kernel.seconds for kernel in found))
"""


def python(program: str, cache: Path | None = None) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment.pop("FASTATTN_BACKEND", None)
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def import_seconds(program: str, runs: int) -> float:
    """The median of several processes, after one that fills the caches of the file system."""
    timed = f"import time; start = time.perf_counter(); {program}; print(time.perf_counter() - start)"
    return median([float(python(timed)) for _ in range(runs + 1)][1:])


def first_call(call: str, arch: str) -> tuple[int, float, float]:
    """(kernels, seconds of the call, seconds that compiling took of them), from an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        kernels, total, compiling = python(MEASURE.format(call=call, arch=arch), Path(cache)).split()
    return int(kernels), float(total), float(compiling)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="sm_90", help="GPU that is compiled for (%(default)s)")
    parser.add_argument(
        "--runs", type=count, default=5, help="processes that import, of which the median is taken (%(default)s)"
    )
    parser.add_argument("--only", default="", help="only the first calls with this text in their name")
    arguments = parser.parse_args(argv)
    if arguments.arch not in (known := architectures()):
        parser.error(f"--arch must be one of {', '.join(known)}, got {arguments.arch}")
    chosen = {name: call for name, call in FIRST_CALLS.items() if arguments.only in name}
    if not chosen:
        parser.error(f"no first call has {arguments.only!r} in its name; there are {', '.join(FIRST_CALLS)}")
    print("| process | seconds |\n|---|---|")
    for name, program in IMPORTS.items():
        print(f"| {name} | {import_seconds(program, arguments.runs):.2f} |", flush=True)
    print(
        f"\n| first call, forward and backward, {arguments.arch} | kernels | seconds | of it compiling |\n|---|---|---|---|"
    )
    for name, call in chosen.items():
        kernels, total, compiling = first_call(call, arguments.arch)
        print(f"| {name} | {kernels} | {total:.1f} | {compiling:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
