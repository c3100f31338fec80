"""What a model's tokens attend to, in memory that grows with the length of the text and not with its square."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.models.classifier import Classifier
from fastattn.models.gpt import GPT
from fastattn.models.layers import SelfAttention
from fastattn.models.pretrained import check_indices
from fastattn.nn.modes import evaluating
from fastattn.ops.attention_maps import attention_column_sums, attention_weights


class AttentionMaps(NamedTuple):
    """Summaries of the matrices of attention weights of one text.

    Attributes:
        received: fp32 (layers, heads, T), the mean attention that each token receives from those that see it.
        last: fp32 (layers, heads, T), the attention weights of the row that gives the answer: the last token of a GPT, the
            first of a Classifier with "cls" pooling. None for other classifiers, whose answer comes from all rows.
    """

    received: Tensor
    last: Tensor | None


@torch.no_grad()
def attention_maps(model: GPT | Classifier, tokens: Tensor) -> AttentionMaps:
    """The attention maps of one text, per layer and head.

    Args:
        model: in evaluation mode or not; dropout is left out.
        tokens: int64 (T,), T at most the model's context_length. With "cls" pooling the maps leave out the token in front.

    Raises:
        TypeError: tokens that are no int64 tensor.
        ValueError: tokens of another shape, none at all, too many, or (on the CPU) one outside [0, vocab_size).

    Example:
        >>> from fastattn.models import GPT, GPTConfig, attention_maps
        >>> model = GPT(GPTConfig(vocab_size=100, context_length=64, num_layers=2, num_heads=4, d_model=32))
        >>> attention_maps(model, torch.randint(100, (50,))).received.shape
        torch.Size([2, 4, 50])
    """
    check_indices("tokens", tokens, ("length",), vocab_size=model.config.vocab_size)
    if not len(tokens):
        raise ValueError("tokens must hold at least one token, got length 0")
    first = int(isinstance(model, Classifier) and model.config.pooling == "cls")
    row = len(tokens) - 1 if isinstance(model, GPT) else 0 if first else None
    received, last = [], []

    def observe(module: SelfAttention, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
        query, key, _ = module.heads(inputs[0], rotary=options.get("rotary"))
        rules = {"causal": options["causal"], "window": module.window}
        sums = attention_column_sums(query, key, **rules)[0]
        received.append(sums / _rows_that_see(query.shape[2], sums.device, **rules))
        if row is not None:
            last.append(attention_weights(query, key, rows=[row], **rules)[0, :, 0].float())

    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    hooks = [module.register_forward_pre_hook(observe, with_kwargs=True) for module in attentions]
    try:
        with evaluating(model):
            model.hidden(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    return AttentionMaps(torch.stack(received)[..., first:], torch.stack(last)[..., first:] if last else None)


def _rows_that_see(
    length: int, device: torch.device, causal: bool, window: tuple[int | None, int | None] | None
) -> Tensor:
    """(T,): how many rows see each column."""
    column = torch.arange(length, device=device)
    left, right = window or (None, None)
    end = torch.full_like(column, length) if left is None else (column + left + 1).clamp_max(length)
    right = 0 if causal else right
    start = torch.zeros_like(column) if right is None else (column - right).clamp_min(0)
    return end - start
