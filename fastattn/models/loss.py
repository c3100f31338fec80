"""Cross entropy of a linear layer's outputs that never holds all the logits at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.ops import checks

# A chunk of 2^22 fp32 logits is 16 MiB: it stays below the size from which the C library maps fresh pages, page faults
# included, for every allocation. On a GPU larger chunks keep the matrix products busy.
LOGITS_PER_CHUNK = {"cpu": 2**22}
LOGITS_PER_CHUNK_GPU = 2**27


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight), target)`, computed a block of rows at a time.

    The gradients are computed in the same sweep, which saves both the memory for the logits and their recomputation:

        z = h Wᵀ,  loss = Σ_i (logsumexp(z_i) − z_i[t_i]) / n
        n·dz = softmax(z) − onehot(t),  dh = dz W,  dW = dzᵀ h

    Args:
        hidden: (rows, d_model), fp32, fp16 or bf16; under autocast the products are taken in autocast's dtype.
        weight: (vocab_size, d_model).
        target: (rows,) int64, in [0, vocab_size), or `ignore_index` for a row that does not count.
        ignore_index: the label to leave out.

    Returns:
        The mean over the n rows that count, fp32 scalar; NaN where none does, as in PyTorch. It can be differentiated
        once.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, target, ignore_index, with_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, with_grad: bool) -> Tensor:
        h, w = (tensor for tensor in checks.autocast(hidden, weight) if tensor is not None)
        counts = target != ignore_index
        n = counts.sum()
        index = torch.where(counts, target, 0)[:, None]
        counted = counts.to(h.dtype)[:, None]
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        if with_grad:
            n_dh = torch.empty_like(hidden)
            n_dw = torch.zeros_like(weight, dtype=torch.float32)
        rows = max(1, LOGITS_PER_CHUNK.get(h.device.type, LOGITS_PER_CHUNK_GPU) // len(w))
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), rows):
                chunk = slice(start, start + rows)
                log_p = F.log_softmax(h[chunk] @ w.t(), dim=-1, dtype=torch.float32)  # [rows, vocab_size]
                loss -= (log_p.gather(1, index[chunk]) * counted[chunk]).sum()
                if not with_grad:
                    continue
                minus_one = log_p.new_full((1, 1), -1.0).expand(len(log_p), 1)
                n_dz = log_p.exp_().scatter_add_(1, index[chunk], minus_one).to(h.dtype)
                n_dh[chunk] = (n_dz @ w) * counted[chunk]
                counted_h = h[chunk] * counted[chunk]
                if h.dtype == torch.float32:
                    n_dw.addmm_(n_dz.t(), counted_h)
                else:
                    n_dw += n_dz.t() @ counted_h
        if with_grad:
            ctx.save_for_backward(n_dh, n_dw, n)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        n_dh, n_dw, n = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        scale = d_loss / n
        d_hidden = n_dh * scale if needs_hidden else None
        d_weight = n_dw * scale if needs_weight else None
        return d_hidden, d_weight, None, None, None
