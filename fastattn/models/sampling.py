"""How the next token is drawn from a language model's logits."""

from __future__ import annotations

import torch
from torch import Tensor

# Probabilities are integers out of this: their sum is the same in any order. (A GPU refuses that of floats to be deterministic.)
_ONE = 2.0**40


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Draw one token from each row of logits, (B, vocab_size) → (B,), by inverting the cumulative distribution.

    With the tokens in descending order of probability, top-k and top-p both keep a prefix of the order; u is uniform in
    [0, probability of the prefix), and the token drawn is the first whose cumulative probability exceeds u. (Without
    either any order does.)
    """
    if temperature < torch.finfo(torch.float32).tiny:  # 0 in fp32, where subnormal numbers are
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
    order = None
    if top_k is not None:
        logits, order = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    elif top_p is not None:
        logits, order = logits.sort(dim=-1, descending=True)
    cumulative = logits.softmax(dim=-1).mul(_ONE).long().cumsum(dim=-1)
    last = torch.full_like(cumulative[:, :1], cumulative.shape[-1] - 1)
    if top_p is not None:
        enough = (cumulative[:, -1:].double() * top_p).ceil().long()
        last = torch.minimum(last, torch.searchsorted(cumulative, enough))
    u = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    u = (u.double() * cumulative.gather(1, last)).long()
    index = torch.minimum(last, torch.searchsorted(cumulative, u, right=True))
    return (index if order is None else order.gather(1, index)).squeeze(1)


def penalise_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Divide the logits (B, vocab_size) of the tokens (B, T) that have come by the penalty; multiply the negative ones.

    Keskar et al., 2019, https://arxiv.org/abs/1909.05858, with the negative logits treated as in Hugging Face's generate.
    """
    chosen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(chosen > 0, chosen / penalty, chosen * penalty))
