"""What a call costs the host before its kernels are launched: microseconds of Python, forward and with backward.

    python -m bench.overhead                   every op against its bare Triton launches and a plain autograd.Function of them
    python -m bench.overhead attention         ops with this text in their name
    python -m bench.overhead --write-budgets   record how many calls each op makes; tests/test_overhead.py allows no more

A stand-in takes the place of Triton's driver (any machine will do): everything up to the launch is real, the launch itself does
nothing. What an op does with PyTorch besides (products of a feed-forward layer's gradients, all of linear_cross_entropy's) is
part of "ours" alone, on small CPU tensors. "calls" are those of functions of fastattn's and those that they make of C functions: a count, the same every time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read at triton's first import

import torch
import triton
from torch import Tensor

import fastattn
from bench.arguments import seconds
from bench.calls import BUDGETS, count_calls
from bench.contest import Run, Times, fast, race
from fastattn.eager import products
from fastattn.kernels.stand_in import StandInDriver
from fastattn.kernels.targets import find_target

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, options


class SilentDriver(StandInDriver):
    """Launches without a trace."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


@dataclass(frozen=True)
class Op:
    """function(*inputs) → one output; the first `differentiable` inputs get gradients."""

    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    differentiable: int

    def leaves(self, backward: bool) -> list[Tensor]:
        count = self.differentiable if backward else 0
        return [x.detach().requires_grad_(i < count) for i, x in enumerate(self.inputs)]


def _ops() -> dict[str, Op]:
    """Every op of the package, so small that what PyTorch computes on the CPU beside the kernels takes no time."""

    def half(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    heads = [half(2, 4, 64, 64), half(2, 2, 64, 64), half(2, 2, 64, 64)]
    packed = [half(64, 4, 64), half(64, 2, 64), half(64, 2, 64)]
    ends = torch.tensor([0, 24, 64], dtype=torch.int32)
    caches = [half(2, 2, 256, 64), half(2, 2, 256, 64)]
    lengths, new = torch.tensor([3, 200], dtype=torch.int32), [half(2, 4, 1, 64), half(2, 2, 1, 64), half(2, 2, 1, 64)]
    row, weight = half(64, 256), torch.ones(256)
    layer = [half(64, 64), half(256, 64), half(256), half(64, 256), half(64), half(256, 64), half(256)]
    tables, target = fastattn.rotary_tables(64, 64), torch.zeros(64, dtype=torch.long)
    logits = half(64, 1024)

    def gated(x: Tensor, *w: Tensor) -> Any:
        return fastattn.feed_forward(x, *w[:4], gate_weight=w[4], gate_bias=w[5], activation="silu")

    def decode(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fastattn.attention_with_kv_cache(q, *caches, lengths, key=k, value=v)

    return {
        "attention": Op(lambda q, k, v: fastattn.attention(q, k, v, causal=True), heads, 3),
        "scaled_dot_product_attention": Op(
            lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), heads, 3
        ),
        "varlen_attention": Op(
            lambda q, k, v: fastattn.varlen_attention(q, k, v, ends, ends, 40, 40, causal=True), packed, 3
        ),
        "attention_with_kv_cache": Op(decode, new, 0),
        "layer_norm": Op(lambda x, w, b: fastattn.layer_norm(x, 256, w, b), [row, weight, weight], 3),
        "rms_norm": Op(lambda x, w: fastattn.rms_norm(x, 256, w), [row, weight], 2),
        "rms_norm with residual": Op(
            lambda x, r, w: fastattn.rms_norm(x, 256, w, residual=r)[0], [row, row, weight], 3
        ),
        "feed_forward": Op(fastattn.feed_forward, layer[:5], 5),
        "feed_forward gated": Op(gated, layer, 7),
        "rotary": Op(lambda q, k: fastattn.rotary(q, k, *tables)[0], heads[:2], 2),
        "cross_entropy": Op(lambda x: fastattn.cross_entropy(x, target), [logits], 1),
        "linear_cross_entropy": Op(
            lambda x, w: fastattn.linear_cross_entropy(x, w, target), [half(64, 64), half(1024, 64)], 2
        ),
    }


def _gradients(out: Tensor, leaves: list[Tensor], count: int) -> None:
    torch.autograd.grad(out, leaves[:count], torch.ones_like(out), allow_unused=True)


def _ours(op: Op, backward: bool) -> Run:
    leaves = op.leaves(backward)

    def run() -> None:
        out = op.function(*leaves)
        if backward:
            _gradients(out, leaves, op.differentiable)

    return run


def _recorded(run: Run) -> list[Launch]:
    """The launches that `run` makes."""
    launches: list[Launch] = []
    original = triton.JITFunction.run

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append((self, arguments, options))
        return original(self, *arguments, **options)

    with mock.patch.object(triton.JITFunction, "run", record):
        run()
    return launches


def _replay(launches: list[Launch]) -> None:
    for kernel, arguments, options in launches:
        kernel.run(*arguments, **options)


def _plain(op: Op, backward: bool, forward_launches: list[Launch], all_launches: list[Launch]) -> Run:
    """The same launches in the least that PyTorch allows: an autograd.Function that saves its inputs."""
    backward_launches = all_launches[len(forward_launches) :]

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            out = torch.empty_like(inputs[0])
            _replay(forward_launches)
            ctx.save_for_backward(*inputs, out)
            return out

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            *inputs, _ = ctx.saved_tensors
            gradients = [torch.empty_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad)]
            _replay(backward_launches)
            return tuple(gradients)

    leaves = op.leaves(backward)

    def run() -> None:
        out = Plain.apply(*leaves)
        if backward:
            _gradients(out, leaves, op.differentiable)

    return run


