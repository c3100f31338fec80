"""A mask by blocks of 128 × 128 pairs: empty ones are skipped, full ones need no mask, the others keep their bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.checks import check_integer
from fastattn.tracing import tracing

BLOCK = 128
EMPTY, FULL = -2, -1  # kinds of blocks; any other number is that of a mixed block's tile


class Blocks(NamedTuple):
    """A `BlockMask` as tensors, which is what ops and launchers take. R = ceil(Nq / 128), C = ceil(Nk / 128).

    tiles: bool (mixed blocks + 2, 128, 128): the bits of the mixed blocks; then none and all, which EMPTY and FULL index.
    kinds: int32 (B or 1, H or 1, R, C): EMPTY, FULL or a tile's number.
    rows: int32 (B or 1, H or 1, R, C, 2): per row of blocks (column, kind), the full blocks first, then the mixed.
    row_counts: int32 (B or 1, H or 1, R, 2): how many of them are full, and how many full or mixed.
    columns, column_counts: the same per column of blocks, (…, C, R, 2) and (…, C, 2).
    """

    tiles: Tensor
    kinds: Tensor
    rows: Tensor
    row_counts: Tensor
    columns: Tensor
    column_counts: Tensor

    def dense(self, rows: range, columns: range) -> Tensor | None:
        """bool (B or 1, H or 1, rows, columns); None where all of it is visible."""
        top, left = rows.start // BLOCK, columns.start // BLOCK
        kinds = self.kinds[:, :, top : -(-rows.stop // BLOCK), left : -(-columns.stop // BLOCK)]
        if bool((kinds == FULL).all()):
            return None
        bits = self.tiles[kinds.long()].transpose(3, 4).flatten(4, 5).flatten(2, 3)
        first_row, first_column = rows.start - top * BLOCK, columns.start - left * BLOCK
        return bits[:, :, first_row : first_row + len(rows), first_column : first_column + len(columns)]

    def hulls(self) -> tuple[range, ...]:
        """For each row of blocks: the shortest range of columns that holds all it sees, in whole blocks."""
        return hulls((self.kinds != EMPTY).flatten(0, 1).any(0), BLOCK)


def hulls(seen: Tensor, size: int) -> tuple[range, ...]:
    """For each row of `seen`, bool (rows, columns): the shortest range of columns that holds every True, times `size`.

    A row without one gives an empty range (start > stop), which never widens a union.
    """
    count = seen.shape[1]
    if count == 0:
        return ()
    from_left = torch.arange(1, count + 1, dtype=torch.int32, device=seen.device)
    first, last = (seen.int() * torch.stack([count + 1 - from_left, from_left])[:, None]).amax(2).tolist()
    return tuple(range((count - a) * size, b * size) for a, b in zip(first, last))


def _lists(kinds: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, row_counts) of `Blocks`."""
    full, mixed = kinds == FULL, kinds >= 0
    order = torch.where(full, 0, torch.where(mixed, 1, 2)).argsort(dim=3, stable=True)
    counts = torch.stack([full.sum(3), (full | mixed).sum(3)], -1)
    return torch.stack([order, kinds.long().gather(3, order)], -1).int(), counts.int()


