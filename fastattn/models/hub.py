"""A GPT in the formats of the Hugging Face hub: the names and settings of the families of GPT-2 and Llama, both ways.

`config.json` says which family it is ("model_type"); whatever serves the family serves the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.models.gpt_config import GPTConfig

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}

# Our modules and theirs; {} is the number of the block. Several of theirs are one of ours, row after row.
_GPT2 = {
    "token_embedding": ["transformer.wte"],
    "position_embedding": ["transformer.wpe"],
    "blocks.{}.norm1": ["transformer.h.{}.ln_1"],
    "blocks.{}.attention.in_proj": ["transformer.h.{}.attn.c_attn"],
    "blocks.{}.attention.out_proj": ["transformer.h.{}.attn.c_proj"],
    "blocks.{}.norm2": ["transformer.h.{}.ln_2"],
    "blocks.{}.feed_forward.linear1": ["transformer.h.{}.mlp.c_fc"],
    "blocks.{}.feed_forward.linear2": ["transformer.h.{}.mlp.c_proj"],
    "norm": ["transformer.ln_f"],
    "output": ["lm_head"],
}
_LLAMA = {
    "token_embedding": ["model.embed_tokens"],
    "blocks.{}.norm1": ["model.layers.{}.input_layernorm"],
    "blocks.{}.attention.in_proj": [f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
    "blocks.{}.attention.out_proj": ["model.layers.{}.self_attn.o_proj"],
    "blocks.{}.norm2": ["model.layers.{}.post_attention_layernorm"],
    "blocks.{}.feed_forward.gate": ["model.layers.{}.mlp.gate_proj"],
    "blocks.{}.feed_forward.linear1": ["model.layers.{}.mlp.up_proj"],
    "blocks.{}.feed_forward.linear2": ["model.layers.{}.mlp.down_proj"],
    "norm": ["model.norm"],
    "output": ["lm_head"],
}
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2's are (in_features, out_features)
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in old checkpoints

# Our settings and theirs, and what a missing one means there.
_REQUIRED = object()
_GPT2_SETTINGS = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "context_length": ("n_positions", _REQUIRED),
    "num_layers": ("n_layer", _REQUIRED),
    "num_heads": ("n_head", _REQUIRED),
    "d_model": ("n_embd", _REQUIRED),
    "d_ff": ("n_inner", None),
    "dropout": ("resid_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "tie_weights": ("tie_word_embeddings", True),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "activation": ("activation_function", "gelu_new"),
}
_LLAMA_SETTINGS = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "context_length": ("max_position_embeddings", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_heads": ("num_attention_heads", _REQUIRED),
    "num_kv_heads": ("num_key_value_heads", _REQUIRED),
    "head_dim": ("head_dim", None),
    "d_model": ("hidden_size", _REQUIRED),
    "d_ff": ("intermediate_size", _REQUIRED),
    "attention_dropout": ("attention_dropout", 0.0),
    "tie_weights": ("tie_word_embeddings", False),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "activation": ("hidden_act", "silu"),
}
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


def family(config: GPTConfig) -> str | None:
    """The "model_type" whose models compute what a GPT of this configuration computes; None where there is none."""
    if config.activation not in _ACTIVATIONS.values():
        return None
    if config.norm == "layer_norm" and config.positions == "learned":
        heads = config.num_kv_heads == config.num_heads and config.head_dim == config.d_model / config.num_heads
        plain = config.bias and config.qkv_bias and config.window is None and not config.gated
        return "gpt2" if heads and plain else None
    llama = config.norm == "rms_norm" and config.positions == "rotary" and config.gated
    if not llama or config.bias or config.dropout or (config.qkv_bias and config.window):
        return None
    return "qwen2" if config.qkv_bias else "mistral" if config.window else "llama"


def export(config: GPTConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What config.json and model.safetensors hold of a GPT in its family's format; None where it has no family."""
    kind = family(config)
    if kind is None:
        return None
    dtype = str(state["token_embedding.weight"].dtype).removeprefix("torch.")
    settings: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    for ours, (theirs, _) in (_GPT2_SETTINGS if kind == "gpt2" else _LLAMA_SETTINGS).items():
        settings[theirs] = getattr(config, ours)
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    if kind == "gpt2":
        settings |= {"activation_function": activation, "embd_pdrop": config.dropout}
    else:
        settings |= {"hidden_act": activation, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if kind == "mistral":
        settings["sliding_window"] = config.window

    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    names, tensors = _names(kind, config.num_layers), {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        parts = tensor.split(rows) if len(names[module]) > 1 else [tensor]
        for theirs, piece in zip(names[module], parts):
            key = f"{theirs}.{part}"
            tensors[key] = piece.t() if key.endswith(_TRANSPOSED) else piece
    return settings, tensors


def load(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments of GPTConfig, state) from what config.json and the files beside it hold.

    Raises:
        ValueError: another family, a setting that is missing or that a GPT does not have, tensors that are left over.
    """
    kind = settings["model_type"]
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    options = _options(settings, kind)
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(_CONSTANTS)}
    if options["tie_weights"]:
        given.pop("lm_head.weight", None)
    if kind == "gpt2":  # the first checkpoints were saved without a prefix
        given = {n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t for n, t in given.items()}
    state = {}
    for ours, theirs in _names(kind, options["num_layers"]).items():
        for part in ("weight", "bias"):
            keys = [key for name in theirs if (key := f"{name}.{part}") in given]
            parts = [given.pop(key).t() if key.endswith(_TRANSPOSED) else given.pop(key) for key in keys]
            if parts:
                state[f"{ours}.{part}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if given:
        raise ValueError(f"tensors that a {kind} model has no place for: {', '.join(sorted(given)[:5])}")
    return options, state


def _names(kind: str, layers: int) -> dict[str, list[str]]:
    """Our modules' names and theirs, for a number of blocks."""
    names = {}
    for ours, theirs in (_GPT2 if kind == "gpt2" else _LLAMA).items():
        for block in range(layers if "{}" in ours else 1):
            names[ours.format(block)] = [name.format(block) for name in theirs]
    return names


def _options(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    options = {}
    for ours, (theirs, default) in (_GPT2_SETTINGS if kind == "gpt2" else _LLAMA_SETTINGS).items():
        options[ours] = settings.get(theirs, default)
        if options[ours] is _REQUIRED:
            raise ValueError(f"config.json must say {theirs}")
    if options["activation"] not in _ACTIVATIONS:
        raise ValueError(f"the activation must be one of {', '.join(_ACTIVATIONS)}, got {options['activation']!r}")
    options["activation"] = _ACTIVATIONS[options["activation"]]
    if kind == "gpt2":
        _refuse(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        _refuse(settings, embd_pdrop=options["dropout"])
        return options
    _refuse(settings, attention_bias=False, mlp_bias=False, use_sliding_window=False)
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or settings.get("rope_theta", 10_000.0)
    rule = rope.get("rope_type", rope.get("type", "default"))
    if rule == "dynamic":
        raise ValueError("rope_type must not be 'dynamic': its frequencies depend on the length of each sequence")
    if kind == "mistral" and "sliding_window" not in settings:
        raise ValueError("config.json must say sliding_window")
    return options | {
        "bias": False,
        "qkv_bias": kind == "qwen2",
        "norm": "rms_norm",
        "positions": "rotary",
        "rope_theta": float(theta),
        "rope_scaling": None if rule == "default" else rope,
        "gated": True,
        "window": settings.get("sliding_window") if kind == "mistral" else None,
    }


def _refuse(settings: Mapping[str, Any], **allowed: Any) -> None:
    for name, value in allowed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {settings[name]!r}")
