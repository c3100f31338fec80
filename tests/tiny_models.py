"""Randomly initialised models of transformers, small enough for a test. Importing this skips where transformers is missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 50
_DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip

CAUSAL: dict[str, Callable[[], object]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    ),
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "mistral_window": lambda: transformers.MistralConfig(**_DECODER, head_dim=6, sliding_window=4),
    "gemma2_softcap_window": lambda: transformers.Gemma2Config(
        **_DECODER, head_dim=6, sliding_window=4, query_pre_attn_scalar=6, attn_logit_softcapping=2.0
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_DECODER),
    "gpt_oss_sinks": lambda: transformers.GptOssConfig(
        **_DECODER, head_dim=6, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    ),
}
OTHERS: dict[str, Callable[[], object]] = {
    "bert": lambda: transformers.BertConfig(**_ENCODER),
    "roberta": lambda: transformers.RobertaConfig(**_ENCODER),
    "vit": lambda: transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    ),
}


def build(name: str, attn_implementation: str = "eager") -> nn.Module:
    """A model in evaluation mode; every parameter is away from its initial value, where that hides a misuse."""
    torch.manual_seed(0)
    config = {**CAUSAL, **OTHERS}[name]()
    auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
    model = auto.from_config(config, attn_implementation=attn_implementation)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(name: str, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Two sequences of 7 and 4 tokens, or two images."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    tokens = torch.randint(2, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(tokens)
    padded = slice(4, None) if padding_side == "right" else slice(0, 3)
    tokens[1, padded], mask[1, padded] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}
