"""A GPT: the decoder-only language model of Radford et al. 2019 ("GPT-2"), on fastattn's ops.

x = token_embedding[tokens] + position_embedding[0..T)
x = x + attention(norm(x));  x = x + feed_forward(norm(x))        for every block ("pre-norm")
logits = norm(x) · token_embeddingᵀ                               the two share their weight ("tied")
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.decoding import TokenReader, can_read_tokens
from fastattn.models.layers import Block, KVCache
from fastattn.models.loss import chunked_cross_entropy
from fastattn.models.pretrained import Pretrained, check_sizes
from fastattn.nn import LayerNorm

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """What a GPT is built from.

    Attributes:
        vocab_size: number of different tokens.
        context_length: the longest sequence that the model reads, in tokens.
        num_layers: number of blocks.
        num_heads: attention heads in each block; must divide d_model.
        d_model: width of the residual stream.
        d_ff: width inside the feed-forward network; None means 4 · d_model.
        dropout: probability with which the embeddings and each branch's output are dropped in training.
        attention_dropout: the same for the attention weights; on a CPU this costs more than the rest of the attention.
        bias: whether linear layers and norms have a bias.
        tie_weights: whether the output layer is the transposed token embedding.

    Raises:
        ValueError: a number out of its range, naming it.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 6
    num_heads: int = 6
    d_model: int = 384
    d_ff: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    bias: bool = True
    tie_weights: bool = True

    def __post_init__(self) -> None:
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        check_sizes(self, "vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff")


