"""Search tile sizes without a GPU: compile every candidate through the real launch path and rank by the bounds.

    python -m bench.tune attention_forward --targets sm_80,sm_90 --head-dims 64,128 --flags causal

A candidate that spills, needs more memory than the GPU has, or does not compile is out. The rest is ordered by the
bound on tensor-core utilisation with tensor and other work in turns, then with perfect overlap, then by resident warps;
of equals, the larger tile wins (fewer passes over the other operand). The bounds are predictions of a model
(`bench.codegen.bounds`), not measurements: paste the table next to the configuration that it chose.

What is shown is compiled again with heads that share a key head, with lengths that 16 does not divide, with a window and
sinks, and packed where the features allow it; what is wrong there stands at the end of its row.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench.arguments import count
from bench.pool import compilers

if TYPE_CHECKING:
    from fastattn.kernels.attention_config import AttentionConfig

os.environ["TRITON_INTERPRET"] = "0"  # read at triton's first import


@dataclass(frozen=True)
class Kernel:
    """`configure` is the function, where the launcher looks it up, that a candidate replaces."""

    name: str
    configure: str
    kernel: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (1, 2, 3)
    chunks: tuple[int, ...] = ()  # columns of a head that one product takes, of heads wider than that


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "attention_forward",
            "fastattn.kernels.attention.attention_forward_config",
            "attention_forward",
            rows=(64, 128, 256),
            columns=(32, 64, 128),
        ),
        Kernel(
            "attention_backward_query",
            "fastattn.kernels.attention_backward.attention_backward_query_config",
            "attention_backward_query",
            rows=(32, 64, 128),
            columns=(32, 64, 128),
            chunks=(128,),
        ),
        Kernel(
            "attention_backward_key",
            "fastattn.kernels.attention_backward.attention_backward_key_config",
            "attention_backward_key",
            rows=(16, 32, 64, 128),
            columns=(32, 64, 128),
            chunks=(128,),
        ),
    )
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"heads": 8, "lse_gradient": False},
    {"queries": 101, "keys": 131},
    {"more_flags": ["window", "sinks"]},
    {"packed": True},
)
FLAGS = ("causal", "window", "mask", "blocks", "bias", "alibi", "softcap", "sinks", "dropout")
PACKED = {"causal", "window", "alibi", "softcap", "sinks", "dropout"}  # what packed sequences have


@dataclass(frozen=True)
class Trial:
    """One candidate with what the compiler made of it; `problem` is empty where it may be used."""

    config: AttentionConfig
    problem: str = ""
    registers: int = 0
    shared_bytes: int = 0
    warps_resident: int = 0
    instructions: int = 0
    overlapped: float = 0.0
    alternating: float = 0.0

    def rank(self) -> tuple[float, ...]:
        tile = self.config.block_m * self.config.block_n / self.config.num_warps
        values = (round(self.alternating, 2), round(self.overlapped, 2), tile, self.warps_resident)
        return (bool(self.problem), *(-value for value in values))


def try_config(kernel: Kernel, target: str, config: AttentionConfig, arguments: dict[str, Any]) -> Trial:
    """Compile one candidate; anything that goes wrong is its `problem`. `arguments` are those of a case, and what VARIANTS have."""
    import fastattn.kernels.attention  # noqa: F401  mock.patch needs the module to be loaded
    from bench.codegen import cases
    from bench.codegen.analysis import analyse
    from fastattn.kernels.stand_in import stand_in

    arguments = {**arguments, "flags": [*arguments["flags"], *arguments.get("more_flags", [])]}
    packed, _ = arguments.pop("packed", False), arguments.pop("more_flags", None)
    try:
        with mock.patch(kernel.configure, return_value=config), stand_in(target) as launches:
            if packed:
                cases.varlen_attention(**arguments)
            else:
                cases.attention(backward="backward" in kernel.name, **arguments)
    except Exception as error:
        return Trial(config, problem=f"{type(error).__name__}: {error}".splitlines()[0][:60])
    report = analyse(next(launch for launch in launches if launch.kernel == kernel.kernel))
    resources, loop = report.resources, report.hot_loop
    return Trial(
        config,
        "; ".join(resources.violations()),
        resources.registers,
        resources.shared_bytes,
        report.occupancy.warps if report.occupancy else 0,
        loop.instructions if loop else 0,
        (loop.overlapped if loop else None) or 0.0,
        (loop.alternating if loop else None) or 0.0,
    )


def candidates(kernel: Kernel, head_dim: int) -> list[AttentionConfig]:
    """All combinations less those whose accumulators alone cannot fit the registers of the block."""
    from fastattn.kernels.attention_config import MAX_HEAD, AttentionConfig

    chunks = (MAX_HEAD, *(chunk for chunk in kernel.chunks if chunk < head_dim and head_dim > 128))
    product = itertools.product(kernel.rows, kernel.columns, kernel.warps, kernel.stages, (True, False), chunks)
    is_key_kernel = kernel.name.endswith("key")
    kept = []
    for rows, columns, warps, stages, hoist, chunk in product:
        held = columns * head_dim * 2 if is_key_kernel else rows * head_dim
        per_thread = (held + rows * columns) / (warps * 32)
        # chunks are for who is short of registers, as addresses in the loop are, and then three stages do not fit
        if 16 <= per_thread <= 224 and (chunk == MAX_HEAD if hoist else stages < 3):
            kept.append(AttentionConfig(rows, columns, warps, stages, hoist, chunk))
    return kept


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from fastattn.kernels.targets import TARGETS

    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kernel", choices=KERNELS, help="the kernel whose tiles are searched")
    add("--targets", default="sm_80,sm_90,sm_100,sm_120", help="GPUs, separated by commas (%(default)s)")
    add("--head-dims", default="64,128,256", help="widths of a head, separated by commas (%(default)s)")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="bfloat16",
        help="of query, key, value (%(default)s)",
    )
    add(
        "--flags",
        default="causal",
        help=f"features that are on, separated by commas, of {', '.join(FLAGS)} (%(default)s)",
    )
    add("--jobs", type=count, default=os.cpu_count(), help="processes that compile; default: a core each")
    add("--show", type=count, default=6, help="rows per table (%(default)s)")
    options = parser.parse_args(argv)
    options.targets, options.flags = (text.split(",") if text else [] for text in (options.targets, options.flags))
    for name, known in (("targets", tuple(TARGETS)), ("flags", FLAGS)):
        if unknown := [given for given in getattr(options, name) if given not in known]:
            parser.error(f"--{name} must be of {', '.join(known)}, got {', '.join(unknown)}")
    try:
        options.head_dims = [int(text) for text in options.head_dims.split(",")]
    except ValueError as error:
        parser.error(f"--head-dims: {error}")
    if not all(1 <= head_dim <= 256 for head_dim in options.head_dims):
        parser.error(f"--head-dims must be in 1..256, got {options.head_dims}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    kernel, flags = KERNELS[options.kernel], options.flags
    with compilers(options.jobs) as pool:
        for target, head_dim in itertools.product(options.targets, options.head_dims):
            arguments = {"dtype": options.dtype, "head_dim": head_dim, "flags": flags}
            trials = [
                pool.submit(try_config, kernel, target, config, arguments) for config in candidates(kernel, head_dim)
            ]
            ranked = sorted((trial.result() for trial in trials), key=Trial.rank)
            usable = sum(not trial.problem for trial in ranked)
            print(f"\n{kernel.name} {target} D{head_dim} {options.dtype} {flags}: {usable} of {len(ranked)} usable")
            print(
                "  rows cols warps stages hoist chunk | alternating overlapped | registers shared resident instructions"
            )
            for trial in ranked[: options.show]:
                c, problem = trial.config, trial.problem
                if not problem:
                    variants = [v for v in VARIANTS if "packed" not in v or PACKED.issuperset(flags)]
                    again = [pool.submit(try_config, kernel, target, c, {**arguments, **v}) for v in variants]
                    found = [result.problem for result in (one.result() for one in again) if result.problem]
                    problem = f"({found[0]})" if found else ""
                tile = f"{c.block_m:4} {c.block_n:4} {c.num_warps:5} {c.num_stages:6} {c.hoist!s:5} {c.chunk:5}"
                bounds = f"{trial.alternating:11.0%} {trial.overlapped:10.0%}"
                needs = f"{trial.registers:9} {trial.shared_bytes:6} {trial.warps_resident:8} {trial.instructions:12}"
                print(f"  {tile} | {bounds} | {needs}  {problem}", flush=True)


if __name__ == "__main__":
    main()
