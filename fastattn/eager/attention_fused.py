"""PyTorch's fused attention of the CPU, and how a call of ours becomes a few calls of it.

What the kernel lacks (window, ALiBi, a mask of blocks) reaches it as the additive mask of a block of rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.block_mask import BLOCK, Blocks, hulls
from fastattn.eager import attention_products
from fastattn.eager.products import emulates, has_tiles
from fastattn.eager.row_block import RowBlock
from fastattn.layout import shared_planes

# Rows of a fused block: few skip more columns, from 768 on PyTorch's kernels have larger tiles. `_SLOWER`: what a pair takes below,
# in fp32 and in 16 bits (`python -m bench.report attention`).
_FEW_ROWS, _MANY_ROWS = 256, 768
_SLOWER = {"forward": (1.15, 1.13), "backward": (1.1, 1.45)}
_ADDITIVE = 1 << 22  # numbers of a block's additive mask where it could have fewer rows

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, additive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of PyTorch's fused kernel. Shapes as below."""
    if is_causal or not slow_alone(query):  # (a causal row sees the first key alone, two would see more)
        return _fused(query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale)
    twice = None if additive is None else additive.expand(-1, -1, 2, -1)
    if 1 in query.stride()[:3]:  # of a dimension of size 1: PyTorch's output would lie like the query, but not in rows
        query = query.clone(memory_format=torch.contiguous_format)
    out, lse = _fused(query.expand(-1, -1, 2, -1), key, value, 0.0, False, attn_mask=twice, scale=scale)
    return out[:, :, :1], lse[:, :, :1]


def slow_alone(query: Tensor) -> bool:
    """Whether a single row takes longer than two: in bf16 on CPUs without tiles, whose products of one row are slow."""
    return query.shape[2] == 1 and query.dtype == torch.bfloat16 and faster_in_fp32(query.dtype)


def faster_in_fp32(dtype: torch.dtype) -> bool:
    """Whether a row takes less time with keys and values that are fp32 already."""
    return emulates(dtype) or (dtype == torch.bfloat16 and not has_tiles())


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    additive: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of what PyTorch's fused kernel does, by its own backward or a faster one.

    lse: fp32 (B, Hq, Nq), finite; additive: (B or 1, Hq or 1, Nq, Nk), or None.
    """
    by_key = additive is None or (additive.shape[1] == 1 and additive.stride(2) == 0)
    if by_key and attention_products.fits(query, key, value):
        key_bias = None if additive is None else additive[:, :, :1]
        return attention_products.backward(grad_out, query, key, value, out, lse, is_causal, scale, key_bias)
    small = not has_tiles() and attention_products.is_small(query, key)
    if query.dtype == torch.bfloat16 and (small or emulates(query.dtype)):
        wide = (t.float() for t in (grad_out, query, key, value, out))
        mask = None if additive is None else additive.float()
        grads = _fused_backward(*wide, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
        return tuple(grad.to(query.dtype) for grad in grads)
    return _fused_backward(grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=additive, scale=scale)


def concrete(whole: RowBlock, is_cpu: bool) -> RowBlock:
    """The whole, with what a dense mask's values tell: for launchers, which are never inside a transform. (A GPU would wait for it.)"""
    if not is_cpu or whole.rules.mask is None or isinstance(whole.rules.mask, Blocks):
        return replace(whole, concrete=is_cpu)
    mask = shared_planes(whole.rules.mask)
    whole = replace(whole, rules=whole.rules._replace(mask=mask), concrete=True)
    if mask.shape[2] < _MANY_ROWS or mask.shape[3] == 1 or mask.numel() == 0:
        return whole
    # (`any` takes 30 times as long as `amax`)
    strips, rows = mask.view(torch.uint8), mask.shape[2] // BLOCK * BLOCK
    seen = [strips[:, :, :rows].view(*mask.shape[:2], -1, BLOCK, mask.shape[3]).amax(3).amax((0, 1))] if rows else []
    seen += [strips[:, :, rows:].amax(2).amax((0, 1))[None]] if rows < mask.shape[2] else []
    return replace(whole, hulls=hulls(torch.cat(seen) != 0, 1))


def blocks_of(
    query: Tensor, key: Tensor, value: Tensor, whole: RowBlock, backward: bool = False
) -> list[RowBlock] | None:
    """The blocks of rows with which PyTorch's fused kernel does the job, or None where it cannot."""
    if (
        query.device.type != "cpu"
        or whole.rules.softcap
        or whole.rules.seed is not None
        or query.shape[3] != value.shape[3]
    ):
        return None
    bounded = whole.rules.window_left is not None or whole.rules.window_right is not None
    if whole.rules.alibi_slopes is None and not _varies(whole.rules.mask):
        if not bounded and not _varies(whole.rules.bias):
            return [whole]
        # (PyTorch's own causal mask starts at the top left, and multiplies -inf by the scale, which must therefore be positive)
        top_left = whole.rules.window_left is None and whole.rules.window_right == -whole.shift
        if top_left and whole.rules.scale > 0.0:
            return [replace(whole, is_causal=True)]
    if whole.rules.mask is None and whole.rules.bias is None:
        whole = replace(whole, mirrored=True, floor=_floor(query, key, whole))
    most = max(_FEW_ROWS, _most_rows(whole))
    if not whole.hulls and not bounded:
        return [whole] if most >= len(whole.rows) else list(whole.split(most))
    few = _SLOWER["backward" if backward else "forward"][query.dtype != torch.float32]

    def cost(size: int) -> float:
        pairs = sum(len(rows) * len(whole.columns_for(rows)) for rows in whole.strips(size))
        return pairs * (few if size < _MANY_ROWS <= len(whole.rows) else 1.0)

    return list(whole.split(min(sorted({_FEW_ROWS, _MANY_ROWS, most}, reverse=True), key=cost)))


