"""Linear layer with a fused activation, and the feed-forward layer of a transformer, plain and gated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import checks
from fastattn.backend import device_guard, implementation, input_precision
from fastattn.dropout import draw_seed
from fastattn.eager.activations import ACTIVATIONS
from fastattn.eager.feed_forward import definition
from fastattn.eager.products import product_over_rows
from fastattn.eager.random import drop
from fastattn.ops.library import call, define, differentiate, needs_composite, tensors_only
from fastattn.replay import replay

RECOMPUTE = ("none", "activation", "hidden")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "identity") -> Tensor:
    """act(input · weightᵀ + bias), in one kernel.

    Products accumulate in fp32, and fp32 input is multiplied exactly unless torch's matmul precision allows TF32.

    Args:
        input: (..., in_features), fp32, fp16 or bf16.
        weight: (out_features, in_features), dtype of `input` (autocast casts both).
        bias: (out_features,), or None.
        activation: "identity", "relu", "relu2" (relu squared), "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh".

    Returns:
        (..., out_features), dtype of `input`.

    Raises:
        TypeError: dtypes that are not supported or differ.
        ValueError: shapes that do not match, another activation, tensors on different devices.

    Example:
        >>> linear(torch.tensor([[1.0, -2.0]]), torch.eye(2), activation="relu")
        tensor([[1., 0.]])
    """
    _check_activation(activation)
    input, weight, bias = checks.autocast(input, weight, bias)  # type: ignore[assignment]
    _check_layer(input, {"weight": weight, "bias": bias}, "weight", "bias", input)
    if needs_composite(input, weight, bias):
        return definition(input, weight, bias, None, None, activation)
    keep = activation != "identity" and _differentiable(input, weight, bias)
    return call(linear_op, input, weight, bias, activation, keep)[0]


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    recompute: str = "none",
) -> Tensor:
    """Two linear layers with an activation, optionally gated, between them.

        y = act(x W1ᵀ + b1) W2ᵀ + b2                        (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762)
        y = (act(x Wgᵀ + bg) · (x W1ᵀ + b1)) W2ᵀ + b2       (gated; Shazeer, 2020, https://arxiv.org/abs/2002.05202)

    and with `residual`, residual + dropout(y).

    GLU, ReGLU, GEGLU and SwiGLU are the gated form with "sigmoid", "relu", "gelu" and "silu". Bias and activation are
    part of the first product's kernel, the activation's derivative is part of the backward's.

    Args:
        input: (..., d_in), fp32, fp16 or bf16.
        weight1, bias1: (d_hidden, d_in) and (d_hidden,), dtype of `input` (autocast casts all); a bias may be None.
        weight2, bias2: (d_out, d_hidden) and (d_out,).
        activation: as in `linear`.
        gate_weight, gate_bias: as weight1 and bias1.
        dropout_p: probability in [0, 1) of dropping a number of y. The seed comes from torch's generator; the choice
            depends on (seed, row, column) alone and is the same on every backend; it takes 16 random bits, so that the
            share is p to the nearest 2⁻¹⁶.
        residual: (..., d_out), dtype of `input`: added last.
        recompute: what the backward computes again instead of keeping it, per row in numbers of the input's dtype:
            "none" keeps 2 · d_hidden (gated 3), "activation" keeps 1 · d_hidden (gated 2) and repeats only the
            activation, "hidden" keeps nothing but the input and repeats the first layer. With d_in = d_out = d, forward and
            backward are 6 (gated 9) products of 2 · d · d_hidden operations per row; "hidden" makes them 7 (gated 11).
            What a level saves counts for every layer of a model: the peak within one layer's backward is the same.
            "activation" costs a GPU nothing, since the kernel that multiplies by the derivative has the value at hand, and a
            CPU one more pass over the hidden layer.

    Returns:
        (..., d_out), dtype of `input`.

    Raises:
        TypeError: dtypes that are not supported or differ.
        ValueError: shapes that do not match, another activation or level, tensors on different devices.

    Example:
        >>> feed_forward(torch.tensor([[1.0, -2.0]]), torch.eye(2), None, torch.eye(2), None, activation="relu")
        tensor([[1., 0.]])
    """
    _check_activation(activation)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    checks.check_probability("dropout_p", dropout_p)
    given = input, weight1, bias1, gate_weight, gate_bias, weight2, bias2, residual
    tensors: Any = checks.autocast(*given)
    _check_feed_forward(*tensors)
    seed = draw_seed(input.device) if dropout_p else None
    if needs_composite(*tensors):
        return _definition(tensors, seed, activation, dropout_p)
    keep = _differentiable(*tensors) and recompute != "hidden"
    return call(feed_forward_op, *tensors, seed, activation, dropout_p, keep, keep and recompute == "none")[0]


def _differentiable(*tensors: Tensor | None) -> bool:
    """Whether the forward should keep what the backward can use; not in a traced graph, which is used with gradients and without."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return recorded and not torch.jit.is_tracing()


def _check_activation(activation: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _check_layer(
    input: Tensor, named: dict[str, Tensor | None], weight_name: str, bias_name: str, features_of: Tensor
) -> None:
    """TypeError or ValueError unless weight (out, in) and bias (out,) fit the last dimension of `features_of`."""
    checks.check_tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension (..., features), got shape ()")
    weight, bias = named[weight_name], named[bias_name]
    for name, tensor in named.items():
        if tensor is None:
            continue
        checks.check_tensor(name, tensor)
        if tensor.dtype != input.dtype:
            dtype, expected = checks.name_of(tensor.dtype), checks.name_of(input.dtype)
            raise TypeError(f"{name} has dtype {dtype}; allowed: that of input, {expected}")
    if weight is None:
        raise TypeError(f"{weight_name} must be a torch.Tensor, got NoneType")
    checks.check_rank(weight_name, weight, 2, "(out_features, in_features)")
    if features_of.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name} must have shape (out_features, {features_of.shape[-1]}), got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.check_shape(bias_name, bias, (weight.shape[0],), f"the out_features of {weight_name}")
    checks.check_same_device(input=input, **named)


def _check_feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
) -> None:
    _check_layer(input, {"weight1": weight1, "bias1": bias1}, "weight1", "bias1", input)
    hidden = weight1.t()
    _check_layer(input, {"weight2": weight2, "bias2": bias2}, "weight2", "bias2", hidden)
    if gate_weight is not None:
        _check_layer(input, {"gate_weight": gate_weight, "gate_bias": gate_bias}, "gate_weight", "gate_bias", input)
        checks.check_shape("gate_weight", gate_weight, tuple(weight1.shape), "the shape of weight1")
    elif gate_bias is not None:
        raise ValueError("gate_bias needs gate_weight, got None")
    if residual is not None:
        checks.check_tensor("residual", residual, (input.dtype,))
        checks.check_shape("residual", residual, (*input.shape[:-1], weight2.shape[0]), "the shape of the output")
        checks.check_same_device(input=input, residual=residual)


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features)"""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    with device_guard(input.device):
        launcher = implementation("feed_forward", input.device)
        out, z, _ = launcher.forward(
            _rows(input), weight, bias, None, None, None, None, activation, 0.0, keep, input_precision(input.dtype)
        )
    return out.view(*input.shape[:-1], weight.shape[0]), z


def _linear_fake(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, columns, keep = math.prod(input.shape[:-1]), weight.shape[0], rest[-1]
    return input.new_empty((*input.shape[:-1], columns)), input.new_empty((rows, columns) if keep else (0,))


linear_op = define(
    "linear(Tensor input, Tensor weight, Tensor? bias, str activation, bool keep) -> (Tensor output, Tensor z)",
    _linear,
    _linear_fake,
)


def _linear_gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if grad_outputs[0] is None:
        return []
    grads = call(linear_backward_op, grad_outputs[0], *arguments[:3], outputs[1], arguments[3], list(needs[:3]))
    return [g if need else None for g, need in zip(grads, needs)]


def _linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    dz, x, precision = _rows(grad_output), _rows(input), input_precision(input.dtype)
    with device_guard(input.device):
        launcher = implementation("feed_forward", input.device)
        if activation != "identity":
            if z.dim() == 1:
                _, z, _ = launcher.forward(x, weight, bias, *(None,) * 4, activation, 0.0, True, precision)
            dz = launcher.activation_backward(dz, z, activation)
        dx = launcher.input_backward(dz, weight, None, None, precision).view(input.shape) if needs[0] else None
        dw = product_over_rows(dz, x) if needs[1] else None
        db = dz.sum(0) if needs[2] else None  # (torch accumulates in fp32)
    return tensors_only(input, dx, dw, db)


def _backward_fake(grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Of both backward ops: after grad_output come the tensors that `needs`, the last argument, tells of."""
    input, needs = rest[0], rest[-1]
    return tuple(input.new_empty(t.shape if t is not None and n else 0) for t, n in zip(rest, needs))


