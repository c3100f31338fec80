"""When may a fused op read a layer's parameters instead of calling the layer?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fastattn import backend
from fastattn.checks import FLOAT_DTYPES
from fastattn.eager.products import emulates, fp32_by_onednn, widens
from fastattn.ops import feed_forward as ops
from fastattn.tracing import compiling, tracing

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Identity: "identity",
}
# The classes of transformers.activations, by name: importing them would import transformers.
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "ReLUSquaredActivation": "relu2",
    "LinearActivation": "identity",
}


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else: no hook, no replaced forward."""
    return not (any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module) or _has_any_global_hook())


def is_plain_linear(*modules: nn.Module) -> bool:
    """Whether calling each of `modules` is x Wᵀ + b and nothing else: a Linear, no subclass of it, without hooks.

    A wrapper (FSDP), an adapter (LoRA), a quantised or a tensor-parallel layer is not one: it has to be called.
    """
    return all(
        (type(m) is nn.Linear or _is_conv1d(m)) and is_unhooked(m) and not _wraps_tensors(m.weight) for m in modules
    )


def _wraps_tensors(weight: object) -> bool:
    """Whether `weight` is of a class that wraps tensors (torchao, DTensor): its layer is known as no plain one by that alone."""
    return hasattr(type(weight), "__tensor_flatten__")  # torch's test of instances is False for all under torch.compile


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b: PyTorch's, or `fastattn.linear` where its product is the faster one (on some CPUs)."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    if not (plain and x.is_cpu) or (tracing() and not compiling()) or not backend.eager_on_cpu():
        return F.linear(x, weight, bias)
    autocasts = torch.is_autocast_enabled("cpu") and {x.dtype, weight.dtype} <= set(FLOAT_DTYPES)
    dtype = torch.get_autocast_dtype("cpu") if autocasts else x.dtype
    if compiling():  # it chooses itself in fp32, and should not ask how many rows there are: the op does
        faster = emulates(dtype)
    else:
        faster = fp32_by_onednn() if dtype == torch.float32 else widens(math.prod(x.shape[:-1]), dtype)
    if not faster or not (autocasts or x.dtype == weight.dtype):
        return F.linear(x, weight, bias)
    return ops.linear(x, weight, bias)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); where the module is a plain linear layer on a CPU, `linear` computes it."""
    if x.is_cpu and type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) and is_unhooked(module):
        return linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    return module(x)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a plain linear layer, (out_features, in_features)."""
    return linear.weight.t() if _is_conv1d(linear) else linear.weight  # type: ignore[operator,return-value]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' linear layer of GPT-2, which stores its weight transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def activation_name(activation: object) -> str | None:
    """The name that `fastattn.feed_forward` has for `activation`, a function or a module; None where it has none."""
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation) if callable(activation) else None
    if not is_unhooked(activation):
        return None
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(kind.__name__)
    return _MODULES.get(kind)
