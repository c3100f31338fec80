"""Votes of n-grams: a linear classifier of the words, pairs and triples of a text, to stand beside an encoder.

logits_c = Σ_g w_gc · r_gc + b_c  over the different known n-grams g of the text
r_gc     = log p(g | c) - mean over the classes of log p(g | c')
(Wang & Manning, 2012, https://aclanthology.org/P12-2018; beside a deep model: Cheng et al., 2016, "Wide & Deep")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 3
ABSENT = -1  # in the place of a repeated n-gram, of padding; no key
UNUSED = torch.iinfo(torch.int64).max  # a key that no n-gram has
_FACTORS = (-7046029254386353131, -4417276706812531889, 1609587929392839161)  # odd: as a product, one to one


def _hashes(tokens: Tensor) -> Iterator[Tensor]:
    """int64 (B, T) for n = 1, 2, 3: a number for the n-gram that starts at each token, the same only where the n-gram is."""
    value, following = torch.zeros_like(tokens), F.pad(tokens, (0, LONGEST - 1))
    for n in range(LONGEST):
        value = (value + following[:, n : n + tokens.shape[1]] + 1) * _FACTORS[n]
        value = value ^ (value >> 29)
        yield value & UNUSED  # not negative


class NgramVotes(nn.Module):
    """(B, T) tokens → (B, num_classes) logits in fp32. Knows no n-gram before `learn_ngrams`.

    Args:
        size: how many n-grams can be known.
        num_classes: how many classes they vote for.

    Attributes:
        keys: int64 (size,), the known n-grams' hashes, sorted.
        ratios: (size + 1, num_classes), r above; the last row, of all others, is 0.
        weight: (size + 1, num_classes), w above; it starts at 0.02, small beside what training adds.
        bias: (num_classes,), b above.
    """

    keys: Tensor
    ratios: Tensor

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.full((size,), UNUSED))
        self.register_buffer("ratios", torch.zeros(size + 1, num_classes))
        self.weight = nn.Parameter(torch.full((size + 1, num_classes), 0.02))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        ngrams = self.ngrams(tokens, mask)
        place = torch.searchsorted(self.keys, ngrams).clamp_max(len(self.keys) - 1)
        place = place.masked_fill(self.keys[place] != ngrams, len(self.keys))  # (B, n-grams)
        votes = F.embedding(place, self.weight).float() * F.embedding(place, self.ratios).float()
        return votes.sum(dim=1) + self.bias.float()

    def ngrams(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """int64 (B, 3 T): the hashes of each text's n-grams, sorted, with ABSENT in the place of repeats."""
        inside = F.pad(torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask, (0, LONGEST - 1))
        length, rows = tokens.shape[1], []
        for n, value in enumerate(_hashes(tokens)):  # with its last token past the text's end, it is none
            rows.append(value.masked_fill(~inside[:, n : n + length], ABSENT))
        found = torch.cat(rows, dim=1).sort(dim=1).values
        again = F.pad(found[:, 1:] == found[:, :-1], (1, 0))
        return found.masked_fill(again, ABSENT)

    @torch.no_grad()
    def learn_ngrams(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], least: int = 3) -> int:
        """Choose the n-grams that occur in the most texts and set `ratios` from their counts per class; returns how many.

        Args:
            batches: (tokens (B, T), mask (B, T), labels (B,)) of all training texts.
            least: in how many texts an n-gram must occur.
        """
        keys, classes = [], []
        for tokens, mask, labels in batches:
            found = self.ngrams(tokens, mask)
            known = found != ABSENT
            keys.append(found[known])
            classes.append(labels[:, None].expand_as(found)[known])
        unique, index, texts = torch.unique(torch.cat(keys), return_inverse=True, return_counts=True)
        count = min(int((texts >= least).sum()), len(self.keys))
        chosen = texts.argsort(descending=True, stable=True)[:count].sort().values  # of rising keys
        num_classes = len(self.bias)
        by_class = torch.bincount(index * num_classes + torch.cat(classes), minlength=len(unique) * num_classes)
        counts = by_class.view(-1, num_classes)[chosen] + 1  # (n-grams, classes), none impossible
        log_p = (counts / counts.sum(0)).log()
        self.keys.fill_(UNUSED)[:count] = unique[chosen].to(self.keys.device)
        self.ratios.zero_()[:count] = (log_p - log_p.mean(1, keepdim=True)).to(self.ratios)
        return count