class GPT(Pretrained):
    """A GPT with random weights; `GPT.from_pretrained(folder)` loads trained ones.

    Example:
        >>> model = GPT(GPTConfig(vocab_size=1000, context_length=64, num_layers=2, num_heads=2, d_model=32))
        >>> tokens = torch.randint(1000, (8, 65))
        >>> _, loss = model(tokens[:, :-1], tokens[:, 1:])
        >>> loss.backward()
        >>> model.generate(tokens[:1, :10], max_new_tokens=20, temperature=0.8, top_k=50, seed=0).shape
        torch.Size([1, 30])
    """

    config_class: ClassVar[type] = GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        assert config.d_ff is not None
        self.blocks = nn.ModuleList(
            Block(
                config.d_model, config.num_heads, config.d_ff, dropout=config.dropout,
                attention_dropout=config.attention_dropout, bias=config.bias,
            )
            for _ in range(config.num_layers)
        )  # fmt: skip
        self.norm = LayerNorm(config.d_model, bias=config.bias)
        if not config.tie_weights:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02²), with the layers that write to the residual stream scaled by 1/√(number of them)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("out_proj.weight", "linear2.weight"))
                scale = math.sqrt(2 * self.config.num_layers) if writes else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def output_weight(self) -> Tensor:
        """The matrix that turns the last hidden state into logits, (vocab_size, d_model)."""
        return self.token_embedding.weight if self.config.tie_weights else self.output.weight

    def num_parameters(self) -> int:
        """Number of trainable numbers; a tied weight counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised hidden state of each token, (B, T, d_model); `cache` holds the tokens before them.

        Args:
            tokens: (B, T) int64.
            cache: read and extended, or None.

        Raises:
            ValueError: more tokens than fit into the context.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"tokens has {end} positions; context_length is {self.config.context_length}")
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding.weight[start:end])
        for index, block in enumerate(self.blocks):
            x = block(x, causal=True, cache=cache, block=index)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, return_logits: bool | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, loss, or both.

        Args:
            tokens: (B, T) int64, T at most context_length.
            targets: (B, T) int64, the token that follows each; IGNORE_INDEX, -100, leaves a position out of the loss.
            return_logits: None returns logits exactly when there are no targets: the loss alone is computed in chunks,
                which is faster and needs far less memory.

        Returns:
            (logits (B, T, vocab_size) or None, mean cross entropy in nats as an fp32 scalar or None)

        Raises:
            TypeError: tokens or targets are not int64.
            ValueError: a shape that does not fit, or (on the CPU) a token outside [0, vocab_size).
        """
        self._check_tokens("tokens", tokens)
        if targets is not None:
            self._check_tokens("targets", targets, ignored=IGNORE_INDEX)
            if targets.shape != tokens.shape:
                shapes = f"{tuple(tokens.shape)}, got {tuple(targets.shape)}"
                raise ValueError(f"targets must have the shape of tokens, {shapes}")
        hidden = self.hidden(tokens)
        logits = None
        if return_logits or (return_logits is None and targets is None):
            logits = F.linear(hidden, self.output_weight)
        if targets is None:
            return logits, None
        if logits is None:
            loss = chunked_cross_entropy(hidden.flatten(0, 1), self.output_weight, targets.flatten())
        else:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue a batch of prompts of equal length.

        A sequence that outgrows the context goes on from its last context_length // 2 tokens; a prompt longer than the
        context is read from its last context_length tokens.

        Args:
            tokens: (B, T) int64, T at least 1.
            max_new_tokens: how many tokens to add.
            temperature: logits are divided by it; 0 takes the most likely token ("greedy").
            top_k: sample among the k most likely tokens only.
            top_p: sample among the fewest most likely tokens whose probabilities reach p ("nucleus").
            seed: makes the result reproducible; None draws a new one. PyTorch's global generators are not touched.

        Returns:
            (B, T + max_new_tokens) int64: the prompts and what follows.
        """
        new = self.stream(tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return torch.cat([tokens, *(token[:, None] for token in new)], dim=1)

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Like `generate`, but yields each new token, (B,) int64, as soon as it is known."""
        self._check_tokens("tokens", tokens)
        if tokens.shape[1] == 0:
            raise ValueError("tokens must hold at least one token to continue from, got length 0")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if temperature < 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        generator = torch.Generator(tokens.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        return self._stream(tokens, max_new_tokens, temperature, top_k, top_p, generator)

    def _stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        context = self.config.context_length
        was_training = self.training
        self.eval()
        try:
            read_token = TokenReader(self) if can_read_tokens(self) else None
            window, unread, cache = tokens[:, -context:], tokens[:, -context:], KVCache(context)
            for _ in range(max_new_tokens):
                with torch.inference_mode():
                    if cache.length + unread.shape[1] > context:
                        window = unread = window[:, -(context // 2 or 1) :]
                        cache = KVCache(context)
                    if read_token is not None and cache.length and unread.shape[1] == 1:
                        last = read_token(unread[:, 0], cache)
                    else:
                        last = self.hidden(unread, cache)[:, -1]
                    # W hᵀ: for a few rows PyTorch's CPU products take 0.35 (bf16) to 0.7 (fp32) times as long as for h Wᵀ
                    weight = self.output_weight
                    logits = torch.mv(weight, last[0])[None] if len(last) == 1 else (weight @ last.T).T
                    token = sample(logits, temperature, top_k, top_p, generator)
                    unread = token[:, None]
                    window = torch.cat([window, unread], dim=1)[:, -context:]
                yield token.clone()  # outside of inference mode: a tensor like any other
        finally:
            if was_training:
                self.train()

    def _check_tokens(self, name: str, tokens: Tensor, ignored: int | None = None) -> None:
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got dtype {str(tokens.dtype).removeprefix('torch.')}")
        if tokens.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions (batch, length), got shape {tuple(tokens.shape)}")
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at the values would make the host wait for the device
        outside = (tokens < 0) | (tokens >= self.config.vocab_size)
        if ignored is not None:
            outside &= tokens != ignored
        if outside.any():
            vocab_size = self.config.vocab_size
            raise ValueError(f"{name} must be in [0, {vocab_size}) (vocab_size), got {tokens[outside][0].item()}")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Draw one token from each row of logits, (B, vocab_size) → (B,), by inverting the cumulative distribution.

    With the tokens in descending order of probability, top-k and top-p both keep a prefix of the order; u is uniform in
    [0, probability of the prefix), and the token drawn is the first whose cumulative probability exceeds u. (Without
    either any order does.)
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
    order = None
    if top_k is not None:
        logits, order = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    elif top_p is not None:
        logits, order = logits.sort(dim=-1, descending=True)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    last = torch.full_like(cumulative[:, :1], cumulative.shape[-1] - 1, dtype=torch.int64)
    if top_p is not None:
        last = torch.minimum(last, torch.searchsorted(cumulative, torch.full_like(cumulative[:, :1], top_p)))
    u = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative.gather(1, last)
    index = torch.minimum(last, torch.searchsorted(cumulative, u, right=True))
    return (index if order is None else order.gather(1, index)).squeeze(1)
