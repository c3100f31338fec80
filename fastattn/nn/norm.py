"""Layer norm and RMS norm as modules: torch's, with our op as the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn.plain import is_unhooked
from fastattn.ops.normalization import checked_shape, layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with the same constructor, parameters and initialisation, over `fastattn.layer_norm`.

    Example:
        >>> LayerNorm(4)(torch.ones(2, 4)).detach()
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(checked_shape(normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., *normalized_shape) → the same shape and dtype."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with the same constructor, parameters and initialisation, over `fastattn.rms_norm`."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(checked_shape(normalized_shape), eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) → the same shape and dtype."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def add_norm(norm: nn.Module, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x), x) where x = residual + branch: one kernel where `norm` is a plain layer norm without hooks."""
    layer_norm_only = type(norm) in (LayerNorm, nn.LayerNorm) and is_unhooked(norm)
    if isinstance(norm, nn.LayerNorm) and layer_norm_only and residual.dtype == branch.dtype:
        return layer_norm(branch, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=residual)
    x = residual + branch
    return norm(x), x
