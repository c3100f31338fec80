"""Attention, normalisation, feed-forward and loss kernels in Triton for PyTorch.

The same call runs Triton kernels on a GPU and PyTorch on a CPU, with gradients and with the same meaning.
"""

from fastattn import backend, models, nn
from fastattn.backend import explain
from fastattn.block_mask import BlockMask
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.attention_maps import attention_column_sums, attention_weights
from fastattn.ops.decode import attention_with_kv_cache
from fastattn.ops.feed_forward import feed_forward, linear
from fastattn.ops.linear_loss import linear_cross_entropy
from fastattn.ops.loss import cross_entropy
from fastattn.ops.normalization import layer_norm, rms_norm
from fastattn.ops.rotary import rotary
from fastattn.ops.varlen import varlen_attention
from fastattn.patching import patch, unpatch
from fastattn.rotary_frequencies import rotary_frequencies, rotary_tables

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "attention",
    "attention_column_sums",
    "attention_weights",
    "attention_with_kv_cache",
    "backend",
    "cross_entropy",
    "explain",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "models",
    "nn",
    "patch",
    "rms_norm",
    "rotary",
    "rotary_frequencies",
    "rotary_tables",
    "scaled_dot_product_attention",
    "unpatch",
    "varlen_attention",
]
