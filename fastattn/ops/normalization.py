"""Layer norm and RMS norm: one family of ops, with the residual add and adaptive scale and shift fused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastattn import checks
from fastattn.backend import device_guard, implementation
from fastattn.dropout import draw_seed
from fastattn.eager.normalization import modulate, normalise
from fastattn.eager.random import drop
from fastattn.ops.library import call, define, differentiate, left_to_compiler, needs_composite, tensors_only
from fastattn.ops.normalization_cpu import layer_norm_by_torch, rms_norm_by_torch
from fastattn.replay import replay

# Devices whose autocast runs torch's layer norm in fp32; on the others it runs in the input's dtype.
AUTOCAST_TO_FP32: tuple[str, ...] = ("cuda", "xpu", "mps")


@overload
def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = ..., bias: Tensor | None = ...,
    eps: float = ..., *,
    residual: None = ..., residual_dtype: None = ..., scale: Tensor | None = ..., shift: Tensor | None = ...,
    weight_offset: float = ...,
    dropout_p: float = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = ..., bias: Tensor | None = ...,
    eps: float = ..., *,
    residual: Tensor, residual_dtype: torch.dtype | None = ..., scale: Tensor | None = ..., shift: Tensor | None = ...,
    weight_offset: float = ...,
    dropout_p: float = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimensions (Ba et al., 2016, https://arxiv.org/abs/1607.06450).

    With h = dropout(input) + residual (or without them), and mean and variance (not the unbiased one) over `normalized_shape`:

        y = (1 + scale) · ((weight_offset + weight) · (h - mean) / sqrt(variance + eps) + bias) + shift

    Statistics and sums are fp32 for every dtype. Without keyword arguments this is `torch.nn.functional.layer_norm`.

    Args:
        input: (..., *normalized_shape), fp32, fp16 or bf16, any strides.
        normalized_shape: the shape of the last dimensions, or an int for one dimension.
        weight: `normalized_shape`, or None for ones; its dtype may differ from the input's.
        bias: `normalized_shape`, or None for zeros; its dtype may differ from the input's.
        eps: added to the variance.
        residual: shape of `input`, any of the dtypes: added before the norm.
        residual_dtype: dtype of the new residual stream; default the residual's.
        scale: broadcastable to `input`: adaptive layer norm (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748).
        shift: broadcastable to `input`.
        dropout_p: probability in [0, 1) of dropping a number of `input`, before the residual is added. The seed comes from
            torch's generator; the choice depends on (seed, row, column) alone and is the same on every backend; it takes
            16 random bits, so that the share is p to the nearest 2⁻¹⁶.
        weight_offset: added to the weight, without which it cannot be given: 1 for weights that are stored minus one.

    Returns:
        y in the input's dtype (fp32 under autocast on devices where torch does so); with `residual`, (y, h).

    Raises:
        TypeError: an argument that is not a dense floating-point tensor of the dtypes above, a number that is none.
        ValueError: shapes that do not match, tensors on different devices, `weight_offset` without `weight`.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), 2, eps=0.0)
        tensor([[-1.,  1.]])
    """
    plain = residual is residual_dtype is scale is shift is None and isinstance(weight_offset, float)
    if plain and not (dropout_p or weight_offset) and isinstance(eps, float) and eps >= 0.0:
        output = layer_norm_by_torch(input, normalized_shape, weight, bias, eps)
        if output is not None:
            return output
    return _norm(
        input, normalized_shape, weight, bias, eps, centered=True, residual=residual, residual_dtype=residual_dtype,
        scale=scale, shift=shift, dropout_p=dropout_p, weight_offset=weight_offset,
    )  # fmt: skip


