"""What the attention launchers derive from their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import Blocks
from fastattn.kernels.attention_config import Scores
from fastattn.kernels.mask_blocks import is_listed
from fastattn.score_rules import ScoreRules

LOOSE_CAP = 5e5  # off by 0.1, and x - c·tanh(x / c) reaches that at x = 4000 only


def head_block(head_dim: int) -> int:
    """The power of two that holds a head: a dot needs at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def is_ragged(head_dim: int, value_dim: int) -> bool:
    """Whether 16 does not divide a head: rows of contiguous tensors are then read element by element."""
    return head_dim % 16 != 0 or value_dim % 16 != 0


def strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The strides that a kernel needs of (B, H, N, D): the last is 1. Of (B, H): both."""
    if tensor is None:
        return None
    return tensor.stride()[:3]


def pair_strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Strides of a tensor that broadcasts, such as a mask over (B, Hq, Nq, Nk): 0 where it has size 1."""
    if tensor is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))


def split_mask(mask: Tensor | Blocks | None) -> tuple[Tensor | None, Blocks | None]:
    """(mask, blocks): which of the two it is."""
    return (None, mask) if isinstance(mask, Blocks) else (mask, None)


def launch_lists(blocks: Blocks | None, by_column: bool = False) -> tuple[Any, ...] | None:
    """What `kernels.masks.block_list` reads: (tiles, lists, counts, stride of a batch, of a head, blocks in a row)."""
    if blocks is None:
        return None
    lists, counts = (blocks.columns, blocks.column_counts) if by_column else (blocks.rows, blocks.row_counts)
    batch, heads, rows, others, _ = lists.shape
    return blocks.tiles, lists, counts, 0 if batch == 1 else heads * rows, 0 if heads == 1 else rows, others


def block_kinds(blocks: Blocks | None) -> tuple[Any, ...] | None:
    """What `kernels.masks.block_kind` reads."""
    if blocks is None:
        return None
    batch, heads, rows, others = blocks.kinds.shape
    return blocks.tiles, blocks.kinds, None, 0 if batch == 1 else heads * rows, 0 if heads == 1 else rows, others


def without_loose_cap(rules: ScoreRules, dtype: torch.dtype) -> ScoreRules:
    """The rules without a softcap c that changes scores less than the short formula of 16-bit kernels does, which is off by 2⁻²² c."""
    loose = rules.softcap > LOOSE_CAP and dtype != torch.float32
    return rules._replace(softcap=0.0) if loose else rules


def _is_aligned(pair: Tensor) -> bool:
    """Whether every row of a mask or bias starts at a multiple of 16 numbers, so that it is read in wide words."""
    *rows, columns = pair_strides(pair) or ()
    return columns <= 1 and all(stride % 16 == 0 for stride in rows) and pair.data_ptr() % 16 == 0


def score_class(rules: ScoreRules) -> tuple[bool, Scores]:
    """(plain, scores): whether a score is just q·k times a positive scale, perhaps with ALiBi, and the class of scores that chooses the
    tiles."""
    mask, bias = rules.mask, rules.bias
    capped = rules.softcap != 0.0 or rules.scale <= 1e-20  # plain scores divide by the scale: log-sum-exps and slopes
    computed = capped or rules.alibi_slopes is not None
    listed = mask is not None and is_listed(mask)
    read = ([] if listed or not isinstance(mask, Tensor) else [mask]) + ([] if bias is None else [bias])
    scores: Scores = "capped" if capped else "alibi" if computed else "plain"
    if len(read) + computed + listed + (rules.seed is not None) > 1:
        scores = "heavy"
    elif rules.seed is not None:
        scores = "dropped"
    elif read:
        scores = "loaded" if rules.window_left is None and _is_aligned(read[0]) else "heavy"
    return bias is None and not capped, scores
