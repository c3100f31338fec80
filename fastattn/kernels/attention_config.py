"""Attention's tile sizes, warps and stages. What config.py says of the others holds here as well."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal, TypeAlias

from fastattn.kernels.config import power_of_2
from fastattn.kernels.launch import Target

MAX_HEAD = 256


@dataclass(frozen=True)
class AttentionConfig:
    """One program handles block_m query rows against block_n key columns at a time.

    Attributes:
        hoist: whether the compiler may move address arithmetic out of the loop; off where registers are short.
        chunk: the most columns of a head that one product takes (backward only, see `kernels.chunks`).
        max_registers: of a thread, on NVIDIA. None leaves it to ptxas, which prefers a spill of a few bytes to one block
            less on a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    hoist: bool = True
    chunk: int = MAX_HEAD
    max_registers: int | None = None


# What a score takes beyond a scale, a window, sinks and a block mask: nothing; ALiBi; a softcap; a mask or a bias, read from
# memory in wide words, without a window to the left; dropout; or several of these, or one of them and a block mask.
Scores: TypeAlias = Literal["plain", "alibi", "capped", "loaded", "dropped", "heavy"]
_Table: TypeAlias = dict[int, tuple[Any, ...]]
_Widths: TypeAlias = dict[str, tuple[int, ...]]

