"""A language model of the Llama family in a GGUF file, read into a GPT and a tokenizer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised weights are expanded to fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from corpus import DataError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from fastattn.models import GPT, GPTConfig

NAMES = {
    "token_embd": "token_embedding",
    "output_norm": "norm",
    "output": "output",
    "attn_norm": "norm1",
    "attn_output": "attention.out_proj",
    "ffn_norm": "norm2",
    "ffn_gate": "feed_forward.gate",
    "ffn_up": "feed_forward.linear1",
    "ffn_down": "feed_forward.linear2",
}
CONTROL = 3  # the type of a token that stands for no text


def read_gguf(path: str | Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model in evaluation mode, tokenizer, the file's metadata)

    Raises:
        DataError: the package gguf is missing, or the file holds another kind of model or tokenizer.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise DataError("reading GGUF files needs the package gguf: pip install gguf") from error
    reader = GGUFReader(path)
    metadata = {name: entry.contents() for name, entry in reader.fields.items()}
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise DataError(f"{path} must hold a model of the architecture llama, got {architecture}")
    tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    config = _config(metadata, tensors)
    model = GPT(config)
    try:
        model.load_state_dict(_state(config, tensors))
    except (KeyError, RuntimeError) as error:
        raise DataError(f"{path}: the tensors are not those of a Llama: {error}") from error
    return model.eval(), _tokenizer(path, metadata), metadata


def _config(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> GPTConfig:
    settings = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    if scaling := [name for name in settings if name.startswith("rope.scaling")]:
        raise DataError(f"scaled rotary positions are not read from GGUF files, got {', '.join(scaling)}")
    heads, width = settings["attention.head_count"], settings["embedding_length"]
    return GPTConfig(
        vocab_size=len(tensors["token_embd.weight"]),
        context_length=settings["context_length"],
        num_layers=settings["block_count"],
        num_heads=heads,
        num_kv_heads=settings.get("attention.head_count_kv", heads),
        head_dim=settings.get("rope.dimension_count", width // heads),
        d_model=width,
        d_ff=settings["feed_forward_length"],
        tie_weights="output.weight" not in tensors,
        bias=False,
        norm="rms_norm",
        norm_eps=settings["attention.layer_norm_rms_epsilon"],
        positions="rotary",
        rope_theta=settings.get("rope.freq_base", 10_000.0),
        activation="silu",
        gated=True,
    )


def _state(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        *block, part, _ = name.split(".")
        if part in NAMES:
            prefix = f"blocks.{block[1]}." if block else ""
            state[f"{prefix}{NAMES[part]}.weight"] = tensor
    for i in range(config.num_layers):
        query, key, value = (tensors[f"blk.{i}.attn_{part}.weight"] for part in "qkv")
        packed = torch.cat([_halves(query, config.num_heads), _halves(key, config.num_kv_heads), value])
        state[f"blocks.{i}.attention.in_proj.weight"] = packed
    return state


def _halves(weight: Tensor, heads: int) -> Tensor:
    """The rows of a head in GGUF's order, pair after pair, in ours: the first numbers of all pairs, then the second."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tokenizer(path: str | Path, metadata: dict[str, Any]) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise DataError(f"{path} must hold a byte-pair tokenizer of the type smollm, got {kind}")
    names, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return tokenizer
