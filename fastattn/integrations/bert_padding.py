"""Padded batches to packed sequences and back, with the names of `flash_attn.bert_padding`; in plain PyTorch, on any device.

    from fastattn.integrations.bert_padding import pad_input, unpad_input     # instead of: from flash_attn.bert_padding import ...

Interface: https://github.com/Dao-AILab/flash-attention (flash_attn/bert_padding.py of flash-attn 2.7 and later).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.checks import check_integer, check_rank, check_shape


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one sequence after the other. On a GPU the host waits for their number.

    Args:
        hidden_states: (B, N, ...), any dtype.
        attention_mask: (B, N), bool or integers, 1 where there is a token.
        unused_mask: (B, N), 1 where a place is kept in the sequence for a token that is not there yet; None: nowhere.

    Returns:
        tokens (T, ...), where T counts the ones of both masks; their places in the flattened batch, int64 (T,);
        cu_seqlens, int32 (B + 1,); the longest sequence; the tokens of each sequence without unused ones, int32 (B,).

    Raises:
        ValueError: a mask is not (B, N).

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> tokens, places, cu_seqlens, longest, _ = unpad_input(torch.randn(2, 3, 16), mask)
        >>> tokens.shape, cu_seqlens.tolist(), longest
        (torch.Size([3, 16]), [0, 2, 3], 2)
    """
    shape = tuple(hidden_states.shape[:2])
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None:
            check_rank(name, mask, 2, "(batch, length)")
            check_shape(name, mask, shape, "batch and length of hidden_states")
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths = kept.sum(1, dtype=torch.int32)
    places = kept.flatten().nonzero()[:, 0]
    ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    return hidden_states.flatten(0, 1)[places], places, ends, longest, used.sum(1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """What `unpad_input` undoes: (batch, seqlen, ...) with the tokens (T, ...) at these places (T,), and 0 elsewhere.

    Raises:
        ValueError: there is not one place for each token.

    Example:
        >>> pad_input(torch.ones(3, 16), torch.tensor([0, 1, 3]), 2, 3)[:, :, 0]
        tensor([[1., 1., 0.],
                [1., 0., 0.]])
    """
    batch, seqlen = check_integer("batch", batch), check_integer("seqlen", seqlen)
    check_shape("indices", indices, (len(hidden_states),), "one place for each token")
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