# 16-bit attention, by architecture and width of a head: the best predicted share of the tensor cores' peak that
# `python -m bench.tune` found without register spills (causal and not). "small" is every GPU with about 100 KB of shared
# memory (sm_86, sm_89, sm_120) and whatever is unknown; on AMD nothing is pipelined. Heads of 256 owe their tiles to addresses that
# stay in the loop, and the backward to halves of a head at a time (bench/codegen/TECHNIQUES.md has the figures).
_FORWARD: dict[str, _Table] = {
    "sm_80": {64: (128, 64, 4, 3), 128: (128, 32, 4, 2), 256: (64, 64, 8, 2, False)},
    "sm_90": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2, False), 256: (128, 32, 8, 2)},
    "sm_100": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2, False)},
    "small": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    "amd": {64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
}
_BACKWARD_QUERY: dict[str, _Table] = {
    "sm_80": {64: (128, 32, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2, False, 128)},
    "sm_90": {64: (64, 64, 4, 2), 128: (128, 128, 8, 2, False), 256: (64, 64, 4, 2, False)},
    "sm_100": {64: (128, 128, 8, 1, True, MAX_HEAD, 255), 128: (128, 128, 8, 2, False), 256: (128, 64, 8, 1, False)},
    "small": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (32, 64, 4, 1, False)},
    "amd": {64: (128, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
}
_BACKWARD_KEY: dict[str, _Table] = {
    "sm_80": {64: (16, 128, 4, 2), 128: (128, 32, 4, 2), 256: (64, 32, 4, 2, False, 128)},
    "sm_90": {64: (64, 128, 8, 1), 128: (64, 128, 8, 2, False), 256: (64, 64, 8, 2, False, 128)},
    "sm_100": {64: (64, 128, 8, 1, True, MAX_HEAD, 192), 128: (64, 128, 8, 1), 256: (64, 64, 8, 1)},
    "small": {64: (32, 64, 4, 2), 128: (32, 64, 8, 1), 256: (16, 32, 4, 2, False)},
    "amd": {64: (32, 128, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
}
# fp32 products at IEEE precision run on the FMA units, from registers: 8 warps share a small tile, and the backward takes
# heads wider than 128 in chunks (whole, the dQ pass spills 168 bytes on sm_80 and 184 on sm_90 at every tile size; in
# chunks of 64 it needs 128 and 164 registers, in chunks of 128 it needs 199 and 174). Tiles of 32 x 32 spill up to 264 bytes
# in the forward of masked columns (a width of 80) or with every feature; of 32 x 16 they need 96 to 165 registers for a
# tenth more instructions. A limit on registers keeps ptxas from spilling 8 to 24 bytes where it would stop at 80 or 128; in
# dBias of heads wider than 64 it makes a spill.
_CHUNK = 64

# With several of mask, bias, ALiBi, softcap and dropout each score needs more registers: small tiles. dK and dV of heads wider than
# 128 in one chunk spill 64 bytes on sm_80 (packed), in chunks of 64 none, with a tenth fewer instructions at a width of 192; with every
# feature on they spill 32 there unless addresses stay in the loop. Forwards of that width: on sm_100 64 rows go to tensor memory, for up
# to twice the predicted share of 32, and spill 16 bytes with odd strides if addresses leave the loop; on sm_120 64 rows spill 64 bytes
# with dropout, 32 none with 8 warps; of heads of 128 there, 64 rows spill 16 with everything and odd strides, 32 none, for 0.94 to 1.1
# times the share. The dQ pass of heads of 64 spills 8 there with a bias and odd strides, with 8 warps none, for more of the share; of
# heads of 256 in one chunk it spills 16 on sm_90 with everything and odd strides, in two none, with up to 5 % fewer instructions.
_FORWARD_HEAVY: _Table = {64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 16, 4, 1)}
_FORWARD_HEAVY_SM_80: _Table = {**_FORWARD_HEAVY, 128: (64, 32, 8, 1, False)}
_FORWARD_HEAVY_SM_100: _Table = {**_FORWARD_HEAVY, 256: (64, 16, 8, 1, False)}
_FORWARD_HEAVY_SMALL: _Table = {**_FORWARD_HEAVY, 128: (32, 32, 4, 1), 256: (32, 32, 8, 1, False)}
_BACKWARD_QUERY_HEAVY: dict[str, _Table] = {
    "sm_80": {64: (64, 32, 4, 1), 128: (64, 32, 8, 1, False), 256: (32, 32, 8, 1)},
    "sm_90": {64: (64, 32, 4, 1), 128: (64, 32, 8, 1, False), 256: (64, 32, 8, 1, False, 128)},
    "sm_100": {64: (64, 32, 4, 1), 128: (128, 32, 8, 1, False), 256: (128, 32, 8, 1, False)},
    "small": {64: (64, 32, 8, 1, True, MAX_HEAD, 255), 128: (32, 32, 4, 1, True, MAX_HEAD, 255), 256: (32, 32, 8, 1)},
}
_BACKWARD_KEY_HEAVY: _Table = {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1, True, _CHUNK)}
_BACKWARD_KEY_HEAVY_SM_80: _Table = {**_BACKWARD_KEY_HEAVY, 256: (32, 32, 8, 1, False, _CHUNK)}
_BACKWARD_KEY_HEAVY_SM_90: _Table = {**_BACKWARD_KEY_HEAVY, 256: (16, 32, 8, 1, False, _CHUNK)}
_BACKWARD_HEAVY_AMD: _Table = {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1)}
# Widths of these at which ptxas, left alone, stops at 80, 96, 128 or 168 registers of the 159 to 255 that it needs, and spills 8 to
# 32 bytes: of a softcapped score, of dropout alone or with a mask, of packed sequences with everything, as architectures differ.
_FORWARD_LIMITED: _Widths = {"sm_80": (64, 128, 256), "sm_90": (256,), "sm_100": (64, 128, 256), "small": (64, 128)}
_BACKWARD_KEY_LIMITED: _Widths = {"sm_80": (128,), "sm_90": (64,), "sm_100": (64, 128), "small": (64, 128)}
# A block mask's lists put addresses into the loop that depend on what was loaded: with other features small tiles, too. Alone it
# takes the tiles of no mask, which makes 2 to 8 times the predicted share, but for these, where they spill 8 to 4,248 bytes.
_FORWARD_LISTED: dict[str, _Table] = {
    "sm_80": {64: (64, 64, 4, 2), 128: (128, 64, 8, 1, False)},
    "sm_90": {256: (64, 64, 8, 1, False)},
    "sm_100": {128: (128, 64, 8, 1), 256: (64, 64, 8, 1)},
    "small": {128: (64, 64, 8, 1)},
}
_BACKWARD_QUERY_LISTED: dict[str, _Table] = {
    "sm_80": {64: (64, 64, 4, 2), 256: (64, 32, 8, 2, False)},
    "small": {64: (64, 32, 8, 1), 128: (64, 32, 4, 1)},
}
_BACKWARD_KEY_LISTED: dict[str, _Table] = {
    "sm_80": {128: (64, 64, 8, 1)},
    "sm_90": {256: (32, 64, 8, 2, False, 128)},
    "sm_100": {128: (64, 128, 8, 1, False, MAX_HEAD, 255), 256: (64, 64, 8, 1, False)},
    "small": {64: (64, 64, 8, 1, False), 256: (16, 64, 8, 1, False)},
}
_FORWARD_BLOCKS: _Table = {64: (64, 32, 8, 1), 128: (64, 32, 8, 1, False), 256: (32, 32, 8, 1)}
_BACKWARD_QUERY_BLOCKS: _Table = {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)}
# Packed sequences keep a few more addresses alive: too many for dK and dV on sm_80 and the small GPUs, and on sm_100 one more tile
# than tensor memory holds.
_KEY_PACKED: _Table = {**_BACKWARD_KEY_HEAVY, 64: (32, 64, 4, 1)}
_BACKWARD_KEY_PACKED: dict[str, _Table] = {
    "sm_80": _KEY_PACKED,
    "small": _KEY_PACKED,
    "sm_100": {256: _KEY_PACKED[256]},
}