@overload
def rms_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = ..., eps: float | None = ...,
    *, bias: Tensor | None = ...,
    residual: None = ..., residual_dtype: None = ..., scale: Tensor | None = ..., shift: Tensor | None = ...,
    weight_offset: float = ...,
    dropout_p: float = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = ..., eps: float | None = ...,
    *, bias: Tensor | None = ...,
    residual: Tensor, residual_dtype: torch.dtype | None = ..., scale: Tensor | None = ..., shift: Tensor | None = ...,
    weight_offset: float = ...,
    dropout_p: float = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square norm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

    Without the mean: y = (1 + scale) · ((weight_offset + weight) · h / sqrt(mean(h²) + eps) + bias) + shift.
    `eps=None` is the machine epsilon of fp32, in which the statistics are computed, as in torch.

    Arguments, results and errors are those of `layer_norm`; `bias` is keyword-only.

    Example:
        >>> rms_norm(torch.tensor([[6.0, 8.0]]), 2, eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    plain = bias is residual is residual_dtype is scale is shift is None and isinstance(weight_offset, float)
    if plain and not (dropout_p or weight_offset) and isinstance(eps, float) and eps >= 0.0:
        output = rms_norm_by_torch(input, normalized_shape, weight, eps)
        if output is not None:
            return output
    return _norm(
        input, normalized_shape, weight, bias, eps, centered=False, residual=residual, residual_dtype=residual_dtype,
        scale=scale, shift=shift, dropout_p=dropout_p, weight_offset=weight_offset,
    )  # fmt: skip


def _norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dropout_p: float,
    weight_offset: float,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = checked_shape(normalized_shape)
    _check(input, shape, weight, bias, eps, residual, residual_dtype, scale, shift, weight_offset)
    checks.check_probability("dropout_p", dropout_p)
    eps, weight_offset = float(eps), float(weight_offset)
    seed = draw_seed(input.device) if dropout_p else None
    to_fp32 = input.device.type in AUTOCAST_TO_FP32 and torch.is_autocast_enabled(input.device.type)
    output_dtype = torch.float32 if to_fp32 else input.dtype
    hidden_dtype = residual_dtype or (input if residual is None else residual).dtype
    tensors = input, residual, weight, bias, scale, shift
    if needs_composite(*tensors) or (seed is None and left_to_compiler(*tensors)):
        h = _hidden(input, residual, seed, dropout_p, len(shape)).to(hidden_dtype).contiguous()
        x_hat = normalise(h, len(shape), eps, centered)
        y = modulate(x_hat, weight, bias, scale, shift, weight_offset).to(output_dtype)
        return y if residual is None else (y, h)
    scale, shift = _by_group(input, len(shape), scale, shift)
    options = len(shape), eps, centered, weight_offset, dropout_p, output_dtype, hidden_dtype
    y, h, _, _ = call(norm_op, input, residual, seed, weight, bias, scale, shift, *options)
    return y if residual is None else (y, h)


def checked_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """TypeError unless it is integers or one, ValueError where it is none of them or one is negative."""
    entries = normalized_shape if isinstance(normalized_shape, Iterable) else (normalized_shape,)
    shape = tuple([checks.check_integer("normalized_shape", entry) for entry in entries])
    if not shape:
        raise ValueError("normalized_shape must have at least one dimension, got ()")
    return shape


def _check(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight_offset: float,
) -> None:
    named = {"weight": weight, "bias": bias, "residual": residual, "scale": scale, "shift": shift}
    checks.check_tensor("input", input)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape must be the last dimensions of input, got {shape} for input {tuple(input.shape)}"
        )
    for name, tensor in named.items():
        if tensor is None:
            continue
        checks.check_tensor(name, tensor)
        if name in ("weight", "bias"):
            checks.check_shape(name, tensor, shape, "normalized_shape")
        elif name == "residual":
            checks.check_shape(name, tensor, tuple(input.shape), "the shape of input")
        elif not _broadcasts(tensor.shape, input.shape):
            raise ValueError(f"{name} must broadcast to input {tuple(input.shape)}, got {tuple(tensor.shape)}")
    checks.check_same_device(input=input, **named)
    if residual_dtype is not None and (residual is None or residual_dtype not in checks.FLOAT_DTYPES):
        raise ValueError(
            f"residual_dtype must be float32, float16 or bfloat16 and needs residual, got {residual_dtype} "
            f"with residual {'None' if residual is None else 'given'}"
        )
    checks.check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    checks.check_number("weight_offset", weight_offset)
    if weight_offset and weight is None:
        raise ValueError(f"weight_offset needs weight, got {weight_offset} with weight None")


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to)))


