"""Rotary position embedding as a module that keeps its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.checks import check_integer
from fastattn.ops.rotary import rotary
from fastattn.rotary_frequencies import rotary_tables


class RotaryEmbedding(nn.Module):
    """`fastattn.rotary` with tables that the module makes: they move with it, stay fp32, and are not in its state_dict.

    Where `offset` is an int, the tables grow as needed, to the next power of two ("dynamic" scaling then follows that
    length). Positions given as tensors must lie below `max_length`, which is not checked on a GPU. Under `torch.compile` tables that
    are too small are made in each call: give a `max_length` that suffices.

    Args:
        rotary_dim: how many of each head's numbers are rotated: even.
        max_length: positions in the tables at first.
        base: see `fastattn.rotary_tables`.
        scaling: see `fastattn.rotary_tables`: {"rope_type": "yarn", "factor": 4.0, ...}.
        interleaved: which numbers are a pair, see `fastattn.rotary`.

    Example:
        >>> rotary = RotaryEmbedding(64)
        >>> q, k = rotary(torch.zeros(1, 8, 5, 64), torch.zeros(1, 2, 5, 64), offset=7)
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_length: int = 2048,
        *,
        base: float = 10_000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim, self.base, self.interleaved = rotary_dim, base, interleaved
        self.scaling = None if scaling is None else dict(scaling)
        self._make_tables(max_length, device)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Hq, N, D), (B, Hkv, N, D) or None → the same, rotated; the arguments of `fastattn.rotary`."""
        cos, sin = self.cos, self.sin
        if not isinstance(offset, Tensor):
            offset = check_integer("offset", offset)
            if positions is None and offset + query.shape[2] > cos.shape[0]:
                cos, sin = self._make_tables(1 << (offset + query.shape[2] - 1).bit_length(), cos.device)
        if cos.is_meta and not query.is_meta:  # built on meta, and its model's parameters were assigned since
            cos, sin = self._make_tables(cos.shape[0], query.device)
        return rotary(
            query, key, cos, sin, positions=positions, offset=offset, interleaved=self.interleaved, inplace=inplace
        )

    def _make_tables(self, length: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # they outlive the mode, and its tensors cannot be saved for a backward
            cos, sin = rotary_tables(self.rotary_dim, length, base=self.base, scaling=self.scaling, device=device)
        if not torch.compiler.is_compiling():  # in a graph they would be the mode's in spite of that
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        return cos, sin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """`.to(...)`, `.half()`, `.to_empty(...)`: only the device changes, and the numbers are always right."""
        try:
            device = fn(self.cos).device
        except NotImplementedError:  # a copy from meta, where there are no numbers and none are needed
            device = fn(torch.empty(0)).device
        self._make_tables(self.cos.shape[0], device)
        return self

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, base={self.base}, scaling={self.scaling}, interleaved={self.interleaved}"