# Ragged heads of up to 128 with every feature: with the tiles above they spill 8 to 256 bytes of addresses at a width of 72.
_FORWARD_RAGGED = AttentionConfig(32, 16, 8, 1)
_BACKWARD_QUERY_RAGGED = AttentionConfig(32, 32, 8, 1, chunk=_CHUNK)
_BACKWARD_KEY_RAGGED = AttentionConfig(32, 32, 8, 1, hoist=False)
# ... and without a feature those of aligned heads spill 704 to 2,200 bytes here, of 250 numbers on sm_120 320 under Triton 3.9.0 alone
_BACKWARD_KEY_RAGGED_PLAIN: dict[str, _Table] = {
    "sm_80": {128: (64, 64, 8, 1, False)},
    "small": {256: _BACKWARD_KEY["small"][256]},
}

# Heads that share a key head, and packed sequences, keep more counters and pointers through the loops: with the tiles above dK and
# dV spill 8 to 184 bytes (on sm_90 with Triton 3.9.0 alone), packed forwards of 128 on sm_90 8 bytes and of 256 on sm_100 32; heads
# of 256 need more tensor memory than sm_100 has.
_BACKWARD_KEY_GROUPED: dict[str, _Table] = {
    "sm_80": {64: (32, 64, 4, 2), 128: (128, 32, 8, 2, False), 256: (32, 32, 8, 2, False, 128)},
    "sm_90": {128: (32, 128, 8, 1, False), 256: (32, 64, 8, 1, False, 64)},
    "small": {256: _BACKWARD_KEY_HEAVY[256]},
    "sm_100": {128: (64, 128, 8, 1, False), 256: _KEY_PACKED[256]},
}
_FORWARD_PACKED: dict[str, _Table] = {"sm_90": {128: (128, 64, 8, 2)}, "sm_100": {256: (128, 32, 8, 2)}}

# A softcap takes registers, but no addresses, and a mask or a bias alone not many: but for the small tiles of AMD, they take
# those of plain scores, which make 1.1 to 6 times the predicted share of the small ones. But for these, where those spill 8 to 592
# bytes, with ALiBi and a softcap, with one key head or packed, or need more memory than there is.
_FORWARD_CAPPED: dict[str, _Table] = {
    "sm_80": {64: (128, 64, 4, 3, True, MAX_HEAD, 255), 128: (128, 64, 8, 1, False)},
    "small": {128: (128, 32, 8, 1)},
}
_FORWARD_LOADED: dict[str, _Table] = {
    "sm_80": {64: (128, 32, 4, 2), 128: (128, 64, 8, 2)},
    "sm_90": {128: (128, 128, 8, 2), 256: (128, 32, 8, 2, False)},
    "small": {64: (64, 64, 8, 2), 128: (128, 32, 8, 2, False), 256: (64, 32, 8, 1, False)},
}
_BACKWARD_QUERY_CAPPED: dict[str, _Table] = {
    "sm_90": {128: (128, 64, 8, 2, False)},
    "sm_100": {64: (128, 64, 8, 1, False)},
}
_BACKWARD_QUERY_LOADED: dict[str, _Table] = {
    "sm_80": {64: (128, 32, 4, 1)},
    "sm_90": {128: (128, 64, 8, 2, False)},
    "sm_100": {128: (128, 128, 8, 1, False)},
    "small": {128: (64, 32, 4, 2), 256: (64, 32, 8, 1, False)},
}
_BACKWARD_KEY_CAPPED: dict[str, _Table] = {
    "sm_80": {64: (32, 64, 4, 1), 128: (32, 64, 4, 2), 256: _BACKWARD_KEY_HEAVY_SM_80[256]},
    "sm_90": {128: (32, 128, 8, 1, False), 256: (32, 64, 8, 1, False, 64)},
}
# ... on sm_80 with heads that share a key head, or packed, others than that:
_BACKWARD_KEY_CAPPED_GROUPED: dict[str, _Table] = {"sm_80": {128: (32, 64, 8, 1)}}
_BACKWARD_KEY_LOADED: dict[str, _Table] = {
    "sm_80": {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: _BACKWARD_KEY_HEAVY_SM_80[256]},
    "sm_90": {64: (64, 64, 4, 1), 128: (32, 128, 8, 1, False), 256: (32, 64, 8, 1, False, 64)},
    "sm_100": {64: (64, 128, 8, 1), 128: (64, 128, 8, 1, False), 256: (64, 64, 8, 1, False, MAX_HEAD, 255)},
    "small": {64: (32, 64, 4, 1), 256: _BACKWARD_KEY_HEAVY[256]},
}

