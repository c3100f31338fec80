"""Attention, normalisation, feed-forward and loss kernels in Triton for PyTorch.

The same call runs Triton kernels on a GPU and PyTorch on a CPU, with gradients and with the same meaning.
"""

from fastattn import backend
from fastattn.ops.attention import attention
from fastattn.ops.feed_forward import feed_forward, linear
from fastattn.ops.normalization import layer_norm, rms_norm

__version__ = "0.1.0"

__all__ = ["attention", "backend", "feed_forward", "layer_norm", "linear", "rms_norm"]
