"""The GPT and the classifier of the benchmarks as others write them; each takes the weights of ours.

PlainGPT is nanoGPT's recipe (https://github.com/karpathy/nanoGPT): one product for query, key and value, PyTorch's fused
attention, all the logits and `F.cross_entropy`. TorchGPT is made of `nn.TransformerEncoder`; `hugging_face` is GPT-2, or Llama
where our configuration is Llama's.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import need
from fastattn.models import ClassifierConfig, GPTConfig, hub

State = Mapping[str, Tensor]


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.in_proj(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x), approximate="tanh"))


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), PlainAttention(width, heads)
        self.norm2, self.feed_forward = nn.LayerNorm(width), PlainFeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, causal)
        return x + self.feed_forward(self.norm2(x))


class PlainGPT(nn.Module):
    """Loss of (tokens, targets). The names are those of our GPT."""

    def __init__(self, config: GPTConfig, state: State) -> None:
        super().__init__()
        width = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.context_length, width)
        self.blocks = nn.ModuleList(PlainBlock(width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.load_state_dict(state)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        logits = F.linear(self.norm(x), self.token_embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _torch_names(state: State) -> dict[str, Tensor]:
    """Our names of parameters as those of a model with an `encoder`."""
    names = {"attention.in_proj.": "self_attn.in_proj_", "attention.": "self_attn.", "feed_forward.": "",
             "blocks.": "encoder.layers."}  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[f"encoder.{name}" if name.startswith("norm.") else name] = tensor
    return renamed


def _torch_encoder(width: int, heads: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, nn.GELU("tanh"), batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)


class TorchGPT(nn.Module):
    """Loss of (tokens, targets)."""

    def __init__(self, config: GPTConfig, state: State) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.encoder = _torch_encoder(config.d_model, config.num_heads, config.num_layers)
        mask = nn.Transformer.generate_square_subsequent_mask(config.context_length)
        self.register_buffer("mask", mask, persistent=False)
        self.load_state_dict(_torch_names(state))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        logits = F.linear(self.encoder(x, mask=self.mask, is_causal=True), self.token_embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _MeanPooled(nn.Module):
    """Loss of (tokens, which of them are text, targets); a subclass says what runs between embedding and mean."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.output = nn.Linear(config.d_model, config.num_classes)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, tokens: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        weights = mask[..., None].to(x.dtype)
        pooled = (self.encode(x, mask) * weights).sum(1) / weights.sum(1)
        return F.cross_entropy(self.output(pooled).float(), targets)


class PlainClassifier(_MeanPooled):
    def __init__(self, config: ClassifierConfig, state: State) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(PlainBlock(config.d_model, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.load_state_dict(state)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.norm(x)


class TorchClassifier(_MeanPooled):
    def __init__(self, config: ClassifierConfig, state: State) -> None:
        super().__init__(config)
        self.encoder = _torch_encoder(config.d_model, config.num_heads, config.num_layers)
        self.load_state_dict(_torch_names(state))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=~mask)


def _transformers() -> ModuleType:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return need("transformers")


def hugging_face(config: GPTConfig, state: State, attention: str) -> Any:
    """The model of transformers with our weights."""
    return _gpt2(config, state, attention) if config.positions == "learned" else _llama(config, state, attention)


def _llama(config: GPTConfig, state: State, attention: str) -> Any:
    transformers, exported = _transformers(), hub.export(config, state)
    assert exported is not None
    settings, tensors = exported
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attn_implementation=attention))
    model.load_state_dict(tensors, strict=False)  # a tied output is not in the file
    model.tie_weights()
    return model


def _gpt2(config: GPTConfig, state: State, attention: str) -> Any:
    """Its linear layers hold the transposed matrix."""
    transformers = _transformers()
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.d_model,
            n_layer=config.num_layers, n_head=config.num_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            attn_implementation=attention, bos_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip
    names = {"blocks.": "transformer.h.", "attention.in_proj": "attn.c_attn", "attention.out_proj": "attn.c_proj",
             "feed_forward.linear1": "mlp.c_fc", "feed_forward.linear2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2",
             "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe"}  # fmt: skip
    theirs = {"lm_head.weight": state["token_embedding.weight"]}
    for name, tensor in state.items():
        matrix = name.startswith("blocks.") and tensor.dim() == 2
        for old, new in names.items():
            name = name.replace(old, new)
        theirs[f"transformer.ln_f{name.removeprefix('norm')}" if name.startswith("norm.") else name] = (
            tensor.T if matrix else tensor
        )
    model.load_state_dict(theirs)
    return model
