"""The transformer of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) as torch has it, over our kernels.

Each class is a subclass of torch's: the same constructor, parameters, initialisation, arguments and results. What differs:
`eval()` runs the same kernels as `train()` and calls the children as usual, where torch's layers switch to a C++ function that
does not; no input becomes a nested tensor, so padded positions hold ordinary numbers; a sample that is all padding gives
numbers, never NaN. Residual sums are part of the norms' kernels, activations part of the products'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import two_layers
from fastattn.nn.norm import LayerNorm, add_norm

Activation = str | Callable[[Tensor], Tensor]


def _adopt_children(layer: nn.Module) -> None:
    """Turn what torch's constructor has built into ours: parameters, their order and the generator's state stay."""
    for child in layer.children():
        if type(child) is nn.MultiheadAttention:
            child.__class__ = MultiheadAttention
            child._qkv_same_embed_dim = False
        elif type(child) is nn.LayerNorm:
            child.__class__ = LayerNorm


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and feed-forward: `torch.nn.TransformerEncoderLayer`, its arguments and its results.

    `norm_first`: x + f(norm(x)); otherwise norm(x + f(x)), for both parts f.

    Example:
        >>> layer = fastattn.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> layer(torch.randn(2, 10, 64), src_key_padding_mask=torch.zeros(2, 10, dtype=torch.bool)).shape
        torch.Size([2, 10, 64])
    """

    if not TYPE_CHECKING:  # for which the constructor is torch's

        @wraps(nn.TransformerEncoderLayer.__init__)
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            _adopt_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """One layer of the encoder.

        Args:
            src: (L, B, d_model), or (B, L, d_model) with `batch_first`, or (L, d_model) for one sequence.
            src_mask: (L, L) or (B · nhead, L, L): True = may not attend; or floating: added to the scores.
            src_key_padding_mask: (B, L), or (L,) for one sequence: True = ignore; or floating: added to the scores.
            is_causal: a hint that `src_mask`, which must be given, is the causal mask.

        Returns:
            the shape of `src`.
        """
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            y, x = add_norm(self.norm2, src, self._sa_block(self.norm1(src), *masks))
            return x + self._ff_block(y)
        x, _ = add_norm(self.norm1, src, self._sa_block(src, *masks))
        return add_norm(self.norm2, x, self._ff_block(x))[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(two_layers(x, self.linear1, self.linear2, self.activation, dropout=self.dropout))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, attention to the encoder, feed-forward: `torch.nn.TransformerDecoderLayer`.

    Example:
        >>> layer = fastattn.nn.TransformerDecoderLayer(64, 4)
        >>> layer(torch.randn(7, 2, 64), torch.randn(10, 2, 64)).shape
        torch.Size([7, 2, 64])
    """

    if not TYPE_CHECKING:  # for which the constructor is torch's

        @wraps(nn.TransformerDecoderLayer.__init__)
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            _adopt_children(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """One layer of the decoder.

        Args:
            tgt: (T, B, d_model), or (B, T, d_model) with `batch_first`, or (T, d_model) for one sequence.
            memory: the encoder's output, (S, B, d_model) and so on.
            tgt_mask, memory_mask: (T, T) and (T, S), or one per sample and head, (B · nhead, T, ·).
            tgt_key_padding_mask, memory_key_padding_mask: (B, T) and (B, S).
            tgt_is_causal, memory_is_causal: a hint that the mask, which must be given, is the causal one.

        Returns:
            the shape of `tgt`.
        """
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        other = memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            y, x = add_norm(self.norm2, tgt, self._sa_block(self.norm1(tgt), *own))
            y, x = add_norm(self.norm3, x, self._mha_block(y, memory, *other))
            return x + self._ff_block(y)
        x, _ = add_norm(self.norm1, tgt, self._sa_block(tgt, *own))
        x, _ = add_norm(self.norm2, x, self._mha_block(x, memory, *other))
        return add_norm(self.norm3, x, self._ff_block(x))[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(two_layers(x, self.linear1, self.linear2, self.activation, dropout=self.dropout))


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of copies of one encoder layer: `torch.nn.TransformerEncoder`.

    Nested tensors are never used: `enable_nested_tensor` and `mask_check` are accepted and change nothing.

    Example:
        >>> encoder = fastattn.nn.TransformerEncoder(fastattn.nn.TransformerEncoderLayer(64, 4), 2)
        >>> encoder(torch.randn(10, 2, 64)).shape
        torch.Size([10, 2, 64])
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor


class TransformerDecoder(nn.TransformerDecoder):
    """A stack of copies of one decoder layer: `torch.nn.TransformerDecoder`.

    Example:
        >>> decoder = fastattn.nn.TransformerDecoder(fastattn.nn.TransformerDecoderLayer(64, 4), 2)
        >>> decoder(torch.randn(7, 2, 64), torch.randn(10, 2, 64)).shape
        torch.Size([7, 2, 64])
    """


class Transformer(nn.Transformer):
    """Encoder and decoder: `torch.nn.Transformer`.

    Example:
        >>> model = fastattn.nn.Transformer(64, 4, num_encoder_layers=2, num_decoder_layers=2, batch_first=True)
        >>> model(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
        torch.Size([2, 7, 64])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias
        if custom_encoder is None:
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
            encoder_layer = TransformerEncoderLayer(*options, **factory)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm)
        if custom_decoder is None:
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
            decoder_layer = TransformerDecoderLayer(*options, **factory)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )
