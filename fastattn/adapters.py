"""How modules of other libraries compute with our ops: one adapter per structure.

An adapter is put before the class of an existing module (`adapted`), which keeps its parameters, children, attributes and
hooks and gets the adapter's `forward`. The names of its children say which structure a module may have; that it computes
the same is checked with numbers by `fastattn.patch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastattn.nn.feed_forward import two_layers
from fastattn.nn.norm import add_norm
from fastattn.nn.plain import activation_name, is_plain_linear, weight_of
from fastattn.ops.attention import scaled_dot_product_attention
from fastattn.ops.feed_forward import linear
from fastattn.ops.normalization import layer_norm, rms_norm


class Adapter(nn.Module):
    """Stands before a module's class.

    Attributes:
        linears: the names of the linear layers that the structure has; the first reads the module's input.
        others: the names of other children that it may have.
        scales: how large the inputs are that it is compared on: a clamp shows in large ones alone.
        prefix: what the class's name gets in front.
    """

    linears: ClassVar[tuple[str, ...]] = ()
    others: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[float, ...]] = (1.0, 1e-4, 1e3)
    prefix: ClassVar[str] = "Fastattn"
    _fastattn_parts: ClassVar[tuple[type, type]]

    if TYPE_CHECKING:  # children and attributes are those of the class behind

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module has the children of this structure."""
        names = {name for name, _ in module.named_children()}
        return names.issuperset(cls.linears) and names <= {*cls.linears, *cls.others}

    @classmethod
    def probes(cls, module: Any, like: Tensor) -> Sequence[tuple[Tensor, ...]]:
        """Normally distributed inputs to compare with, (scales, 5, features) in the dtype and on the device of `like`."""
        return [(cls.random(like, weight_of(getattr(module, cls.linears[0])).shape[1]),)]

    @classmethod
    def random(cls, like: Tensor, features: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """(scales, 5, features), normally distributed times the scale of each sequence."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(cls.scales), 5, features, generator=generator, device="cpu")
        return (x * torch.tensor(cls.scales, device="cpu")[:, None, None]).to(like.device, dtype or like.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self._fastattn_parts, *super().__reduce_ex__(protocol)[2:]


_ADAPTED: dict[tuple[type, type], type[nn.Module]] = {}


def adapted(adapter: type[Adapter], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the adapter's forward, always the same class for the same two; `isinstance(module, base)` stays true."""
    parts = adapter, base
    if parts not in _ADAPTED:
        body = {"_fastattn_parts": parts, "__module__": __name__}
        _ADAPTED[parts] = type(adapter.prefix + base.__name__, parts, body)
    return _ADAPTED[parts]


def _rebuild(adapter: type[Adapter], base: type[nn.Module]) -> nn.Module:
    cls = adapted(adapter, base)
    return cls.__new__(cls)


class Norm(Adapter):
    """A module of one input whose only parameters are a weight, and perhaps a bias, of one dimension.

    What is done with eps shows in inputs that are not much larger than its root.
    """

    scales = (1.0, 1e-4, 1e-6, 1e3)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters()}
        alone = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
        shapes = {tuple(p.shape) for p in module.parameters()}
        named = "norm" in type(module).__name__.lower() and _eps(module) is not None
        inputs = len(signature(module.forward).parameters)  # Mamba's norm has a gate
        return named and alone and inputs == 1 and names in ({"weight"}, {"weight", "bias"}) and len(shapes) == 1

    @classmethod
    def probes(cls, module: Any, like: Tensor) -> Sequence[tuple[Tensor, ...]]:
        features = module.weight.shape[0]
        mixed = [(cls.random(like, features, 1, torch.bfloat16),)] if like.dtype == torch.float32 else []
        return [(cls.random(like, features),), *mixed]


def _eps(norm: Any) -> float | None:
    return next((getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)), None)


class LayerNorm(Norm):
    """Classes that repeat or derive from `torch.nn.LayerNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, tuple(self.weight.shape), self.weight, getattr(self, "bias", None), _eps(self) or 0.0)


class WideningLayerNorm(LayerNorm):
    """The same in the wider dtype of the two: DeBERTa."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(torch.promote_types(input.dtype, self.weight.dtype)))