# ALiBi is three instructions a score: the tiles of plain scores, but for these, where they spill 8 to 184 bytes.
_FORWARD_ALIBI: dict[str, _Table] = {"sm_90": {128: (128, 64, 8, 2)}, "sm_100": {64: (128, 64, 4, 1)}}
_FORWARD_ALIBI_PACKED: dict[str, _Table] = {
    "sm_90": {256: (128, 32, 8, 2, False)},
    "sm_100": {256: (128, 32, 8, 1, False)},
}
_BACKWARD_QUERY_ALIBI: dict[str, _Table] = {
    "sm_90": {256: (64, 64, 4, 2, False, 128)},
    "sm_100": {64: (128, 64, 8, 1, False)},
}
_BACKWARD_KEY_ALIBI: dict[str, _Table] = {"sm_80": {128: (128, 32, 4, 2, False), 256: _BACKWARD_KEY_HEAVY_SM_80[256]}}
_BACKWARD_KEY_ALIBI_GROUPED: dict[str, _Table] = {
    "sm_80": {64: (32, 64, 4, 1), 128: (128, 32, 8, 1, False)},
    "small": {128: (32, 64, 8, 1)},
}

# Dropout alone takes two integer products a score (`kernels.random.keep_tile`): up to a width of 128 the tiles of plain scores, but for
# these, where those spill 8 to 120 bytes.
_FORWARD_DROPPED: dict[str, _Table] = {
    "sm_80": {64: (128, 64, 4, 2, True, MAX_HEAD, 255)},
    "sm_90": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
    "sm_100": {64: (128, 64, 8, 2)},
}
_BACKWARD_QUERY_DROPPED: dict[str, _Table] = {
    "sm_90": {128: (128, 64, 8, 2, False)},
    "sm_100": {128: (128, 128, 8, 1, False)},
}
_BACKWARD_KEY_DROPPED: dict[str, _Table] = {
    "sm_80": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
    "sm_90": {128: (32, 128, 8, 1, False)},
    "sm_100": {64: (64, 64, 8, 1), 128: (32, 128, 8, 1, False)},
    "small": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1, True, MAX_HEAD, 255)},
}

# Where the tiles above spill with Triton 3.8 or newer, these do not: for a class of scores, or "blocks" for a block mask, instead of the
# tables above; for "rest" instead of that of plain scores alone.
_BACKWARD_QUERY_NEWER: dict[str, dict[str, _Table]] = {
    "alibi": {"sm_90": {128: (128, 64, 8, 2, False)}, "small": {256: (64, 32, 8, 1)}},
    "capped": {"small": {256: (64, 32, 8, 1)}},
    "dropped": {"sm_80": {128: (128, 32, 8, 2)}},
    "loaded": {"sm_100": {64: (128, 128, 8, 1, False, MAX_HEAD, 255)}, "small": {256: (64, 32, 8, 1)}},
    "rest": {"sm_80": {256: (32, 64, 4, 2, True, 128)}, "small": {256: (32, 64, 4, 1, True, _CHUNK)}},
}
_BACKWARD_KEY_NEWER: dict[str, dict[str, _Table]] = {
    "alibi": {"sm_80": {128: (64, 32, 4, 2)}},
    "blocks": {"sm_80": {256: (64, 32, 8, 2, True, _CHUNK)}},
    "capped": {"sm_90": {64: (64, 128, 8, 1, False)}, "sm_100": {64: (64, 128, 8, 1, True, MAX_HEAD, 255)}},
    "dropped": {"sm_100": {64: (64, 64, 8, 1, True, MAX_HEAD, 255)}},
    "loaded": {"sm_90": {128: (32, 64, 4, 1, False)}},
    "rest": {"sm_80": {256: (64, 32, 4, 2, True, _CHUNK)}, "small": {256: (16, 32, 4, 2)}},
}


