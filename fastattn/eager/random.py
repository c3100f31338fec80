"""Philox-4x32-7 in PyTorch: the numbers of `fastattn/kernels/random.py`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dropout import dropout_threshold

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 7


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter.

    Args:
        seed: int64 tensor of one element; its low and high words are the key.
        counters: four int64 tensors with values in [0, 2³²) that broadcast against each other.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2³²).
    """
    c0, c1, c2, c3 = counters  # what depends on rows or columns alone stays small for two rounds
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2⁶⁴, which keeps their bits; the arithmetic shift's sign bits are masked off
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def keep(seed: Tensor, batch: Tensor, head: Tensor, rows: Tensor, columns: range, p: float) -> Tensor:
    """Dropout's choice of attention weights: True = keep, with probability 1 - p. See `fastattn.kernels.random.keep_tile`.

    Args:
        seed: int64 (1,).
        batch, head, rows: int64 tensors that broadcast against each other with a last dimension of 1.
        columns: the columns wanted, a step of 1.

    Returns:
        bool, of the broadcast shape with the last dimension len(columns).
    """
    blocks = torch.arange(columns.start // 32, (columns.stop + 31) // 32, device=seed.device)
    column = (blocks[:, None] * 8 + torch.arange(8, device=seed.device)).flatten()
    w0, w1, w2, w3 = philox(seed, (column, rows // 16 * 8 + rows % 8, head, batch))
    upper = rows // 8 % 2 == 0
    words, threshold = (torch.where(upper, w0, w2), torch.where(upper, w1, w3)), dropout_threshold(p)
    parts = [half.unflatten(-1, (-1, 8)) >= threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = torch.stack(parts, dim=-2).flatten(-3)  # [..., blocks, 4 parts, 8]
    return kept[..., columns.start % 32 :][..., : len(columns)]


def keep_of_rows(seed: Tensor, rows: Tensor, columns: int, p: float) -> Tensor:
    """The same for a tensor of rows, (rows, columns): see `fastattn.kernels.random.keep_of_rows`. rows: int64 (rows, 1)."""
    zero, groups = seed.new_zeros(()), torch.arange((columns + 3) // 4, device=seed.device)
    words = torch.stack(philox(seed, (groups, rows, zero, zero)), dim=-1).flatten(-2)[..., :columns]
    return words >= dropout_threshold(p) << 16


def drop(tensor: Tensor, seed: Tensor | None, dropout_p: float, rows: range, columns: int) -> Tensor:
    """tensor · keep / (1 - p) in fp32, of (rows, columns), with the choice of element (row, column) of the whole."""
    if seed is None:
        return tensor.float()
    kept = keep_of_rows(seed, torch.arange(rows.start, rows.stop, device=seed.device)[:, None], columns, dropout_p)
    return torch.where(kept, tensor.float() / (1.0 - dropout_p), 0.0)
