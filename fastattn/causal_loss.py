"""The loss of a causal language model of transformers from its hidden states: its logits never exist as a whole."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.adapters import Adapter
from fastattn.checks import FLOAT_DTYPES, name_of
from fastattn.comparing import error_of, probing
from fastattn.nn.plain import is_plain_linear
from fastattn.ops.linear_loss import linear_cross_entropy

# arguments that are the loss's, not the model's inside
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep")
# of a mean, in which the rounding errors of the logits cancel
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}
_LARGE = 50.0  # deviation of the logits in which a softcap shows


class CausalLoss(Adapter):
    """In training, a call with labels gives the loss of `linear_cross_entropy` and no logits. Every other call is the class's own."""

    prefix = ""  # transformers writes the class's name into checkpoints

    def __init_subclass__(cls) -> None:
        """`Trainer` asks for the signature of forward."""
        if "_fastattn_parts" in vars(cls):
            original: Any = cls._fastattn_parts[1].forward  # type: ignore[attr-defined]

            @wraps(original)
            def forward(self: CausalLoss, *args: Any, **options: Any) -> Any:
                return CausalLoss.forward(self, *args, **options)

            cls.forward = forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **options: Any) -> Any:
        labels = options.get("labels")
        if labels is None or not self.training or len(args) > 1 or not _is_plain(self, options):
            return super().forward(*args, **options)
        outputs = self.base_model(*args, **{name: value for name, value in options.items() if name not in _OF_THE_LOSS})
        loss = _loss(self, outputs[0], labels, options)
        kept = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return _result_class(outputs)(loss=loss, **kept)


def _is_plain(model: Any, options: dict[str, Any]) -> bool:
    """Whether a call's loss is the cross entropy of the shifted labels alone, and nobody asks for logits or a tuple."""
    keep = options.get("logits_to_keep", 0)
    some_logits = isinstance(keep, Tensor) or keep != 0
    as_tuple = options.get("return_dict") is False or model.config.return_dict is False
    adds = options.get("output_router_logits") or getattr(model.config, "output_router_logits", False)
    return (
        not (some_logits or as_tuple or adds)
        and _is_causal_loss(model)
        and is_plain_linear(model.get_output_embeddings())
    )


def _is_causal_loss(model: Any) -> bool:
    function = model.loss_function
    return function.__module__ == "transformers.loss.loss_utils" and function.__name__ == "ForCausalLMLoss"


def _loss(model: Any, hidden: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """What transformers' ForCausalLMLoss gives for the model's logits. hidden: (batch, tokens, features); labels: (batch, tokens)."""
    ignored, count = options.get("ignore_index", -100), options.get("num_items_in_batch")
    target = options.get("shift_labels")
    target = F.pad(labels, (0, 1), value=ignored)[:, 1:] if target is None else target
    factor, softcap = _after_the_head(model)
    head = model.get_output_embeddings()
    loss = linear_cross_entropy(
        hidden if factor == 1.0 else hidden * factor, head.weight, target.to(hidden.device).view(hidden.shape[:-1]),
        bias=head.bias, ignore_index=ignored, softcap=softcap, reduction="mean" if count is None else "sum",
    )  # fmt: skip
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _after_the_head(model: Any) -> tuple[float, float | None]:
    """What logits are multiplied by (Cohere, Granite), and their softcap (Gemma)."""
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return float(factor), getattr(config, "final_logit_softcapping", None)


def _result_class(outputs: Any) -> Any:
    """The class in which transformers' causal models return a loss."""
    from transformers import modeling_outputs as classes

    if "router_logits" in type(outputs).__dataclass_fields__:
        return classes.MoeCausalLMOutputWithPast
    if "cross_attentions" in type(outputs).__dataclass_fields__:
        return classes.CausalLMOutputWithCrossAttentions
    return classes.CausalLMOutputWithPast


def is_causal_model(module: Any) -> bool:
    """Whether this is a model of transformers with a loss over the outputs of a linear layer.

    A wrapper that has the attributes of the model in it (PEFT's, FSDP's) is none: its forward is more than the model's.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    return (
        transformers is not None
        and isinstance(module, transformers.PreTrainedModel)
        and isinstance(module.get_output_embeddings(), nn.Linear)
        and _is_causal_loss(module)
    )


def difference_of_losses(model: Any, cls: type[nn.Module]) -> str:
    """Why `cls` does not give the loss that the model gives; "" where it does.

    They are compared on random tokens, and on hidden states so large that a softcap of the logits shows.
    """
    head = model.get_output_embeddings()
    if not is_plain_linear(head):
        return "its output layer is no plain linear layer, or has hooks: it has to be called"
    if head.weight.dtype not in FLOAT_DTYPES:
        return f"its output layer is {name_of(head.weight.dtype)}: only float32, float16 and bfloat16 are supported"
    if head.weight.ndim != 2 or next(head.parameters(), None) is None:
        return "its output layer holds no whole weight (FSDP1's does not): patch before it is sharded"
    if head.weight.is_meta:
        return "its parameters are on the meta device: load them first"
    original = type(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(head.weight.shape[0], (2, 9), generator=generator).to(head.weight.device)
    labels = tokens.masked_fill(torch.arange(9, device=tokens.device) == 4, -100)
    sizes = [1.0]

    def enlarge(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state * sizes[-1]
        return outputs

    handle = model.get_decoder().register_forward_hook(enlarge)
    try:
        with probing(model, head.weight.device):
            logits = original.forward(model, input_ids=tokens).logits
            for size in (1.0, _LARGE / float(logits.float().std().clamp(min=1e-6))):
                sizes.append(size)
                model.training = True
                expected = original.forward(model, input_ids=tokens, labels=labels)
                model.__class__ = cls
                got = cls.forward(model, input_ids=tokens, labels=labels)
                model.__class__ = original
                if type(got) is not type(expected) or got.keys() != expected.keys() - {"logits"}:
                    return "its loss could be computed, but it returns something else with it"
                if error := error_of(got.loss.view(1, 1), expected.loss.view(1, 1), _TOLERANCE[head.weight.dtype]):
                    return f"its loss is another one (by {error:.1e})"
    except Exception as error:  # whatever a stranger's forward may raise
        return f"its loss raised {type(error).__name__} when compared"
    finally:
        model.__class__ = original
        handle.remove()
    return ""