def _cut_to_window(blocks: Blocks, num_queries: int, num_keys: int, left: int | None, right: int | None) -> Blocks:
    """These blocks cut to a window, by operations whose shapes do not depend on values (for graphs of a compiler).

    So every block that a side of the window may cross (two a side in each row of blocks) gets a tile, needed or not.
    """
    tiles, kinds = blocks.tiles, blocks.kinds
    if 0 in kinds.shape:
        return blocks
    batch, heads, grid_rows, grid_columns = kinds.shape
    shift, inside = num_keys - num_queries, torch.arange(BLOCK, device=kinds.device)
    starts = torch.arange(grid_rows, device=kinds.device) * BLOCK + shift  # of the rows, as columns
    columns = torch.arange(grid_columns, device=kinds.device) * BLOCK
    gap = columns - starts[:, None]  # column - row of the first pair of each block
    kept, crossed = torch.ones_like(gap, dtype=torch.bool), []
    if left is not None:
        kept = kept & (gap + BLOCK > -left)
        crossed += [(starts - left).div(BLOCK, rounding_mode="floor") + step for step in (0, 1)]
    if right is not None:
        kept = kept & (gap - BLOCK < right)
        crossed += [(starts + right).div(BLOCK, rounding_mode="floor") + step for step in (0, 1)]
    where = torch.stack(crossed, 1).clamp(0, grid_columns - 1)  # (R, 2 or 4)
    distance = (where * BLOCK - starts[:, None])[..., None, None] + inside - inside[:, None]  # (R, 2 or 4, 128, 128)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    where = where.expand(batch, heads, -1, -1)
    found = tiles[kinds.gather(3, where).long()] & visible
    first = tiles.shape[0] - 2
    numbers = torch.arange(first, first + where.numel(), device=kinds.device).view(where.shape)
    some, every = found.flatten(4).any(4), found.flatten(4).all(4)
    numbers = torch.where(every, FULL, torch.where(some, numbers, EMPTY)).int()
    kinds = torch.where(kept, kinds, EMPTY).scatter(3, where, numbers)
    tiles = torch.cat([tiles[:-2], found.flatten(0, 3), tiles[-2:]])
    return Blocks(tiles, kinds, *_lists(kinds), *_lists(kinds.transpose(2, 3)))


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which query sees which key, with lists of the blocks that need work: made once, for every layer and every step.

    `attention(..., mask=block_mask)` skips empty blocks in the forward and backward pass and masks in mixed blocks only, so
    that its cost is that of the pairs that are visible. Masks combine: `BlockMask.causal(n) & BlockMask.document(ids)`.
    It is made in strips of 128 rows: what it keeps grows with the number of mixed blocks.

    Attributes:
        shape: (B or 1, H or 1, Nq, Nk).
        blocks: what the kernels read.

    Example:
        >>> documents = torch.tensor([0] * 300 + [1] * 200)
        >>> mask = BlockMask.causal(500) & BlockMask.document(documents)
        >>> mask
        BlockMask(shape=(1, 1, 500, 500), 8 of 16 blocks empty, 7 mixed)
        >>> q = torch.randn(1, 8, 500, 64)
        >>> fastattn.attention(q, q, q, mask=mask).shape
        torch.Size([1, 8, 500, 64])
    """

    shape: tuple[int, int, int, int]
    blocks: Blocks
    _within: dict[tuple[int | None, int | None], BlockMask] = field(default_factory=dict)

    @classmethod
    def from_mask(cls, mask: Tensor) -> BlockMask:
        """The blocks of a bool mask (Nq, Nk), (H or 1, Nq, Nk) or (B or 1, H or 1, Nq, Nk); True = attend.

        A mask that broadcasts over the queries is expanded first: `from_mask(mask.expand(-1, -1, num_queries, -1))`.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {got}")
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"mask must have 2 to 4 dimensions (batch, heads, Nq, Nk), got shape {tuple(mask.shape)}")
        bits = mask[(None,) * (4 - mask.dim())]
        batch, heads, num_queries, num_keys = bits.shape
        return cls._build((batch, heads, num_queries, num_keys), bits.device, lambda rows: bits[:, :, rows])

    @classmethod
    def window(
        cls,
        num_queries: int,
        num_keys: int | None = None,
        left: int | None = None,
        right: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Row i sees i + Nk - Nq - left <= j <= i + Nk - Nq + right; None is unbounded. As `attention`'s `window`."""
        num_keys = num_queries if num_keys is None else num_keys
        num_queries, num_keys = check_integer("num_queries", num_queries), check_integer("num_keys", num_keys)
        left = None if left is None else check_integer("left", left)
        right = None if right is None else check_integer("right", right)
        columns = torch.arange(num_keys, device=device) + (num_queries - num_keys)

        def strip(rows: slice) -> Tensor:
            gap = columns - torch.arange(rows.start, rows.stop, device=device)[:, None]
            bits = torch.ones_like(gap, dtype=torch.bool)
            if left is not None:
                bits &= gap >= -left
            if right is not None:
                bits &= gap <= right
            return bits[None, None]

        return cls._build((1, 1, num_queries, num_keys), columns.device, strip)

    @classmethod
    def causal(
        cls, num_queries: int, num_keys: int | None = None, device: torch.device | str | None = None
    ) -> BlockMask:
        """Row i sees j <= i + Nk - Nq."""
        return cls.window(num_queries, num_keys, None, 0, device)

    @classmethod
    def document(cls, ids: Tensor, key_ids: Tensor | None = None) -> BlockMask:
        """Row i sees j where ids[i] == key_ids[j]: several documents in one sequence, each seeing itself alone.

        Args:
            ids: integers (Nq,) or (B, Nq).
            key_ids: (Nk,) or (B, Nk); None = ids.
        """
        key_ids = ids if key_ids is None else key_ids
        for name, tensor in (("ids", ids), ("key_ids", key_ids)):
            if not isinstance(tensor, Tensor) or tensor.is_floating_point():
                raise TypeError(f"{name} must be a tensor of integers, got {tensor!r}")
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{name} must have shape (length,) or (batch, length), got {tuple(tensor.shape)}")
        q, k = (x[None] if x.dim() == 1 else x for x in (ids, key_ids))
        if 1 not in (len(q), len(k)) and len(q) != len(k):
            raise ValueError(f"ids and key_ids must be of one batch, got {tuple(ids.shape)} and {tuple(key_ids.shape)}")
        batch = max(len(q), len(k)) if 0 not in (len(q), len(k)) else 0

        def strip(rows: slice) -> Tensor:
            return (q[:, rows, None] == k[:, None, :])[:, None]

        return cls._build((batch, 1, q.shape[1], k.shape[1]), ids.device, strip)

    @classmethod
    def _build(
        cls, shape: tuple[int, int, int, int], device: torch.device, strip: Callable[[slice], Tensor]
    ) -> BlockMask:
        """From `strip(rows)`, which gives bool (B or 1, H or 1, rows, Nk). What lies beyond the last pair is invisible."""
        with torch.inference_mode(False):  # so that training can save what inference has made
            return cls._built(shape, device, strip)

    @classmethod
    def _built(
        cls, shape: tuple[int, int, int, int], device: torch.device, strip: Callable[[slice], Tensor]
    ) -> BlockMask:
        batch, heads, num_queries, num_keys = shape
        columns = -(-num_keys // BLOCK)
        all_kinds, all_tiles, count = [], [], 0
        for start in range(0, num_queries, BLOCK):
            bits = strip(slice(start, min(start + BLOCK, num_queries)))
            padded = bits.new_zeros((batch, heads, BLOCK, columns * BLOCK))
            padded[:, :, : bits.shape[2], :num_keys] = bits
            tiles = padded.unflatten(3, (columns, BLOCK)).transpose(2, 3)  # (B, H, C, 128, 128)
            some, every = tiles.flatten(3).any(3), tiles.flatten(3).all(3)
            mixed = some & ~every
            found = tiles[mixed]
            numbers = torch.full(mixed.shape, EMPTY, dtype=torch.int32, device=device).masked_fill_(every, FULL)
            numbers[mixed] = torch.arange(count, count + len(found), dtype=torch.int32, device=device)
            count += len(found)
            all_kinds.append(numbers)
            all_tiles.append(found)
        ends = torch.zeros(2, BLOCK, BLOCK, dtype=torch.bool, device=device)
        ends[FULL] = True
        kinds = torch.zeros(batch, heads, 0, columns, dtype=torch.int32, device=device)
        if all_kinds:
            kinds = torch.stack(all_kinds, 2)
        tiles = torch.cat([*all_tiles, ends])
        return cls(shape, Blocks(tiles, kinds, *_lists(kinds), *_lists(kinds.transpose(2, 3))))

    def to_dense(self) -> Tensor:
        """The mask as bool (B or 1, H or 1, Nq, Nk)."""
        return self._strip(slice(0, self.shape[2]))

    def to(self, device: torch.device | str) -> BlockMask:
        """The same on another device."""
        with torch.inference_mode(False):
            return BlockMask(self.shape, Blocks(*(tensor.to(device) for tensor in self.blocks)))

    def within(self, left: int | None, right: int | None) -> BlockMask:
        """`self & BlockMask.window(Nq, Nk, left, right)`, made at the first call; while tracing at each."""
        if left is None and right is None:
            return self
        if (left, right) not in self._within:
            if tracing():
                return BlockMask(self.shape, _cut_to_window(self.blocks, *self.shape[2:], left, right))
            window = BlockMask.window(*self.shape[2:], left, right, self.blocks.kinds.device)
            self._within[left, right] = self & window
        return self._within[left, right]

    def _strip(self, rows: slice) -> Tensor:
        bits = self.blocks.dense(range(rows.start, rows.stop), range(self.shape[3]))
        if bits is None:
            size = (*self.shape[:2], rows.stop - rows.start, self.shape[3])
            return torch.ones(size, dtype=torch.bool, device=self.blocks.kinds.device)
        return bits

    def _combined(self, other: BlockMask, operation: Callable[[Tensor, Tensor], Tensor]) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        devices = self.blocks.kinds.device, other.blocks.kinds.device
        if devices[0] != devices[1]:
            raise ValueError(f"block masks must be on one device to be combined, got {devices[0]} and {devices[1]}")
        if self.shape[2:] != other.shape[2:]:
            raise ValueError(
                f"block masks must have the same Nq and Nk to be combined, got {self.shape} and {other.shape}"
            )
        if any(1 not in sizes and sizes[0] != sizes[1] for sizes in zip(self.shape[:2], other.shape[:2])):
            raise ValueError(
                f"block masks must have the same batch and heads, or 1, to be combined, got {self.shape} and {other.shape}"
            )
        batch, heads = torch.broadcast_shapes(self.shape[:2], other.shape[:2])
        return self._build(
            (batch, heads, *self.shape[2:]), devices[0], lambda rows: operation(self._strip(rows), other._strip(rows))
        )  # fmt: skip

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, torch.logical_and)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, torch.logical_or)

    def __repr__(self) -> str:
        kinds = self.blocks.kinds
        empty, mixed = int((kinds == EMPTY).sum()), int((kinds >= 0).sum())
        return f"BlockMask(shape={self.shape}, {empty} of {kinds.numel()} blocks empty, {mixed} mixed)"
