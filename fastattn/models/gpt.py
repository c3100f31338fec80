"""A GPT: the decoder-only language model of Radford et al. 2019 ("GPT-2") and of Touvron et al. 2023 ("Llama").

x = token_embedding[tokens] + position_embedding[0..T)            or rotary positions, inside the attention
x = x + attention(norm(x));  x = x + feed_forward(norm(x))        for every block ("pre-norm")
logits = norm(x) · token_embeddingᵀ                               the two may share their weight ("tied")
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastattn.checks import check_integer
from fastattn.eager.products import product
from fastattn.layout import Packing
from fastattn.loss_rules import IGNORE_INDEX
from fastattn.models import hub
from fastattn.models.decoding import TokenReader, can_read_tokens
from fastattn.models.gpt_config import GPTConfig
from fastattn.models.layers import Block, KVCache, SelfAttention, make_norm
from fastattn.models.pretrained import Pretrained, check_indices
from fastattn.models.sampling import penalise_repetition, sample
from fastattn.models.sharded import unsharded
from fastattn.nn import FeedForward, GatedFeedForward, RotaryEmbedding
from fastattn.nn.modes import evaluating
from fastattn.nn.plain import is_plain_linear, linear
from fastattn.ops.linear_loss import linear_cross_entropy
from fastattn.ops.loss import cross_entropy
from fastattn.tracing import readable

MANY_TOKENS = 32  # to generate: from here on a copy of the weights in another order pays


def _block(config: GPTConfig) -> Block:
    feed_forward = GatedFeedForward if config.gated else FeedForward
    attention = SelfAttention(
        config.d_model, config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        window=config.window, dropout=config.attention_dropout, bias=config.bias, qkv_bias=config.qkv_bias,
    )  # fmt: skip
    return Block(
        config.d_model,
        attention,
        feed_forward(
            config.d_model, config.d_ff, activation=config.activation, bias=config.bias, recompute=config.recompute
        ),
        dropout=config.dropout,
        norm=config.norm,
        norm_eps=config.norm_eps,
        bias=config.bias,
    )


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
        self.rotary = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        else:
            assert config.head_dim is not None
            length, theta, scaling = config.context_length, config.rope_theta, config.rope_scaling
            self.rotary = RotaryEmbedding(config.head_dim, length, base=theta, scaling=scaling)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps, config.bias)
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

    def _to_files(self, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return hub.export(self.config, state) or super()._to_files(state)

    @classmethod
    def _from_files(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        if "model" in settings or "model_type" not in settings:  # a format of our own
            return super()._from_files(settings, tensors)
        options, tensors = hub.load(settings, tensors)
        return GPTConfig(**options), tensors

    @property
    def output_weight(self) -> Tensor:
        """The matrix that turns the last hidden state into logits, (vocab_size, d_model)."""
        return self.token_embedding.weight if self.config.tie_weights else self.output.weight

    def _has_plain_output(self) -> bool:
        """Whether logits are a product with `output_weight` and nothing else; otherwise `output` has to be called."""
        return self.config.tie_weights or is_plain_linear(self.output)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model), as `hidden` gives it, → (..., vocab_size)."""
        return linear(hidden, self.output_weight, None) if self._has_plain_output() else self.output(hidden)

    def num_parameters(self) -> int:
        """Number of trainable numbers; a tied weight counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """The normalised hidden state of each token, (B, T, d_model); `cache` holds the tokens before them.

        Args:
            tokens: (B, T) int64.
            cache: read and extended, or None.
            cu_seqlens: as in `forward`; not together with a cache.

        Raises:
            ValueError: more tokens than fit into the context, or a cache together with cu_seqlens.
        """
        if cache is not None and cu_seqlens is not None:
            raise ValueError("only one of cache and cu_seqlens can be given")
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        positions = packing = None
        if cu_seqlens is not None:
            positions, packing = self._unpack(tokens, cu_seqlens)
        elif isinstance(start, Tensor):
            positions = start[:, None].long() + torch.arange(tokens.shape[1], device=tokens.device)
        elif end > self.config.context_length:
            raise ValueError(f"tokens has {end} positions; context_length is {self.config.context_length}")
        x = self.token_embedding(tokens)
        if self.rotary is None:
            places = start + torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
            x = x + self.position_embedding(places)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x = block(
                x, causal=True, rotary=self.rotary, positions=positions, packing=packing, cache=cache, block=index
            )
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def _unpack(self, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Packing]:
        """Each token's position in its sequence, (T,), and how the sequences lie in `tokens`."""
        total = tokens.shape[1]
        if len(tokens) != 1:
            raise ValueError(f"packed tokens must have shape (1, T), got {tuple(tokens.shape)}")
        if readable(cu_seqlens):
            if cu_seqlens[-1:].tolist() != [total]:
                raise ValueError(f"cu_seqlens must end with the packed length {total}, got {cu_seqlens.tolist()}")
            if (longest := int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0) > self.config.context_length:
                raise ValueError(f"a sequence has {longest} tokens; context_length is {self.config.context_length}")
        place = torch.arange(total, dtype=cu_seqlens.dtype, device=tokens.device)
        starts = cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]
        longest = min(total, self.config.context_length)
        return (place - starts).long(), Packing(cu_seqlens, cu_seqlens, longest, longest)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_logits: bool | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, loss, or both.

        Args:
            tokens: (B, T) int64, T at most context_length.
            targets: (B, T) int64, the token that follows each; IGNORE_INDEX, -100, leaves a position out of the loss.
            cu_seqlens: int32 (sequences + 1,), rising from 0 to T: tokens (1, T) holds that many sequences one after the
                other, without padding, each at most context_length long and seeing itself alone; T may be any length.
            return_logits: None returns logits exactly when there are no targets: the loss alone is computed in chunks,
                which is faster and needs far less memory.

        Returns:
            (logits (B, T, vocab_size) or None, mean cross entropy in nats as an fp32 scalar or None)

        Raises:
            TypeError: tokens or targets are not int64.
            ValueError: a shape that does not fit, or (on the CPU) a token outside [0, vocab_size).
        """
        check_indices("tokens", tokens, ("batch", "length"), vocab_size=self.config.vocab_size)
        if targets is not None:
            axes, vocab_size = ("batch", "length"), self.config.vocab_size
            check_indices("targets", targets, axes, ignored=IGNORE_INDEX, vocab_size=vocab_size)
            if targets.shape != tokens.shape:
                shapes = f"{tuple(tokens.shape)}, got {tuple(targets.shape)}"
                raise ValueError(f"targets must have the shape of tokens, {shapes}")
        hidden = self.hidden(tokens, cu_seqlens=cu_seqlens)
        wanted = return_logits or (return_logits is None and targets is None)
        logits = loss = None
        if wanted or not self._has_plain_output():
            logits = self.logits(hidden)
        if targets is not None and logits is None:
            loss = linear_cross_entropy(hidden, self.output_weight, targets)
        elif targets is not None and logits is not None:
            loss = cross_entropy(logits, targets)
        return (logits if wanted else None), loss

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Continue a batch of prompts of equal length.

        A sequence that outgrows the context goes on from its last context_length // 2 tokens; a prompt longer than the
        context is read from its last context_length tokens. Some CPUs read weights faster in another order: there the call works
        with a copy of them (`fastattn.eager.products.pack`).

        Args:
            tokens: (B, T) int64, T at least 1.
            max_new_tokens: how many tokens to add.
            temperature: logits are divided by it; 0 takes the most likely token ("greedy").
            top_k: sample among the k most likely tokens only.
            top_p: sample among the fewest most likely tokens whose probabilities reach p ("nucleus").
            repetition_penalty: how much less likely the tokens in the context become, see `penalise_repetition`.
            seed: makes the result reproducible; None draws a new one. PyTorch's global generators are not touched.

        Returns:
            (B, T + max_new_tokens) int64: the prompts and what follows.

        Raises:
            TypeError: tokens that are no int64 tensor; max_new_tokens, top_k or a seed that is no integer.
            ValueError: a number out of its range, naming it.
        """
        new = self.stream(
            tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed,
        )  # fmt: skip
        return torch.cat([tokens, *(token[:, None] for token in new)], dim=1)

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Like `generate`, but yields each new token, (B,) int64, as soon as it is known."""
        check_indices("tokens", tokens, ("batch", "length"), vocab_size=self.config.vocab_size)
        max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
        top_k = None if top_k is None else check_integer("top_k", top_k, least=1)
        seed = None if seed is None else check_integer("seed", seed, least=None)
        if tokens.shape[1] == 0:
            raise ValueError("tokens must hold at least one token to continue from, got length 0")
        if temperature < 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if not 0.0 < repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {repetition_penalty}")
        generator = torch.Generator(tokens.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        return self._stream(tokens, max_new_tokens, temperature, top_k, top_p, repetition_penalty, generator)

    def _stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        context = self.config.context_length
        with evaluating(self), unsharded(self, tokens):
            batch = len(tokens) if max_new_tokens >= MANY_TOKENS else 0
            own = type(self).hidden is GPT.hidden and "hidden" not in vars(self)
            read_token = TokenReader(self, batch) if max_new_tokens > 1 and own and can_read_tokens(self) else None
            output_weight = None
            if self._has_plain_output():
                output_weight = self.output_weight if read_token is None else read_token.output_weight
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
                    logits = self.output(last) if output_weight is None else product(last, output_weight, None)
                    if repetition_penalty != 1.0:
                        logits = penalise_repetition(logits, window, repetition_penalty)
                    token = sample(logits, temperature, top_k, top_p, generator)
                    unread = token[:, None]
                    window = torch.cat([window, unread], dim=1)[:, -context:]
                yield token.clone()  # outside of inference mode: a tensor like any other
