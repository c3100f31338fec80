"""`patch` and `unpatch`: an existing model computes with fastattn, in place.

A module is not replaced: its class is, by a subclass. So its parameters, buffers, children, hooks, device, dtype,
`requires_grad`, tied weights and whatever wraps it are the same objects before and after, and `unpatch` puts the class back.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import fastattn.nn as ours
from fastattn.adapters import ADAPTERS, adapted
from fastattn.causal_loss import CausalLoss, difference_of_losses, is_causal_model
from fastattn.checks import FLOAT_DTYPES, name_of
from fastattn.comparing import difference
from fastattn.integrations.transformers import MAPS, NAME, Maps, register, takes_others
from fastattn.ops.attention import MAX_HEAD_DIM

Patterns = str | type | Sequence[str | type] | None

# What becomes of torch's classes, and the attributes that keep torch from computing around them in eval().
_TORCH: dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]] = {
    nn.LayerNorm: (ours.LayerNorm, {}),
    nn.RMSNorm: (ours.RMSNorm, {}),
    nn.MultiheadAttention: (ours.MultiheadAttention, {"_qkv_same_embed_dim": False}),
    nn.TransformerEncoderLayer: (ours.TransformerEncoderLayer, {}),
    nn.TransformerDecoderLayer: (ours.TransformerDecoderLayer, {}),
    nn.TransformerEncoder: (ours.TransformerEncoder, {"use_nested_tensor": False}),
    nn.TransformerDecoder: (ours.TransformerDecoder, {}),
    nn.Transformer: (ours.Transformer, {}),
}
# What layers of torch and transformers call the numbers of a head.
_HEAD_DIMS = ("head_dim", "qk_head_dim", "v_head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_OWN = ("eager", "sdpa")  # compared with by layers of transformers that prepare something for all others
_ORIGINAL, _ATTENTION = "_fastattn_original", "_fastattn_attention"  # where a module keeps what it was


@dataclass(frozen=True)
class Entry:
    """What became of one module.

    Attributes:
        name: as in `model.named_modules()`; "" is the model itself.
        kind: its class.
        became: what it computes with now; None where it was left.
        reason: why it was left.
    """

    name: str
    kind: str
    became: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `patch` did to every module of a model; prints as a table."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def swapped(self) -> dict[str, str]:
        """What each swapped module became, by name."""
        return {entry.name: entry.became for entry in self.entries if entry.became is not None}

    @property
    def left(self) -> dict[str, str]:
        """Why each other module was left, by name."""
        return {entry.name: entry.reason for entry in self.entries if entry.became is None}

    def __str__(self) -> str:
        """One row for modules of one class and fate; numbers in their names are written *."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for e in sorted(self.entries, key=lambda e: e.became is None):
            fate = ("left", e.kind, e.reason) if e.became is None else ("swapped", e.kind, e.became)
            groups.setdefault(fate, []).append(re.sub(r"\b\d+\b", "*", e.name) or "(the model)")
        table = [("", "class", "count", "became / why it was left", "names")]
        for (done, kind, text), names in groups.items():
            table.append((done, kind, str(len(names)), text, ", ".join(dict.fromkeys(names))))
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]) for row in table)


@dataclass(frozen=True)
class _Plan:
    """A module's new class and attributes."""

    cls: type[nn.Module]
    attributes: dict[str, Any]
    became: str