def _varies(pair: Tensor | Blocks | None) -> bool:
    """Whether a mask or bias differs from row to row."""
    return isinstance(pair, Blocks) or (pair is not None and pair.shape[2] != 1)


def _most_rows(block: RowBlock) -> int:
    """Rows whose additive mask does not take more than `_ADDITIVE` numbers."""
    if block.mirrored or (block.rules.mask is None and block.rules.alibi_slopes is None):
        return len(block.rows)  # one vector, or a bias that is there already
    planes = [1, 1]
    for pair in (block.rules.mask, block.rules.bias, block.rules.alibi_slopes):
        shape = pair.kinds.shape if isinstance(pair, Blocks) else () if pair is None else pair.shape
        planes = [max(sizes) for sizes in zip(planes, (*shape[:2], 1, 1))]
    return _ADDITIVE // (planes[0] * planes[1] * len(block.columns))


def _floor(query: Tensor, key: Tensor, block: RowBlock) -> float:
    """ALiBi below which a key's weight is less than e^-40 of its row's, where every row sees the key at its own position.

    |scale·q kᵀ| <= c = |scale| max‖q‖ max‖k‖, so that the key at distance 0 has a score of -c at least, and one with ALiBi
    below -2c - 40 has less than -c - 40. Such weights change no digit of a sum, but as denormal numbers they make the products
    of the backward 3 times slower.
    """
    if (
        block.rules.alibi_slopes is None
        or block.shift < 0
        or (block.rules.window_right is not None and block.rules.window_right < 0)
    ):
        return -math.inf
    q, k = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (query, key))
    return -2.0 * abs(block.rules.scale) * float(q * k) - 40.0


def additive_mask(block: RowBlock, query: Tensor) -> Tensor | None:
    """The additive mask of a block in the fused kernel's form: 4 dimensions, whole in the last two."""
    if block.mirrored:
        return block.by_distance(query.device)
    additive = block.additive(query.device, query.dtype)
    if additive is None:
        return None
    if additive.dtype != query.dtype:  # the two dtypes that the kernel reads: the query's and fp32
        additive = additive.float()
    additive = additive.view((1,) * (4 - additive.dim()) + additive.shape)
    return additive.expand(-1, -1, len(block.rows), len(block.columns))


def as_stored(blocks: list[RowBlock], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value (or their gradients, back again) in the order that the blocks expect."""
    return (key.flip(2), value.flip(2)) if blocks[0].mirrored else (key, value)


def better_in_fp32(query: Tensor) -> bool:
    """fp16 on CPUs without products of it: PyTorch's kernels take 1.4 times as long as in fp32, with backward 5 times and more."""
    return query.dtype == torch.float16 and query.is_cpu and emulates(torch.float16)


def block_forward(query: Tensor, key: Tensor, value: Tensor, block: RowBlock) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block, whose rows and columns these are."""
    additive = additive_mask(block, query)
    out, lse = forward(query, key, value, block.is_causal, block.rules.scale, additive)
    if additive is None:
        return out, lse
    if block.is_causal and block.rules.bias is not None and lse.isnan().any():
        # PyTorch adds the bias to a hidden pair's -inf, which is NaN where the bias is NaN or infinite (its backward does not)
        return block_forward(query, key, value, replace(block, is_causal=False))
    return _mended(out, lse, additive, block.is_causal)


def block_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, block: RowBlock
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a block, whose rows and columns these are; lse is finite."""
    additive = additive_mask(block, query)
    return backward(grad_out, query, key, value, out, lse, block.is_causal, block.rules.scale, additive)


def _mended(out: Tensor, lse: Tensor, additive: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block, where a row that sees nothing has 0 and -inf whatever its query is."""
    # (the fused kernel says 0 for such a row, or NaN where the query does)
    if bool((lse.abs() > 0.0).all()):
        return out, lse
    additive = additive[:, :, :1] if additive.stride(2) == 0 else additive  # one row, where all are the same
    blind = additive.amax(-1) == float("-inf")
    if is_causal:
        first_shown = (additive != float("-inf")).view(torch.int8).argmax(-1)
        blind = blind | (first_shown > torch.arange(lse.shape[2]))
    unknown = lse.isnan()
    blind = blind & ((lse == 0.0) | unknown)
    if unknown.any():
        out = out.masked_fill(blind[..., None], 0.0)
    return out, lse.masked_fill(blind, float("-inf"))