class RMSNorm(Norm):
    """weight · x̂, in the dtype of x: gpt-oss."""

    weight_offset: ClassVar[float] = 0.0

    def forward(self, input: Tensor) -> Tensor:
        return rms_norm(input, tuple(self.weight.shape), self.weight, _eps(self), weight_offset=self.weight_offset)

    @classmethod
    def probes(cls, module: Any, like: Tensor) -> Sequence[tuple[Tensor, ...]]:
        wider = [] if like.dtype == torch.float32 else [(cls.random(like, module.weight.shape[0], 1, torch.float32),)]
        return [*super().probes(module, like), *wider]


class RMSNormFromOne(RMSNorm):
    """(1 + weight) · x̂, in the dtype of x: Gemma."""

    weight_offset = 1.0


class WideningRMSNorm(RMSNorm):
    """weight · x̂, in the wider dtype of the two: Llama, Mistral, Qwen and many more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(torch.promote_types(input.dtype, self.weight.dtype)))


class NarrowingRMSNorm(WideningRMSNorm):
    """weight · x̂, in the dtype of the weight: T5, whose sums are in fp32 where its other parameters have 16 bits."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.weight.dtype)


class GatedMLP(Adapter):
    """down(act(gate(x)) · up(x)): Llama, Mistral, Qwen, Gemma."""

    linears, others = ("up_proj", "gate_proj", "down_proj"), ("act_fn",)

    def forward(self, input: Tensor) -> Tensor:
        return two_layers(input, self.up_proj, self.down_proj, self.act_fn, gate=self.gate_proj)


class GPT2MLP(Adapter):
    """dropout(c_proj(act(c_fc(x)))): GPT-2."""

    linears, others = ("c_fc", "c_proj"), ("act", "dropout")

    def forward(self, input: Tensor) -> Tensor:
        return self.dropout(two_layers(input, self.c_fc, self.c_proj, self.act))


class VisionMLP(Adapter):
    """fc2(act(fc1(x))): ViT, CLIP and others of transformers."""

    linears, others = ("fc1", "fc2"), ("activation_fn",)

    def forward(self, input: Tensor) -> Tensor:
        return two_layers(input, self.fc1, self.fc2, self.activation_fn)


class TimmMLP(Adapter):
    """drop2(fc2(drop1(act(fc1(x))))): timm."""

    linears, others = ("fc1", "fc2"), ("act", "drop1", "norm", "drop2")

    def forward(self, input: Tensor) -> Tensor:
        return self.drop2(two_layers(input, self.fc1, self.fc2, self.act, dropout=self.drop1))


class DenseActivation(Adapter):
    """act(dense(x)): the first half of the feed-forward layer of BERT and RoBERTa."""

    linears, others = ("dense",), ("intermediate_act_fn",)

    def forward(self, input: Tensor) -> Tensor:
        name = activation_name(self.intermediate_act_fn)
        if name is None or not is_plain_linear(self.dense):
            return self.intermediate_act_fn(self.dense(input))
        return linear(input, weight_of(self.dense), self.dense.bias, activation=name)


class DenseAddNorm(Adapter):
    """norm(dropout(dense(x)) + residual): what ends the attention and the feed-forward layer of BERT and RoBERTa."""

    linears, others = ("dense",), ("dropout", "LayerNorm")

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return add_norm(self.LayerNorm, residual, self.dropout(self.dense(input)))[0]

    @classmethod
    def probes(cls, module: Any, like: Tensor) -> Sequence[tuple[Tensor, ...]]:
        out_features, in_features = weight_of(module.dense).shape
        return [(cls.random(like, in_features), cls.random(like, out_features, 1))]


class TimmAttention(Adapter):
    """proj(attention(qkv(x))), bidirectional: timm's vision transformers."""

    linears, others = ("qkv", "proj"), ("q_norm", "k_norm", "norm", "attn_drop", "proj_drop")
    scales = (1.0, 1e-4)  # softmax multiplies the rounding errors of large scores

    def forward(self, input: Tensor, *rest: Any, **options: Any) -> Tensor:
        if rest or any(option is not None for option in options.values()):  # a mask, which not every version has
            return super().forward(input, *rest, **options)
        packed = self.qkv(input).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind()
        query, key = self.q_norm(query), self.k_norm(key)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=self.scale)
        out = out.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(out) if hasattr(self, "norm") else out))


ADAPTERS = (
    *(LayerNorm, WideningLayerNorm, WideningRMSNorm, NarrowingRMSNorm, RMSNorm, RMSNormFromOne),
    *(GatedMLP, GPT2MLP, VisionMLP, TimmMLP, DenseActivation, DenseAddNorm, TimmAttention),
)