@dataclass(frozen=True)
class Cost:
    """Of one op in one direction: seconds by contestant and round, launches, calls."""

    times: Times
    launches: int
    calls: int

    def microseconds(self, name: str) -> float:
        return 1e6 * fast(self.times.seconds[name])


def passes(op: Op) -> tuple[bool, ...]:
    """Whether with backward."""
    return (False, True) if op.differentiable else (False,)


def measure(op: Op, backward: bool, seconds: float) -> Cost:
    ours = _ours(op, backward)
    ours()  # compiles
    launches = _recorded(ours)
    forward = _recorded(_ours(op, False))
    contestants = {
        "ours": ours,
        "bare launches": lambda: _replay(launches),
        "plain Function": _plain(op, backward, forward, launches),
    }
    return Cost(race(contestants, torch.device("cpu"), seconds), len(launches), count_calls(ours))


def counts() -> dict[str, dict[str, int]]:
    """{op: {"forward": calls, "forward+backward": calls}}"""
    found: dict[str, dict[str, int]] = {}
    for name, op in _ops().items():
        for backward in passes(op):
            run = _ours(op, backward)
            run()
            run()  # whatever is looked up once has been looked up
            found.setdefault(name, {})["forward+backward" if backward else "forward"] = count_calls(run)
    return found


def table(chosen: dict[str, Op], seconds: float) -> str:
    lines = [
        "| op | launches | ours µs | bare launches µs | plain Function µs | ours / plain Function | calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, op in chosen.items():
        for backward in passes(op):
            cost = measure(op, backward, seconds)
            ratio = cost.times.ratio("ours", "plain Function")
            times = " | ".join(f"{cost.microseconds(which):.0f}" for which in cost.times.seconds)
            title = f"{name}{', with backward' if backward else ''}"
            lines.append(f"| {title} | {cost.launches} | {times} | {ratio} | {cost.calls} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", default="", help="only ops with this text in their name")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="about how long each op may take (%(default)s)")
    parser.add_argument("--write-budgets", action="store_true", help="record the calls of each op")
    parser.add_argument("--counts", action="store_true", help="print the calls of each op as JSON, and time nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = {name: op for name, op in _ops().items() if arguments.op in name}
    if not chosen:
        parser.error(f"no op has {arguments.op!r} in its name; there are {', '.join(_ops())}")
    triton.runtime.driver.set_active(SilentDriver(find_target("sm_90")))
    # (the small CPU tensors stand for a GPU's)
    with fastattn.backend.use("triton"), mock.patch.object(products, "emulates", return_value=False):
        if arguments.counts or arguments.write_budgets:
            found = json.dumps(counts(), indent=1)
            print(found)
            if arguments.write_budgets:
                BUDGETS.write_text(found + "\n")
            return 0
        print(table(chosen, arguments.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