def patch(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    fused_loss: bool = False,
    dry_run: bool = False,
) -> Report:
    """Let the modules of `model` that fastattn knows compute with fastattn, in place.

    Known are torch's MultiheadAttention, transformer layers and stacks, LayerNorm and RMSNorm; norms and feed-forward layers
    of the families of GPT-2, BERT, RoBERTa, ViT, Llama, Mistral, Qwen and Gemma in transformers, and the blocks of timm's
    vision transformers, which are recognised by their structure and then compared, on small and large random inputs, with
    what they replace (a module whose dropout is no `nn.Dropout` is left); and the attention of transformers' models
    (`attn_implementation="fastattn"`). That attention gives maps to a call that asks for them (`output_attentions`), which
    costs an N × N matrix; a model whose configuration asks for them in every call keeps its own attention.

    Parameters, hooks, tied weights, devices, dtypes, optimizers and wrappers such as DistributedDataParallel stay. Patch
    before `fully_shard` and `parallelize_module`: modules whose parameters are distributed tensors are left.
    The attention implementation stands in the configuration, as always in transformers: other models that were made from the
    same object (`config`, not a copy) get it as well.

    Args:
        model: any module; nothing happens to it where an error is raised.
        include: only modules whose name matches one of these shell patterns ("encoder.*"), whose class's name is one of
            them, or that are instances of one of these classes. None = all.
        exclude: no module that matches one of these.
        fused_loss: a causal language model of transformers that is called in training with labels computes its loss by
            `linear_cross_entropy`, and its logits never exist: `outputs.logits` is None then. Calls in evaluation, or without
            labels, are as before.
        dry_run: only report what would be done.

    Returns:
        the report, which names every module: `print(report)`, `report.swapped`, `report.left`.

    Raises:
        ValueError: a pattern that matches no module; `fused_loss` where there is no causal language model of transformers.

    Example:
        >>> model = torch.nn.Transformer(64, 4, 1, 1, batch_first=True)
        >>> report = fastattn.patch(model, exclude="decoder*")
        >>> report.swapped["encoder.layers.0.norm1"]
        'fastattn.nn.LayerNorm'
        >>> fastattn.unpatch(model)
        7
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = list(model.named_modules(remove_duplicate=False))
    chosen = _chosen(named, include, exclude)
    kinds = {module: _class_name(module) for _, module in named}
    if fused_loss and not any(is_causal_model(module) for _, module in named):
        raise ValueError(
            "fused_loss is for causal language models of transformers with a linear output layer and the usual loss, "
            f"and there is none in this {_class_name(model)}"
        )
    decisions: dict[nn.Module, _Plan | str] = {}
    for name, module in named:
        if module not in decisions:
            decisions[module] = _decide(module, fused_loss) if name in chosen else "not chosen by include and exclude"
    _forbid_nested_tensors(decisions)
    attention = _attention_decisions(named, chosen)
    if not dry_run:
        for root in attention.roots:
            _swap_attention(root)
        for module, plan in decisions.items():
            if isinstance(plan, _Plan):
                _swap(module, plan)
    entries = []
    for name, module in named:
        decision = attention.modules.get(module, decisions[module])
        became, reason = (decision.became, "") if isinstance(decision, _Plan) else (None, decision)
        entries.append(Entry(name, kinds[module], became, reason))
    return Report(entries)


def unpatch(model: nn.Module) -> int:
    """Undo `patch`: every module gets back its class and its attributes, and its results are those from before, bit for bit.

    Returns:
        how many modules got their class back.

    Raises:
        RuntimeError: a module's class was changed again since (by `fully_shard`, for example), or its forward was replaced on
            the instance (by `Accelerator.prepare`); nothing is restored.
    """
    originals = [(module, vars(module)[_ORIGINAL]) for module in model.modules() if _ORIGINAL in vars(module)]
    for module, (cls, _, swapped) in originals:
        if _class_name(module) != swapped:
            raise RuntimeError(f"a {_class_name(module)} was wrapped after it was patched: unwrap the model first")
        if "forward" in vars(module) and cls is not type(module):  # it runs the one that it found
            raise RuntimeError(f"the forward of a {swapped} was replaced after it was patched: put it back first")
    for module, (cls, attributes, _) in originals:
        del vars(module)[_ORIGINAL]
        module.__class__ = cls
        vars(module).update(attributes)
    for module in model.modules():
        if _ATTENTION in vars(module):
            module.set_attn_implementation(vars(module).pop(_ATTENTION))  # type: ignore[operator]
        vars(module).pop(MAPS, None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _ask_for_maps]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return len(originals)


def _swap(module: nn.Module, plan: _Plan) -> None:
    state = vars(module)
    before = {name: state[name] for name in plan.attributes if name in state}
    state[_ORIGINAL] = type(module), before, plan.cls.__name__
    module.__class__ = plan.cls
    state.update({name: value for name, value in plan.attributes.items() if name in before})


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _chosen(named: list[tuple[str, nn.Module]], include: Patterns, exclude: Patterns) -> set[str]:
    """The names of the modules to look at."""

    def matched(argument: str, patterns: Patterns) -> set[str]:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, (str, type)) else patterns or ():
            if isinstance(pattern, type):
                names = {name for name, module in named if isinstance(module, pattern)}
            else:
                names = {n for n, m in named if fnmatchcase(n, pattern) or _class_name(m) == pattern}
            if not names:
                raise ValueError(f"{argument}={pattern!r} matches no module: neither a name nor a class of the model's")
            found |= names
        return found

    everything = {name for name, _ in named}
    return (everything if include is None else matched("include", include)) - matched("exclude", exclude)


def _decide(module: nn.Module, fused_loss: bool) -> _Plan | str:
    """The plan for one module, or the reason why there is none."""
    kind = type(module)
    if _ORIGINAL in vars(module) or kind.__module__.startswith("fastattn."):
        return "is fastattn's already"
    is_causal = fused_loss and is_causal_model(module)
    known = _TORCH.get(kind)
    adapters = [] if known or is_causal else [adapter for adapter in ADAPTERS if adapter.fits(module)]
    if not (is_causal or known or adapters):
        base = next((b for b in kind.__mro__ if b in _TORCH), None)
        return f"a subclass of {base.__name__}: it may compute something else" if base else "nothing here replaces it"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if is_causal:
        fused = adapted(CausalLoss, kind)
        what = "itself, with fastattn.linear_cross_entropy in training"
        return difference_of_losses(module, fused) or _Plan(fused, {}, what)
    for parameter in module.parameters():
        if type(parameter.data) is not Tensor:
            return f"its parameters are {type(parameter.data).__name__}: patch before they are distributed"
        if parameter.dtype not in FLOAT_DTYPES:
            return f"its parameters are {name_of(parameter.dtype)}: only float32, float16 and bfloat16 are supported"
    if isinstance(module, nn.MultiheadAttention) and _head_dim(module) > MAX_HEAD_DIM:
        return f"its heads have {_head_dim(module)} numbers, more than {MAX_HEAD_DIM}"
    if known:
        cls, attributes = known
        return _Plan(cls, attributes, f"fastattn.nn.{cls.__name__}")
    differences = []
    for adapter in adapters:
        differences.append(difference(module, adapter))
        if not differences[-1]:
            return _Plan(adapted(adapter, kind), {}, f"fastattn.adapters.{adapter.__name__}")
    return differences[0]


def _forbid_nested_tensors(decisions: dict[nn.Module, _Plan | str]) -> None:
    """A stack that stays torch's makes nested tensors, which none of ours takes: forbid it where a layer was swapped."""
    for module, decision in list(decisions.items()):
        if not isinstance(module, nn.TransformerEncoder) or isinstance(decision, _Plan):
            continue
        swapped_inside = any(isinstance(decisions[m], _Plan) for m in module.layers.modules())
        if swapped_inside and vars(module).get("use_nested_tensor"):
            decisions[module] = _Plan(type(module), {"use_nested_tensor": False}, "itself, without nested tensors")


