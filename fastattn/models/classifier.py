"""A text classifier: a transformer encoder, pooled over the tokens that are not padding.

x = token_embedding[tokens] + positions (+ bigram_embedding[hash of each token and the next])
x = block(x) for every block, padding masked
logits = pool(x) · Wᵀ + b (with votes of n-grams: (1 - vote_share) of these + vote_share of the votes)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.loss_rules import IGNORE_INDEX
from fastattn.models.layers import Block, SelfAttention
from fastattn.models.ngrams import NgramVotes
from fastattn.models.pretrained import Pretrained, check_indices, check_sizes
from fastattn.nn import FeedForward, LayerNorm
from fastattn.ops.feed_forward import ACTIVATIONS

POSITIONS = ("learned", "sinusoidal")
POOLING = ("mean", "cls", "attention")


@dataclass(frozen=True)
class ClassifierConfig:
    """What a Classifier is built from.

    Attributes:
        vocab_size: number of different tokens.
        num_classes: number of labels.
        context_length: the longest text, in tokens.
        num_layers, num_heads, d_model, d_ff, dropout, attention_dropout, bias: as in `GPTConfig`.
        activation: of the feed-forward layers, see `fastattn.feed_forward`.
        norm_first: pre-norm blocks and a norm at the end; otherwise post-norm, as in Vaswani et al. (2017).
        positions: "learned", or "sinusoidal" (Vaswani et al.: embeddings are scaled by √d_model, sines are added).
        pooling: "mean" over the tokens, "cls" (a learned first token) or "attention" (a learned weighted mean).
        bigram_buckets: size of the hashed embedding of neighbouring pairs (Joulin et al., 2016,
            https://arxiv.org/abs/1607.01759), or 0 for none.
        label_smoothing: share of the label's probability that the encoder's loss gives to all classes alike.
        ngram_votes: how many words, pairs and triples vote for the classes, beside the encoder and trained by a loss of
            their own, see `models.ngrams.NgramVotes`; or 0 for none. `votes.learn_ngrams` has to choose them before training.
        vote_share: their share of the logits, in [0, 1].

    Raises:
        TypeError: a size that is no integer.
        ValueError: a value out of its range, naming it.
    """

    vocab_size: int
    num_classes: int
    context_length: int = 256
    num_layers: int = 2
    num_heads: int = 4
    d_model: int = 128
    d_ff: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    norm_first: bool = True
    positions: str = "learned"
    pooling: str = "mean"
    bigram_buckets: int = 0
    label_smoothing: float = 0.0
    ngram_votes: int = 0
    vote_share: float = 0.8

    def __post_init__(self) -> None:
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        check_sizes(self, "vocab_size", "num_classes", "context_length", "num_layers", "num_heads", "d_model", "d_ff")
        for name, allowed in (("positions", POSITIONS), ("pooling", POOLING), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {self.d_model}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0.0 <= self.vote_share <= 1.0:
            raise ValueError(f"vote_share must be in [0, 1], got {self.vote_share}")
        for name in ("bigram_buckets", "ngram_votes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def sinusoids(places: Tensor, width: int) -> Tensor:
    """fp32 (length, width): sin(p / 10000^(2i / width)) in the even columns 2i, the cosine in the odd ones."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=places.device).float() * (-math.log(10_000.0) / width))
    angles = places[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Classifier(Pretrained):
    """A classifier with random weights; `Classifier.from_pretrained(folder)` loads trained ones.

    Example:
        >>> model = Classifier(ClassifierConfig(vocab_size=100, num_classes=2, d_model=32))
        >>> tokens, mask = torch.randint(100, (4, 20)), torch.ones(4, 20, dtype=torch.bool)
        >>> logits, loss = model(tokens, mask, targets=torch.tensor([0, 1, 1, 0]))
        >>> logits.shape
        torch.Size([4, 2])
    """

    config_class: ClassVar[type] = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        if config.bigram_buckets:
            self.bigram_embedding = nn.Embedding(config.bigram_buckets, width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length + (config.pooling == "cls"), width)
        if config.pooling == "cls":
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
        elif config.pooling == "attention":
            self.score = nn.Linear(width, 1, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        assert config.d_ff is not None
        self.blocks = nn.ModuleList(
            Block(
                width,
                SelfAttention(width, config.num_heads, dropout=config.attention_dropout, bias=config.bias),
                FeedForward(width, config.d_ff, activation=config.activation, bias=config.bias),
                dropout=config.dropout,
                bias=config.bias,
                norm_first=config.norm_first,
            )
            for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(width, bias=config.bias) if config.norm_first else nn.Identity()
        self.output = nn.Linear(width, config.num_classes)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if config.ngram_votes:
            self.votes = NgramVotes(config.ngram_votes, config.num_classes)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the loss where there are targets.

        Args:
            tokens: (B, T) int64, T at most context_length.
            mask: (B, T) bool, True = token, False = padding; None: no padding.
            targets: (B,) int64 labels.

        Returns:
            (logits (B, num_classes), mean cross entropy as an fp32 scalar or None; with `ngram_votes` the mean of
            the encoder's and the votes')

        Raises:
            TypeError: tokens or targets that are not int64, a mask that is not bool.
            ValueError: shapes that do not fit, or (on the CPU) a token or target out of its range (the target -100 leaves a
                text out of the loss).
        """
        if targets is not None:
            check_indices("targets", targets, ("batch",), ignored=IGNORE_INDEX, num_classes=self.config.num_classes)
        x, grown = self.hidden(tokens, mask)
        logits = self.output(self.dropout(self._pool(x, grown)))
        smoothing, share = self.config.label_smoothing, self.config.vote_share
        loss = None if targets is None else F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if self.config.ngram_votes:
            votes = self.votes(tokens, mask)
            logits = (1 - share) * logits.float() + share * votes
            if loss is not None and targets is not None:
                # a loss of its own: it learns all that it can, whatever the encoder knows
                loss = (loss + F.cross_entropy(votes, targets)) / 2
        return logits, loss

    def hidden(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The normalised hidden state of each token, (B, T, d_model), and its mask; with "cls" pooling T grows by one.

        Args: as `forward`.
        """
        x, mask = self._embed(self._check(tokens, mask), mask)
        attend = None if mask is None else mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, causal=False, mask=attend)
        return self.norm(x), mask

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, d_model) and its mask; with "cls" pooling T grows by the token in front."""
        config = self.config
        x = self.token_embedding(tokens)
        if config.bigram_buckets:
            following = F.pad(tokens, (0, 1))[:, 1:]
            x = x + self.bigram_embedding((tokens * 1_000_003 + following * 7_919) % config.bigram_buckets)
        if config.positions == "sinusoidal":
            x = x * math.sqrt(config.d_model)
        if config.pooling == "cls":
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        places = torch.arange(x.shape[1], device=x.device)
        if config.positions == "learned":
            return self.dropout(x + self.position_embedding(places)), mask
        return self.dropout(x + sinusoids(places, config.d_model).to(x.dtype)), mask

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, d_model) → (B, d_model); a text without a token gives 0, except with "cls"."""
        if self.config.pooling == "cls":
            return x[:, 0]
        weights = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        if self.config.pooling == "attention":
            scores = self.score(x).float()
            if mask is not None:
                scores = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min)
            return (scores.softmax(dim=1) * weights * x).sum(dim=1).to(x.dtype)
        return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)

    def _check(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens, 0 where they are padding: so the pair at a text's end does not depend on it."""
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be a bool tensor, got dtype {str(mask.dtype).removeprefix('torch.')}")
            if mask.shape != tokens.shape:
                raise ValueError(f"mask must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(mask.shape)}")
            tokens = tokens.masked_fill(~mask, 0)
        check_indices("tokens", tokens, ("batch", "length"), vocab_size=self.config.vocab_size)
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(f"tokens has length {tokens.shape[1]}; context_length is {self.config.context_length}")
        return tokens