def _by_group(
    input: Tensor, dims: int, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """scale and shift as (groups, columns), where each group is the same number of consecutive rows."""
    given = [m for m in (scale, shift) if m is not None]
    if not given:
        return None, None
    leading = input.dim() - dims
    aligned = [m.reshape((1,) * (input.dim() - m.dim()) + m.shape) for m in given]
    shared = leading  # how many of the leading dimensions, from the last back, all of them share
    while shared and all(m.shape[shared - 1] == 1 for m in aligned):
        shared -= 1
    groups, columns = math.prod(input.shape[:shared]), math.prod(input.shape[leading:])
    target = (*input.shape[:shared], *(1,) * (leading - shared), *input.shape[leading:])
    flat = iter([m.expand(target).reshape(groups, columns).contiguous() for m in aligned])
    return tuple(None if m is None else next(flat) for m in (scale, shift))  # type: ignore[return-value]


def _sizes(hidden: Tensor, dims: int, scale: Tensor | None, shift: Tensor | None) -> tuple[int, int, int]:
    """(groups, rows, columns)"""
    modulation = shift if scale is None else scale
    groups = 1 if modulation is None else modulation.shape[0]
    return groups, math.prod(hidden.shape[:-dims]), math.prod(hidden.shape[-dims:])


def _hidden(input: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float, dims: int) -> Tensor:
    if seed is None:
        return input if residual is None else input.float() + residual
    _, rows, columns = _sizes(input, dims, None, None)
    h = drop(input.reshape(rows, columns), seed, dropout_p, range(rows), columns).view(input.shape)
    return h if residual is None else h + residual


def _forward(
    input: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dims: int,
    eps: float,
    centered: bool,
    weight_offset: float,
    dropout_p: float,
    output_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with device_guard(input.device):
        return implementation("normalization", input.device).forward(
            input, residual, seed, weight, bias, scale, shift, *_sizes(input, dims, scale, shift),
            eps, centered, weight_offset, dropout_p, output_dtype, hidden_dtype,
        )  # fmt: skip


def _forward_fake(
    input: Tensor, residual: Tensor | None, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dims, _, centered, *_, output_dtype, hidden_dtype = rest[4:]
    rows = math.prod(input.shape[:-dims])
    return (
        input.new_empty(input.shape, dtype=output_dtype),
        input.new_empty(0 if residual is None and seed is None else input.shape, dtype=hidden_dtype),
        input.new_empty(rows if centered else 0, dtype=torch.float32),
        input.new_empty(rows, dtype=torch.float32),
    )


norm_op = define(
    "norm(Tensor input, Tensor? residual, Tensor? seed, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "int dims, float eps, bool centered, float weight_offset, float dropout_p, ScalarType output_dtype, ScalarType hidden_dtype) "
    "-> (Tensor output, Tensor hidden, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    input, residual, seed, *parameters, dims, eps, _, weight_offset, dropout_p, output_dtype, _ = arguments
    grad_output, grad_hidden = grad_outputs[:2]
    _, hidden, mean, rstd = outputs
    if residual is None and seed is None:
        hidden, grad_hidden = input, None
    if grad_output is None:
        grad_output = torch.zeros_like(input, dtype=output_dtype)
    grad, grad_input, *rest = call(
        norm_backward_op,
        grad_output, grad_hidden, hidden, seed, *parameters, mean, rstd, dims, eps, weight_offset, dropout_p,
        residual is not None, input.dtype, any(needs[3:7]),
    )  # fmt: skip
    separate = seed is not None or input.dtype != hidden.dtype
    grad_residual = None if residual is None else grad.to(residual.dtype)
    grads = [grad_input if separate else grad, grad_residual, None, *rest]
    return [g if need else None for g, need in zip(grads, needs)]


def _backward(
    grad_output: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    seed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    has_residual: bool,
    input_dtype: torch.dtype,
    needs_parameters: bool,
) -> tuple[Tensor, ...]:
    modulated = scale is not None or shift is not None
    dtypes = set() if modulated else {p.dtype for p in (weight, bias) if p is not None}
    sums_dtype = (dtypes.pop() if len(dtypes) == 1 else torch.float32) if needs_parameters else None
    with device_guard(hidden.device):
        grad, grad_input, a, b = implementation("normalization", hidden.device).backward(
            grad_output, grad_hidden, hidden, seed, weight, scale, mean, rstd, *_sizes(hidden, dims, scale, shift),
            weight_offset, dropout_p, has_residual, input_dtype, sums_dtype,
        )  # fmt: skip
    grads: list[Tensor | None] = [None] * 4
    if needs_parameters and modulated:  # A and B are (groups, columns)
        factor = 1.0 if scale is None else 1.0 + scale.float()
        gain = 1.0 if weight is None else weight.reshape(-1).float() + weight_offset
        offset = 0.0 if bias is None else bias.reshape(-1).float()
        grads = [(a * factor).sum(0), (b * factor).sum(0), a * gain + b * offset, b]
    elif needs_parameters:
        grads = [a, b, None, None]
    found = [
        None if p is None or g is None else g.view(p.shape).to(p.dtype)
        for p, g in zip((weight, bias, scale, shift), grads)
    ]
    return tensors_only(hidden, grad, grad_input, *found)


def _backward_fake(
    grad_output: Tensor, grad_hidden: Tensor | None, hidden: Tensor, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    parameters, (has_residual, input_dtype, needs_parameters) = rest[:4], rest[-3:]
    separate = seed is not None or input_dtype != hidden.dtype
    return (
        hidden.new_empty(hidden.shape if has_residual or not separate else 0),
        hidden.new_empty(hidden.shape if separate else 0, dtype=input_dtype),
        *(hidden.new_empty(0) if p is None or not needs_parameters else p.new_empty(p.shape) for p in parameters),
    )


norm_backward_op = define(
    "norm_backward(Tensor grad_output, Tensor? grad_hidden, Tensor hidden, Tensor? seed, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int dims, float eps, float weight_offset, "
    "float dropout_p, bool has_residual, ScalarType input_dtype, bool needs_parameters) -> (Tensor grad_hidden_stream, Tensor grad_input, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_scale, Tensor grad_shift)",
    _backward,
    _backward_fake,
)


def _second_gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    grad_output, grad_hidden, hidden, seed, *rest, needs_parameters = arguments
    parameters, (mean, _, dims, eps, weight_offset, dropout_p, _, _) = rest[:4], rest[4:]
    groups, rows, columns = _sizes(hidden, dims, *parameters[2:])

    def definition(
        h: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x_hat = normalise(h.reshape(groups, rows // max(groups, 1), columns), 1, eps, mean.numel() > 0)
        flat = [None if p is None else p.reshape(columns) for p in (weight, bias)]
        by_group = [None if p is None else p[:, None] for p in (scale, shift)]
        y = modulate(x_hat, flat[0], flat[1], by_group[0], by_group[1], weight_offset)
        return y.reshape(h.shape).to(grad_output.dtype), h

    of_hidden, of_input, *of_parameters = grad_outputs
    if of_input is not None:
        through = drop(of_input.reshape(rows, columns), seed, dropout_p, range(rows), columns)
        through = through.view(hidden.shape).to(hidden.dtype)
        of_hidden = through if of_hidden is None else of_hidden + through
    taken = [True, *(p is not None and needs_parameters for p in parameters)]
    of_grads, of_tensors = replay(
        definition, taken, (grad_output, grad_hidden), (hidden, *parameters), (of_hidden, *of_parameters)
    )
    of_hidden, *of_parameters = of_tensors
    return [*of_grads, of_hidden, None, *of_parameters]


differentiate(norm_op, _gradient, keep_outputs=(1, 2, 3))
differentiate(norm_backward_op, _second_gradient)


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options).arguments
    columns = math.prod(checked_shape(given["normalized_shape"]))
    kind, residual = given["input"].dtype, given.get("residual")
    mixed = residual is not None and (given.get("residual_dtype") or residual.dtype) != kind
    heavy = given.get("dropout_p", 0.0) > 0.0 or given.get("scale") is not None
    alone = function is layer_norm and residual is None and not heavy
    return implementation("normalization", given["input"].device).explain(columns, kind.itemsize, mixed, heavy, alone)
