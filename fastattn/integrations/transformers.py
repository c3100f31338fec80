"""Hugging Face transformers: `attn_implementation="fastattn"`.

    from fastattn.integrations import transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")    # or model.set_attn_implementation

Interface: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from fastattn.ops.attention import attend, canonical, scaled_dot_product_attention
from fastattn.ops.attention_maps import weights_of
from fastattn.tracing import constant_to_compilers

NAME = "fastattn"
MAPS = "_fastattn_maps"  # an attention layer's attribute: the model's `Maps`

# What models pass along that says nothing about which pairs are attended to, or says what the mask says as well.
_HARMLESS = {
    *("cache_position", "deterministic", "grid_thw", "input_ids", "labels", "logits_to_keep", "num_items_in_batch"),
    *("output_hidden_states", "output_router_logits", "position_embeddings", "position_ids"),
    *("return_dict", "shift_labels", "token_type_ids", "use_cache"),
}
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass
class Maps:
    """Whether a model's layers return their attention weights: the class of the model, it or one in it, that was asked for them."""

    asked: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # whoever unpickles a patched model need not have patched one
        vars(self).update(state)


def register() -> str:
    """Make "fastattn" an attention implementation of transformers, and return the name.

    Registers the attention and the function that makes its masks: without the latter, transformers would drop padding.
    May be called again.

    Not for models that transformers runs with its own implementations alone (`_supports_sdpa` is False, and not for want of
    softcap or sinks: BLOOM, MPNet, NLLB-MoE): their layers compute the attention themselves, or do not say what a missing
    mask means. They raise ValueError when they ask for a mask; `fastattn.patch` leaves them.

    Raises:
        ImportError: transformers is not installed, or has no attention interface (it came with version 5).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("the integration needs the package transformers: pip install 'transformers>=5'") from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def takes_others(model: Any) -> bool:
    """Whether a model's (class's) masks mean the same to every implementation; SDPA lacks softcap and sinks only."""
    return model._supports_sdpa or (
        model._supports_attention_backend and (model._supports_flash_attn or model._supports_flex_attn)
    )


@constant_to_compilers
def _refused(config: type) -> str:
    """`_refused_model`, asked while a compiler traces, too: it would trace past the cache."""
    return _refused_model(config)


@cache
def _refused_model(config: type) -> str:
    """The name of the model that is made of such configurations, where it does not ask for its implementation; else ""."""
    from transformers import MODEL_MAPPING

    try:
        model: Any = MODEL_MAPPING[config]
    except (KeyError, ValueError):  # a model of somebody else's, or none
        return ""
    fits = not hasattr(model, "_supports_sdpa") or (model._can_set_attn_implementation() and takes_others(model))
    return "" if fits else model.__name__


def attention_mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """The masks that transformers makes for SDPA.

    Raises:
        ValueError: the configuration is that of a model which would misunderstand them.
    """
    from transformers.masking_utils import sdpa_mask

    if name := _refused(config.__class__):
        raise ValueError(
            f'{name} computes its attention itself: attn_implementation must be one of its own, got "{NAME}". '
            "fastattn.patch(model) replaces its other layers"
        )
    return sdpa_mask(*args, config=config, **options)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer; its `is_causal`, where it has one, stands in for the argument.
        query: (B, Hq, Nq, D).
        key, value: (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv), with everything that is in the cache.
        attention_mask: bool, broadcastable to (B, Hq, Nq, Nk), True = attend; or floating, added to the scores; None: see
            `is_causal`.
        dropout: probability of dropping a weight.
        scaling: multiplies the scores; None = 1 / sqrt(D).
        is_causal: without a mask and with several queries, row i sees the keys up to i (behind them lie the empty places of a
            static cache); a single query sees all.
        softcap: c·tanh(score / c).
        sliding_window: a query sees that many keys, its own and those before; with a mask, which has the window, no effect.
        s_aux: (Hq,), the sinks' logits.
        position_bias: floating, broadcastable to (B, Hq, Nq, Nk), added to the scores.
        output_attentions: also return the weights, as when `patch` has noticed that the model's caller asked for them.

    Returns:
        (output (B, Nq, Hq, Dv), the weights after dropout (B, Hq, Nq, Nk), or None where nobody asked for them)

    Raises:
        TypeError: an argument that is not known here and may change the meaning.
        ValueError: one that is known and cannot be honoured.
    """
    _check(options, attention_mask)
    mask, bias = attention_mask, position_bias
    if attention_mask is not None and attention_mask.is_floating_point():
        mask, bias = None, attention_mask if position_bias is None else attention_mask + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left = right = None
    if causal and attention_mask is None and query.shape[2] > 1:
        right = query.shape[2] - key.shape[2]  # row i stands at column i + Nk - Nq
    if sliding_window is not None and attention_mask is None:
        if not causal and sliding_window < key.shape[2]:
            raise ValueError(f"sliding_window={sliding_window} must come with an attention_mask where is_causal=False")
        left = sliding_window - 1 - (right or 0) if causal else None
    maps: Maps | None = getattr(module, MAPS, None)
    wanted = output_attentions or (maps is not None and maps.asked is not None)
    if mask is bias is left is s_aux is softcap is None and not (dropout or wanted):  # has a shorter way on a CPU
        out = scaled_dot_product_attention(
            query, key, value, is_causal=right is not None, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    query, key, value, rules = canonical(
        query, key, value, mask, bias, None, s_aux, scaling, left, right, softcap or None, dropout
    )
    out, _ = attend(query, key, value, rules)
    return out.transpose(1, 2), weights_of(query, key, rules) if wanted else None


def _check(options: dict[str, Any], attention_mask: Tensor | None) -> None:
    given = {name for name, option in options.items() if option is not None and option is not False}
    if "cache" in given:
        raise ValueError("cache must be None: continuous batching with a paged cache is not supported")
    bounds = options.get("cu_seq_lens_q")
    several = bounds is None or bounds.numel() != 2  # a pack of one sequence needs no mask, and gets none
    if attention_mask is None and several and (packed := sorted(given & _PACKED)):
        raise ValueError(
            f"{', '.join(packed)} must come with an attention_mask that keeps the sequences apart, got None"
        )
    if unknown := sorted(given - _HARMLESS - _PACKED):
        raise TypeError(f"attention got arguments that are not known here and may change its meaning: {unknown}")
