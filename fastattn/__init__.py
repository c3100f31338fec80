"""Attention, normalisation, feed-forward and loss kernels in Triton for PyTorch.

The same call runs Triton kernels on a GPU and PyTorch on a CPU, with gradients and with the same meaning.
"""

from fastattn import backend, models, nn
from fastattn.backend import explain
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.decode import attention_with_kv_cache
from fastattn.ops.feed_forward import feed_forward, linear
from fastattn.ops.loss import linear_cross_entropy
from fastattn.ops.normalization import layer_norm, rms_norm
from fastattn.ops.varlen import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_with_kv_cache",
    "backend",
    "explain",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "models",
    "nn",
    "rms_norm",
    "scaled_dot_product_attention",
    "varlen_attention",
]