linear_backward_op = define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor z, str activation, "
    "bool[] needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _linear_backward,
    _backward_fake,
)


def _linear_second_gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad_output, *tensors, _, activation, taken = arguments
    of_grads, of_tensors = replay(
        lambda x, w, b: (definition(x, w, b, None, None, activation),), taken, (grad_output,), tensors, grad_outputs
    )
    return [*of_grads, *of_tensors]


differentiate(linear_op, _linear_gradient, keep_outputs=(1,))
differentiate(linear_backward_op, _linear_second_gradient)


def _definition(tensors: Sequence[Any], seed: Tensor | None, activation: str, dropout_p: float) -> Tensor:
    input, weight1, bias1, gate_weight, gate_bias, weight2, bias2, residual = tensors
    hidden = definition(input, weight1, bias1, gate_weight, gate_bias, activation)
    y = definition(hidden, weight2, bias2, None, None, "identity")
    if seed is not None:
        rows, columns = _rows(y).shape
        y = drop(_rows(y), seed, dropout_p, range(rows), columns).to(y.dtype).view(y.shape)
    return y if residual is None else y + residual


def _feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    keep: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, precision = _rows(input), input_precision(input.dtype)
    with device_guard(input.device):
        launcher = implementation("feed_forward", input.device)
        first = x, weight1, bias1, gate_weight, gate_bias, None, None
        hidden, z, g = launcher.forward(*first, activation, 0.0, keep, precision)
        added = None if residual is None else _rows(residual)
        second = hidden, weight2, bias2, None, None, added, seed
        out, _, _ = launcher.forward(*second, "identity", dropout_p, False, precision)
    return out.view(*input.shape[:-1], weight2.shape[0]), z, g, hidden if keep_hidden else input.new_empty(0)


