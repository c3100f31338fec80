"""A block of attention's query rows: the keys that they see, and what is added to their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.block_mask import BLOCK, Blocks
from fastattn.eager.random import keep
from fastattn.score_rules import ScoreRules

# of a dtype: the integers of its size, and how far left of -1 the bits of -inf begin
_MINUS_INFINITY = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7), torch.float16: (torch.int16, 10)}


@dataclass(frozen=True)
class RowBlock:
    """Some query rows, the key columns that they see, and what decides their scores."""

    rules: ScoreRules  # of these rows: mask and bias cut to size
    rows: range
    columns: range
    shift: int  # Nk - Nq: row i stands at column i + shift
    num_keys: int
    first_batch: int = 0  # batch index of the first sample, for dropout's choice
    mirrored: bool = False  # keys and values are given last first
    is_causal: bool = False  # PyTorch's own is_causal hides what lies right of the window
    floor: float = -math.inf  # ALiBi below it hides a key, whose weight would be lost in rounding
    concrete: bool = False  # not inside a transform
    hulls: tuple[range, ...] = ()  # the columns outside of which each 128 rows see nothing, where the mask tells

    def columns_for(self, rows: range) -> range:
        """The columns outside of which these rows see nothing; never empty."""
        low, high = self.columns.start, self.columns.stop
        if self.rules.window_left is not None:
            low = min(max(rows.start + self.shift - self.rules.window_left, low), high - 1)
        if self.rules.window_right is not None:
            high = max(min(rows.stop + self.shift + self.rules.window_right, high), low + 1)
        if self.hulls:
            seen = self.hulls[rows.start // BLOCK : -(-rows.stop // BLOCK)]
            low = min(max(min(hull.start for hull in seen), low), high - 1)
            high = max(min(max(hull.stop for hull in seen), high), low + 1)
        return range(low, high)

    def narrow(self, rows: range) -> RowBlock:
        """The block of these rows: fewer columns where window or mask allow, mask and bias cut to size."""
        columns = self.columns_for(rows)
        mask, bias = (cut(pair, rows, columns) for pair in (self.rules.mask, self.rules.bias))
        return replace(self, rules=self.rules._replace(mask=mask, bias=bias), rows=rows, columns=columns)

    def strips(self, size: int) -> Iterator[range]:
        return (range(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size))

    def split(self, size: int) -> Iterator[RowBlock]:
        return map(self.narrow, self.strips(size))

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, 1) and (columns,): where rows and columns stand."""
        i = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None] + self.shift
        return i, torch.arange(self.columns.start, self.columns.stop, device=device)

    @property
    def right_to_hide(self) -> int | None:
        """The window's right side, where an additive mask has to hide what is behind it."""
        return None if self.is_causal else self.rules.window_right

    def hidden(self, device: torch.device) -> Tensor | None:
        """bool, broadcastable to (B, Hq, rows, columns): True = invisible. None where all is visible."""
        hidden = None
        first, last = self.rows.start + self.shift, self.rows.stop - 1 + self.shift
        right = self.right_to_hide
        if right is not None and self.columns.stop - 1 > first + right:
            i, j = self.positions(device)
            hidden = j > i + right
        if self.rules.window_left is not None and self.columns.start < last - self.rules.window_left:
            i, j = self.positions(device)
            before = j < i - self.rules.window_left
            hidden = before if hidden is None else hidden | before
        if self.rules.mask is not None:
            assert isinstance(self.rules.mask, Tensor)  # `narrow` has cut it
            hidden = ~self.rules.mask if hidden is None else hidden | ~self.rules.mask
        return hidden

    def additive(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Broadcastable to (B, Hq, rows, columns): bias and ALiBi, -inf where invisible. None = nothing to add.

        fp32, or the bias's dtype where there is no ALiBi: those are its very numbers, to be added in fp32. A mask alone, which
        is 0 and -inf, may come in `dtype`.
        """
        total = self.rules.bias
        if self.rules.alibi_slopes is not None:
            i, j = self.positions(device)
            alibi = -self.rules.alibi_slopes[..., None, None] * (i - j).abs()
            total = alibi if total is None else total + alibi
        if total is not None and self.concrete:
            return self._hiding(total)
        hidden = self.hidden(device)
        if hidden is None:
            return total
        if self.concrete:  # a tenth of the time of filling
            integer, shift = _MINUS_INFINITY[dtype]
            return hidden.view(torch.int8).neg().to(integer).bitwise_left_shift_(shift).view(dtype)
        total = hidden.new_zeros((), dtype=torch.float32) if total is None else total
        return torch.where(hidden, float("-inf"), total)

    def _hiding(self, total: Tensor) -> Tensor:
        """`total` with -inf where invisible. Only the columns that a side of the window crosses are looked at for it."""
        rows, columns, mask, right = len(self.rows), len(self.columns), self.rules.mask, self.right_to_hide
        first, last = (row + self.shift - self.columns.start for row in (self.rows.start, self.rows.stop - 1))
        start = columns if right is None else max(first + right + 1, 0)
        stop = 0 if self.rules.window_left is None else min(last - self.rules.window_left, columns)
        if start >= columns and stop <= 0 and mask is None:
            return total
        assert not isinstance(mask, Blocks)  # `narrow` has cut it
        shape = torch.broadcast_shapes(total.shape, (1,) if mask is None else mask.shape, (rows, columns))
        out = total.expand(shape).clone(memory_format=torch.contiguous_format)
        if mask is not None:
            out.masked_fill_(~mask, -math.inf)
        if start < columns:
            crossed, diagonal = out[..., start:], first + (right or 0) - start
            crossed.tril_(diagonal).add_(crossed.new_full(crossed.shape[-2:], -math.inf).triu_(diagonal + 1))
        if stop > 0:
            crossed, diagonal = out[..., :stop], first - (self.rules.window_left or 0)
            crossed.triu_(diagonal).add_(crossed.new_full(crossed.shape[-2:], -math.inf).tril_(diagonal - 1))
        return out

    def by_distance(self, device: torch.device) -> Tensor | None:
        """`additive` of a mirrored block, (B or 1, Hq or 1, rows, columns), without a mask or bias; None = nothing to add.

        It depends on i - j alone. Where the columns run backwards, that is the sum of the indices (a, b) of row and column
        in the block and a constant, so the whole matrix is one vector of rows + columns numbers, read with stride 1 both
        ways. (PyTorch knows no negative strides.)
        """
        rows, columns = len(self.rows), len(self.columns)
        first, last = self.rows.start + self.shift, self.rows.stop - 1 + self.shift
        left, right = self.rules.window_left, self.rules.window_right
        cut_left = left is not None and self.columns.start < last - left
        cut_right = right is not None and self.columns.stop - 1 > first + right
        if self.rules.alibi_slopes is None and not cut_left and not cut_right:
            return None
        distance = torch.arange(rows + columns - 1, device=device) + (first - self.columns.stop + 1)
        if self.rules.alibi_slopes is None:
            vector = torch.zeros(1, 1, len(distance), dtype=torch.float32, device=device)
        else:
            vector = -self.rules.alibi_slopes[..., None] * distance.abs()
            vector.masked_fill_(vector < self.floor, float("-inf"))
        if left is not None:
            vector.masked_fill_(distance > left, float("-inf"))
        if right is not None:
            vector.masked_fill_(distance < -right, float("-inf"))
        return vector.as_strided((*vector.shape[:2], rows, columns), (*vector.stride()[:2], 1, 1))

    def dropout_factors(self, like: Tensor) -> Tensor | None:
        """fp32, the shape of `like` (B, Hq, rows, columns): 0 or 1 / (1 - p). None without dropout."""
        if self.rules.seed is None:
            return None
        b = torch.arange(like.shape[0], device=like.device)[:, None, None, None] + self.first_batch
        h = torch.arange(like.shape[1], device=like.device)[:, None, None]
        i = torch.arange(self.rows.start, self.rows.stop, device=like.device)[:, None]
        return keep(self.rules.seed, b, h, i, self.columns, self.rules.dropout_p).float() / (1.0 - self.rules.dropout_p)

    @property
    def far(self) -> bool:
        """Whether many scores may lie so far below their row's largest that exp underflows."""
        return not (self.rules.mask is self.rules.bias is self.rules.alibi_slopes is None)

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The block's rows of (B, H, Nq, ...)."""
        return tensor if tensor.shape[2] == len(self.rows) else tensor[:, :, self.rows.start : self.rows.stop]

    def of_columns(self, tensor: Tensor) -> Tensor:
        """The block's columns of (B, H, Nk, ...)."""
        start, stop = self.columns.start, self.columns.stop
        if self.mirrored:
            start, stop = self.num_keys - stop, self.num_keys - start
        return tensor if tensor.shape[2] == stop - start else tensor[:, :, start:stop]


def cut(pair: Tensor | Blocks | None, rows: range, columns: range) -> Tensor | None:
    """The block of a mask or bias (B or 1, H or 1, Nq or 1, Nk or 1). None = nothing to mask or add."""
    if pair is None:
        return None
    if isinstance(pair, Blocks):
        return pair.dense(rows, columns)
    if pair.shape[2] != 1:
        pair = pair[:, :, rows.start : rows.stop]
    return pair if pair.shape[3] == 1 else pair[..., columns.start : columns.stop]


def whole_block(query: Tensor, key: Tensor, rules: ScoreRules, first_batch: int = 0) -> RowBlock:
    """All rows of a query (B, Hq, Nq, D) with all columns of a key (B, Hkv, Nk, D)."""
    n, nk = query.shape[2], key.shape[2]
    hulls = rules.mask.hulls() if isinstance(rules.mask, Blocks) else ()
    return RowBlock(rules, range(n), range(nk), nk - n, nk, first_batch, hulls=hulls)
