"""Layer norm and RMS norm as modules: torch's, with our op as the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.normalization import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with the same constructor, parameters and initialisation, over `fastattn.layer_norm`.

    Example:
        >>> LayerNorm(4)(torch.ones(2, 4))
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]], grad_fn=<FunctionBackward>)
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., *normalized_shape) → the same shape and dtype."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the same constructor, parameters and initialisation, over `fastattn.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) → the same shape and dtype."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