def _width(head_dim: int) -> int:
    """The tables' width of a head."""
    return next(width for width in (64, 128, MAX_HEAD) if head_dim <= width)


def _needs_small_tiles(scores: Scores, blocks: bool, head_dim: int, itemsize: int, ragged: bool, family: str) -> bool:
    """Whether scores leave too few registers for the tiles of plain ones."""
    if scores == "plain" and not blocks:
        return False
    many = scores == "heavy" or (scores == "dropped" and head_dim > 128)
    return many or itemsize == 4 or ragged or family == "amd"


def _of_newer(target: Target, tables: dict[str, dict[str, _Table]], which: str) -> tuple[bool, dict[str, _Table]]:
    """For `_first`: those of `tables` that Triton's version asks for."""
    return target.has_newer_triton, tables.get(which, {})


def _first(family: str, head_dim: int, *tables: tuple[bool, dict[str, _Table]]) -> AttentionConfig:
    """From the first table that applies and has this architecture and width."""
    width = _width(head_dim)
    found = (table[family][width] for applies, table in tables if applies and width in table.get(family, {}))
    return AttentionConfig(*next(found))


def _from_heavy_table(table: _Table, limited: _Widths, family: str, head_dim: int) -> AttentionConfig:
    width = _width(head_dim)
    config = AttentionConfig(*table[width])
    return replace(config, max_registers=255) if width in limited.get(family, ()) else config


@cache
def attention_forward_config(
    target: Target, head_dim: int, itemsize: int, scores: Scores = "plain", blocks: bool = False, ragged: bool = False,
    packed: bool = False,
) -> AttentionConfig:  # fmt: skip
    """head_dim: the larger of Dq and Dv; itemsize: bytes per element; blocks: there is a block mask; ragged: 16 does not
    divide a head, so that it is read element by element; packed: sequences lie one after the other."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    family = target.family
    heavy = _needs_small_tiles(scores, blocks, head_dim, itemsize, ragged, family)
    if itemsize == 4 and head_dim > 128:
        most = 255 if not blocks or family == "sm_80" else None
        return AttentionConfig(16, 16, 4 if blocks else 8, 1, max_registers=most)
    if itemsize == 4:
        block_n = 16 if heavy or head_dim > 64 else 32
        # left alone, ptxas stops at 64 registers of causal heads of 16 and spills 8 bytes
        # ... and of packed ones wider than 64 on sm_80, unless addresses stay in the loop
        hoist = heavy or not packed or head_dim <= 64
        return AttentionConfig(32, block_n, 8, 1, hoist, max_registers=255 if heavy or head_dim <= 16 else None)
    if not heavy:
        exceptions = (
            (blocks, _FORWARD_LISTED),
            (scores == "dropped", _FORWARD_DROPPED),
            (packed and scores == "alibi", _FORWARD_ALIBI_PACKED),
            (packed, _FORWARD_PACKED),
            (scores == "alibi", _FORWARD_ALIBI),
            (scores == "capped", _FORWARD_CAPPED),
            (scores == "loaded", _FORWARD_LOADED),
        )
        return _first(family, head_dim, *exceptions, (True, _FORWARD))
    if ragged and head_dim <= 128:
        return _FORWARD_RAGGED
    if blocks and family != "amd":
        return AttentionConfig(*_FORWARD_BLOCKS[_width(head_dim)])
    tables = {"sm_80": _FORWARD_HEAVY_SM_80, "sm_100": _FORWARD_HEAVY_SM_100, "small": _FORWARD_HEAVY_SMALL}
    return _from_heavy_table(tables.get(family, _FORWARD_HEAVY), _FORWARD_LIMITED, family, head_dim)


@cache
def attention_backward_query_config(
    target: Target, head_dim: int, itemsize: int, scores: Scores = "plain", blocks: bool = False, ragged: bool = False
) -> AttentionConfig:  # fmt: skip
    """For dQ: block_m query rows stay in registers, block_n key columns pass by."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1, chunk=_CHUNK)
    family = target.family
    heavy = _needs_small_tiles(scores, blocks, head_dim, itemsize, ragged, family)
    if itemsize == 4 and head_dim > 128:
        # addresses in the loop spill 8 to 40 bytes with Triton 3.9.0
        hoist = target.backend == "cuda" and target.has_newer_triton
        return AttentionConfig(16, 16, 4 if target.backend == "hip" else 8, 1, hoist, _CHUNK, max_registers=255)
    if itemsize == 4:
        block_m, block_n = (32, 16 if heavy else 32) if head_dim <= 64 else (16, 16)
        # of 255 registers a block mask with everything spills 8 bytes on sm_100, of 192 none
        most = 192 if blocks and family == "sm_100" and head_dim <= 64 else 255
        return AttentionConfig(block_m, block_n, 8, 1, max_registers=most if heavy else None)
    if not heavy:
        exceptions = (
            _of_newer(target, _BACKWARD_QUERY_NEWER, "blocks" if blocks else scores),
            (blocks, _BACKWARD_QUERY_LISTED),
            (scores == "dropped", _BACKWARD_QUERY_DROPPED),
            (scores == "alibi", _BACKWARD_QUERY_ALIBI),
            (scores == "capped", _BACKWARD_QUERY_CAPPED),
            (scores == "loaded", _BACKWARD_QUERY_LOADED),
            _of_newer(target, _BACKWARD_QUERY_NEWER, "rest"),
        )
        return _first(family, head_dim, *exceptions, (True, _BACKWARD_QUERY))
    if ragged and head_dim <= 128 and family != "amd":
        return _BACKWARD_QUERY_RAGGED
    if blocks and family != "amd":
        return AttentionConfig(*_BACKWARD_QUERY_BLOCKS[_width(head_dim)])
    table = _BACKWARD_HEAVY_AMD if family == "amd" else _BACKWARD_QUERY_HEAVY[family]
    return AttentionConfig(*table[_width(head_dim)])


