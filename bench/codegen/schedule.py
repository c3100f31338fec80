"""How evenly the programs of causal attention share a GPU, by the order in which they start.

    python -m bench.codegen.schedule

A multiprocessor takes the next program, by its number, when one of its own ends. A program costs its blocks of keys and as much
as two more for what it does once (an assumption), and one of two on a multiprocessor is no faster when the other has ended.
Printed is the time until the last program ends ÷ the time with even shares, of the forward at a head width of 128, for head
after head, and for the order of `fastattn/kernels/order.py`. What another order costs in the L2 cache is not in it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence

from fastattn.kernels.attention_config import attention_forward_config
from fastattn.kernels.launch import Target
from fastattn.kernels.order import heads_together

HEAD_DIM, ITEMSIZE = 128, 2
RESIDENT_WARPS = 8  # of these kernels on a multiprocessor: registers allow no more
ONCE = 2.0  # blocks of keys
GPUS = {"A100": (80, 108), "H100": (90, 132), "B200": (100, 148)}  # architecture, multiprocessors
SIZES = ((16, 2048), (32, 2048), (64, 2048), (64, 4096), (16, 16384))  # heads of all samples, tokens


def order(heads: int, blocks: int, together: int | None) -> Iterator[tuple[int, int]]:
    """(head, place among its blocks, the longest first) of each program in turn, as `order.head_and_block` has them."""
    for first in range(0, heads, together or 1):
        mixed = range(first, min(first + (together or 1), heads))
        for place, head in itertools.product(range(blocks), mixed):
            yield head, place


def unevenness(costs: Iterable[float], slots: int) -> float:
    """Time until the last of the programs ends ÷ the time with even shares; `slots` of them run at a time."""
    busy, total = [0.0] * slots, 0.0
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
        total += cost
    return max(busy) * slots / total


def forward(gpu: str, heads: int, tokens: int, mixed: bool) -> float:
    """`unevenness` of the causal forward, with the tiles that it would have."""
    arch, processors = GPUS[gpu]
    config = attention_forward_config(Target("cuda", arch, processors), HEAD_DIM, ITEMSIZE)
    blocks = -(-tokens // config.block_m)
    together = heads_together(heads, 2 * tokens * HEAD_DIM * ITEMSIZE, None, 0, listed=False) if mixed else None
    seen = (min(tokens, (blocks - place) * config.block_m) for _, place in order(heads, blocks, together))
    costs = (ONCE + -(-keys // config.block_n) for keys in seen)
    return unevenness(costs, processors * RESIDENT_WARPS // config.num_warps)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m bench.codegen.schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    print("| heads, tokens | " + " | ".join(f"{gpu}: head after head | mixed" for gpu in GPUS) + " |")
    print("| --- |" + " --- | --- |" * len(GPUS))
    for heads, tokens in SIZES:
        cells = (f"{forward(gpu, heads, tokens, mixed):.2f}" for gpu in GPUS for mixed in (False, True))
        print(f"| {heads} x {tokens} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