@dataclass
class _Attention:
    """Models of transformers whose attention implementation changes, and what becomes of their attention layers."""

    roots: list[Any] = field(default_factory=list)
    modules: dict[nn.Module, _Plan | str] = field(default_factory=dict)


def _attention_decisions(named: list[tuple[str, nn.Module]], chosen: set[str]) -> _Attention:
    result = _Attention()
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:  # never imported: none of its models is here
        return result
    register()
    inside: set[nn.Module] = set()
    for name, root in named:
        if not isinstance(root, transformers.PreTrainedModel) or root in inside:
            continue
        inside.update(root.modules())
        prefix = f"{name}." if name else ""
        layers = [(prefix + n, m) for n, m in root.named_modules() if _calls_the_interface(m)]
        reason = ""
        if not layers:
            continue
        if root.config._attn_implementation == NAME:
            reason = "is fastattn's already"
        elif not root._can_set_attn_implementation():
            reason = "the model does not let its attention implementation be changed"
        elif not all(takes_others(m) for m in root.modules() if isinstance(m, transformers.PreTrainedModel)):
            reason = "transformers does not run it with attention implementations other than its own"
        elif any(_OWN in type(layer).forward.__code__.co_consts for _, layer in layers):
            reason = "its layers do something else for implementations whose names they do not know"
        elif any(getattr(config, "output_attentions", False) for config in _configs(root).values()):
            reason = (
                "its configuration asks for attention maps (output_attentions), which transformers allows its own alone"
            )
        elif (widest := max(_head_dim(layer) for _, layer in layers)) > MAX_HEAD_DIM:
            reason = f"one implementation serves the whole model, and there are heads of {widest} numbers, more than {MAX_HEAD_DIM}"
        elif any(p.dtype == torch.float64 for _, layer in layers for p in layer.parameters()):
            reason = "its parameters are float64: only float32, float16 and bfloat16 are supported"
        elif missing := [n for n, _ in layers if n not in chosen]:
            reason = f"one implementation serves the whole model, and {missing[0]} was not chosen"
        else:
            result.roots.append(root)
        for _, layer in layers:
            result.modules[layer] = reason or _Plan(type(layer), {}, f'attn_implementation="{NAME}"')
    return result


def _calls_the_interface(module: nn.Module) -> bool:
    """Whether this is an attention layer that asks transformers for its implementation."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and {"_attn_implementation", "get_interface"}.issubset(code.co_names)


def _head_dim(layer: nn.Module) -> int:
    """How many numbers an attention layer's heads have, as far as its attributes say."""
    return max(dim for name in _HEAD_DIMS if isinstance(dim := getattr(layer, name, 0), int))


def _configs(root: Any) -> dict[str, Any]:
    """The model's configuration, "", and those of its parts."""
    parts = {key: getattr(root.config, key) for key in root.config.sub_configs}
    return {"": root.config, **{key: part for key, part in parts.items() if part is not None}}


def _swap_attention(root: Any) -> None:
    vars(root)[_ATTENTION] = {key: config._attn_implementation for key, config in _configs(root).items()}
    root.set_attn_implementation(NAME)
    maps = Maps()
    for module in root.modules():
        if _calls_the_interface(module) or hasattr(module, "set_attn_implementation"):
            vars(module)[MAPS] = maps
        if hasattr(module, "set_attn_implementation"):
            module.register_forward_pre_hook(_ask_for_maps, with_kwargs=True)


def _ask_for_maps(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before the forward of a patched model, or of a model in it: what the outer one was asked holds for the inner one, too."""
    maps, name = vars(model)[MAPS], _class_name(model)
    if _ATTENTION in vars(model) or maps.asked in (None, name):
        maps.asked = name if kwargs.get("output_attentions") else None