def _feed_forward_fake(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None,
    weight2: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, (keep, keep_hidden) = (math.prod(input.shape[:-1]), weight1.shape[0]), rest[-2:]
    return (
        input.new_empty((*input.shape[:-1], weight2.shape[0])),
        input.new_empty(hidden if keep else (0,)),
        input.new_empty(hidden if keep and gate_weight is not None else (0,)),
        input.new_empty(hidden if keep_hidden else (0,)),
    )


feed_forward_op = define(
    "feed_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor? gate_weight, Tensor? gate_bias, Tensor weight2, "
    "Tensor? bias2, Tensor? residual, Tensor? seed, str activation, float dropout_p, bool keep, bool keep_hidden) "
    "-> (Tensor output, Tensor z, Tensor g, Tensor hidden)",
    _feed_forward,
    _feed_forward_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if grad_outputs[0] is None:
        return []
    tensors, (_, seed, activation, dropout_p) = arguments[:7], arguments[7:11]
    grads = call(
        feed_forward_backward_op, grad_outputs[0], *tensors, seed, *outputs[1:], activation, dropout_p, list(needs[:7])
    )
    return [g if need else None for g, need in zip((*grads, grad_outputs[0]), needs)]


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    seed: Tensor | None,
    z: Tensor,
    g: Tensor,
    hidden: Tensor,
    activation: str,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    dy, x, precision, gated = _rows(grad_output), _rows(input), input_precision(input.dtype), gate_weight is not None
    grads: list[Tensor | None] = [None] * 7
    with device_guard(input.device):
        launcher = implementation("feed_forward", input.device)
        first = x, weight1, bias1, gate_weight, gate_bias, None, None, activation, 0.0
        if seed is not None:
            dy = launcher.dropout_backward(dy, seed, dropout_p)
        if z.dim() == 1:
            hidden, z, g = launcher.forward(*first, True, precision)
        if any(needs[:5]):
            repeat = needs[5] and hidden.dim() == 1
            dz, dg, again = launcher.hidden_backward(dy, weight2, z, g, gated, activation, repeat, precision)
            hidden = again if repeat else hidden
            gate = (dg, gate_weight) if gated else (None, None)
            if needs[0]:
                grads[0] = launcher.input_backward(dz, weight1, *gate, precision).view(input.shape)
            for i, d in ((1, dz), (3, dg)):
                grads[i] = product_over_rows(d, x) if needs[i] else None
                grads[i + 1] = d.sum(0) if needs[i + 1] else None
        elif needs[5] and hidden.dim() == 1:
            hidden = launcher.forward(*first, False, precision)[0]
        grads[5] = product_over_rows(dy, hidden) if needs[5] else None
        grads[6] = dy.sum(0) if needs[6] else None
    return tensors_only(input, *grads)


feed_forward_backward_op = define(
    "feed_forward_backward(Tensor grad_output, Tensor input, Tensor weight1, Tensor? bias1, Tensor? gate_weight, "
    "Tensor? gate_bias, Tensor weight2, Tensor? bias2, Tensor? seed, Tensor z, Tensor g, Tensor hidden, "
    "str activation, float dropout_p, bool[] needs) -> (Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_gate_weight, "
    "Tensor grad_gate_bias, Tensor grad_weight2, Tensor grad_bias2)",
    _backward,
    _backward_fake,
)


def _second_gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad_output, *rest = arguments
    tensors, seed, (activation, dropout_p, taken) = rest[:7], rest[7], rest[11:]
    of_grads, of_tensors = replay(
        lambda *xs: (_definition((*xs, None), seed, activation, dropout_p),),
        taken, (grad_output,), tensors, grad_outputs,
    )  # fmt: skip
    return [*of_grads, *of_tensors]


differentiate(feed_forward_op, _gradient, keep_outputs=(1, 2, 3))
differentiate(feed_forward_backward_op, _second_gradient)


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options).arguments
    launchers = implementation("feed_forward", given["input"].device)

    def tiles(name: str, gated: bool) -> str:
        weight = given[name]
        return f"{name}: {launchers.explain(*weight.shape, weight.element_size(), gated)}"

    if function is linear:
        return [tiles("weight", False)]
    return [tiles("weight1", given.get("gate_weight") is not None), tiles("weight2", False)]
