"""Drop-in modules over the ops: the constructors, parameters and initialisation of torch's."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import FeedForward, GatedFeedForward
from fastattn.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "CrossEntropyLoss",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
