"""Plain norms on the CPU, where they are PyTorch's own, with the gradients of 16-bit parameters put right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import checks
from fastattn.backend import eager_on_cpu
from fastattn.eager.normalization import BLOCK_NUMBERS, sums_over_rows
from fastattn.ops.library import call, observed


def layer_norm_by_torch(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Plain layer norm on the CPU, which is one call of PyTorch's; None where it is not, or where the arguments are wrong.

    The way through checks and dispatch shows in calls of a few milliseconds, after a kernel that swept the caches.
    """
    if torch.compiler.is_compiling() or not isinstance(input, Tensor) or not input.is_cpu:
        return None
    if not eager_on_cpu():
        return None
    dtype = input.dtype
    if weight is not None and bias is not None and getattr(weight, "dtype", None) is not getattr(bias, "dtype", None):
        return None
    given = weight if bias is None else bias
    if given is not None and getattr(given, "dtype", None) not in (dtype, torch.float32):
        return None
    if weight is None and bias is not None:  # PyTorch's gradient cannot be differentiated again
        return None
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    try:
        if dtype is torch.float32:
            return torch.layer_norm(input, shape, weight, bias, eps)
        if dtype not in checks.FLOAT_DTYPES or observed((input,)):
            return None
        if weight is None or not (
            torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        ):
            return torch.layer_norm(input, shape, weight, bias, eps)
        return None if bias is None else CpuLayerNorm.apply(input, shape, weight, bias, eps)
    except (RuntimeError, TypeError):
        return None  # the checks of the long way name the argument


def rms_norm_by_torch(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, eps: float
) -> Tensor | None:
    """Plain RMS norm of few numbers on the CPU without a gradient, as one call of PyTorch's, which takes several passes in a third
    of the time of our dispatch; None elsewhere, or where the arguments are wrong."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or not input.is_cpu:
        return None
    if not eager_on_cpu() or observed((input, weight)):
        return None
    if input.dtype not in checks.FLOAT_DTYPES or input.numel() > BLOCK_NUMBERS:
        return None
    if weight is not None and (getattr(weight, "dtype", None) is not input.dtype or not weight.is_cpu):
        return None
    if torch.is_grad_enabled() and (input.requires_grad or (weight is not None and weight.requires_grad)):
        return None
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    try:
        return torch.rms_norm(input, shape, weight, eps)
    except (RuntimeError, TypeError):
        return None  # the checks of the long way name the argument


class CpuLayerNorm(torch.autograd.Function):
    """PyTorch's layer norm of 16-bit rows on the CPU, with the right gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        gain = weight.float()  # fp32 parameters make PyTorch keep fp32 statistics
        output, mean, rstd = torch.native_layer_norm(input, shape, gain, bias.float(), eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.gain, ctx.eps = gain, eps
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is going to be differentiated
            grad, _, grad_weight, grad_bias, _, _ = call(
                torch.ops.fastattn.norm_backward.default, grad_output, None, input, None, weight, bias, None, None,
                mean.view(-1), rstd.view(-1), weight.dim(), ctx.eps, 0.0, 0.0, False, input.dtype, True,
            )  # fmt: skip
            return grad, None, grad_weight, grad_bias, None
        gain, means, rstds = ctx.gain, mean.view(-1), rstd.view(-1)
        if input.dim() == 2 and gain.dim() == 1:  # the sums first: the gradient gets the memory that they took
            a, b = sums_over_rows(grad_output, input, gain, means, rstds, weight.dtype)
        else:
            rows = len(rstds), gain.numel()
            flat = grad_output.reshape(rows), input.reshape(rows), gain.reshape(-1)
            sums = sums_over_rows(*flat, means, rstds, weight.dtype)
            a, b = (x.view(gain.shape) for x in sums)
        grad = torch.ops.aten.native_layer_norm_backward.default(
            grad_output, input, gain.shape, mean, rstd, gain, gain, [True, False, False]
        )[0]
        return grad, None, a, b, None  # autograd casts them to the parameters' dtype, without the way through Python