@cache
def attention_backward_key_config(
    target: Target,
    head_dim: int,
    itemsize: int,
    scores: Scores = "plain",
    packed: bool = False,
    blocks: bool = False,
    ragged: bool = False,
    grouped: bool = False,
) -> AttentionConfig:
    """For dK and dV: block_n key columns stay in registers, block_m query rows pass by. grouped: several query heads share a key
    head."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1, chunk=_CHUNK)
    family = target.family
    heavy = _needs_small_tiles(scores, blocks, head_dim, itemsize, ragged, family) or (scores == "loaded" and grouped)
    if itemsize == 4 and head_dim > 128:
        block_n, warps = (16, 4) if target.backend == "hip" else (16 if heavy else 32, 8)
        return AttentionConfig(16, block_n, warps, 1, not heavy, _CHUNK, max_registers=255)
    if itemsize == 4 and heavy:
        # with everything on, 32 keys of grouped heads wider than 64 spill 8 to 24 bytes, 16 keys none for an eighth more instructions;
        # ragged ones (D72) 16 to 48 on all but sm_80, unless addresses stay in the loop
        few = grouped and not packed and head_dim > 64 and target.backend == "cuda"
        hoist = not (ragged and family in ("sm_90", "sm_100", "small") and head_dim > 64)
        return AttentionConfig(16, 16 if few else 32, 4 if target.backend == "hip" else 8, 1, hoist, max_registers=255)
    if itemsize == 4:
        # left alone, ptxas spills 16 bytes of a causal D64 on sm_120
        most = 255 if family == "small" and 32 < head_dim <= 64 else None
        return AttentionConfig(32 if head_dim <= 64 else 16, 32, 4 if head_dim <= 32 else 8, 1, max_registers=most)
    if not heavy:
        exceptions = (
            (scores == "alibi" and (grouped or packed), _BACKWARD_KEY_ALIBI_GROUPED),
            (scores == "capped" and (grouped or packed), _BACKWARD_KEY_CAPPED_GROUPED),
            _of_newer(target, _BACKWARD_KEY_NEWER, "blocks" if blocks else scores),
            (blocks, _BACKWARD_KEY_LISTED),
            (blocks, _BACKWARD_KEY),
            (scores == "dropped", _BACKWARD_KEY_DROPPED),
            (scores == "alibi", _BACKWARD_KEY_ALIBI),
            (scores == "capped", _BACKWARD_KEY_CAPPED),
            (scores == "loaded", _BACKWARD_KEY_LOADED),
            (packed, _BACKWARD_KEY_PACKED),
            (grouped or packed, _BACKWARD_KEY_GROUPED),
            (ragged, _BACKWARD_KEY_RAGGED_PLAIN),
            _of_newer(target, _BACKWARD_KEY_NEWER, "rest"),
        )
        return _first(family, head_dim, *exceptions, (True, _BACKWARD_KEY))
    if ragged and head_dim <= 128 and family != "amd":
        return _BACKWARD_KEY_RAGGED
    tables = {"amd": _BACKWARD_HEAVY_AMD, "sm_80": _BACKWARD_KEY_HEAVY_SM_80, "sm_90": _BACKWARD_KEY_HEAVY_SM_90}
    return _from_heavy_table(tables.get(family, _BACKWARD_KEY_HEAVY), _BACKWARD_KEY_LIMITED, family, head_dim)


def attention_backward_bias_config(
    target: Target, head_dim: int, itemsize: int, ragged: bool = False, dropped: bool = False
) -> AttentionConfig:
    """For dBias: a tile of the bias stays in registers, and Q, dO, K and V are read whole for each of its terms. dropped: there is
    dropout."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    block = 32 if (head_dim <= 128 and itemsize == 2) or head_dim <= 64 else 16
    # with dropout, 4 warps of fp32 heads wider than 64 spill 8 bytes
    spills = (ragged and block == 32) if itemsize == 2 else (dropped and block == 16)
    warps = 8 if spills and target.backend == "cuda" else 4
    if target.backend == "hip" and block == 16 and head_dim > 128:
        warps = 2  # 4 spill 20 bytes with everything on
    # left alone, ptxas spills 8 bytes of these
    narrow = (itemsize == 4 and head_dim <= 32) or (dropped and 32 < head_dim <= 64)
    return AttentionConfig(block, block, warps, 1, max_registers=255 if narrow else None)


