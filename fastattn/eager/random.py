"""Philox-4x32-10 in PyTorch: the numbers of `fastattn/kernels/random.py`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter.

    Args:
        seed: int64 tensor of one element; its low and high words are the key.
        counters: four int64 tensors with values in [0, 2³²) that broadcast against each other.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2³²).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps their bits; the arithmetic shift's sign bits are masked off
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def keep(seed: Tensor, batch: Tensor, head: Tensor, rows: Tensor, columns: range, p: float) -> Tensor:
    """Dropout's choice: True = keep, with probability 1 - p. See `fastattn.kernels.random.keep`.

    Args:
        seed: int64 (1,).
        batch, head, rows: int64 tensors that broadcast against each other with a last dimension of 1.
        columns: the columns wanted, a step of 1.

    Returns:
        bool, of the broadcast shape with the last dimension len(columns).
    """
    first = columns.start // 4
    groups = torch.arange(first, (columns.stop + 3) // 4, device=seed.device)
    words = torch.stack(philox(seed, (groups, rows, head, batch)), dim=-1).flatten(-2)
    words = words[..., columns.start - 4 * first :][..., : len(columns)]
    return (words >> 1) >= round(p * 2**31)


def drop(tensor: Tensor, seed: Tensor | None, dropout_p: float, rows: range, columns: int) -> Tensor:
    """tensor · keep / (1 - p) in fp32, of (rows, columns), with the choice of element (row, column) of the whole."""
    if seed is None:
        return tensor.float()
    zero, row = seed.new_zeros(()), torch.arange(rows.start, rows.stop, device=seed.device)[:, None]
    kept = keep(seed, zero, zero, row, range(columns), dropout_p)
    return torch.where(kept, tensor.float() / (1.0 - dropout_p), 0.0)