# Decoding reads the cache once, whatever the tile: the fewest rows that a dot takes, keys enough to keep loads in flight.
_DECODE: _Table = {64: (16, 128, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)}
MAX_SPLITS = 128
MERGE_SPLITS = 16  # partial results that one step of the merge reads


@cache
def decode_config(target: Target, head_dim: int, itemsize: int, rows: int, plain: bool = True) -> AttentionConfig:
    """rows: the query rows that share a key head, of all heads and new tokens together; plain: there is no softcap."""
    if target.backend == "interpreter":
        return AttentionConfig(16, 32, 4, 1)
    if itemsize == 4:
        # left alone, ptxas spills 8 bytes of paged heads of 80 with everything on sm_90, and 8 to 24 of 256 on all but sm_80; with no
        # limit but the hardware's, fewer warps would be resident, and this kernel waits for memory
        limits = {("sm_90", 128): 80, ("sm_90", 256): 255, ("sm_100", 256): 255, ("small", 256): 255}
        most = limits.get((target.family, _width(head_dim)))
        return AttentionConfig(16, 32 if head_dim <= 64 else 16, 8, 1, max_registers=None if plain else most)
    config = AttentionConfig(*_DECODE[_width(head_dim)])
    block_m = min(64 if head_dim <= 128 else 16, max(16, power_of_2(rows)))
    stages = 1 if target.backend == "hip" else config.num_stages
    block_n = config.block_n if block_m == 16 else config.block_n // 2
    return replace(config, block_m=block_m, block_n=block_n, num_stages=stages)


@lru_cache(maxsize=4096)
def decode_splits(target: Target, programs: int, key_blocks: int) -> int:
    """Into how many parts the keys are divided, so that a few long sequences still occupy the whole device.

    Args:
        programs: those that there are without splitting.
        key_blocks: blocks of keys in the longest sequence that the cache can hold (its true length is known to the
            device alone).

    One part where the programs fill four fifths of the processors. Else the fewest parts that keep the processors at
    least 85 % as busy as the best number of parts would: each more costs a partial result to write and to merge.
    """
    if programs == 0 or programs >= 0.8 * target.processors:
        return 1

    def occupancy(splits: int) -> float:
        rounds = programs * splits / target.processors
        return rounds / math.ceil(rounds)

    candidates = range(1, max(1, min(MAX_SPLITS, target.processors, key_blocks)) + 1)
    best = max(map(occupancy, candidates))
    return next(splits for splits in candidates if occupancy(splits) >= 0.85 * best)
