"""Attention in PyTorch: the CPU backend, and the definition behind transforms and double backward.

Query rows are independent of each other, so everything here walks over blocks of rows: memory grows with N, not with N².
A block is done in one of two ways:

* PyTorch's fused CPU attention, with what it lacks (window, ALiBi, mask, bias) as the additive mask of one block, or with
  no mask where the block needs none;
* matrix products, for what the fused kernel cannot do: softcap, dropout, gradients of the LSE or of the bias, Dv ≠ D.

`_logits` is the one definition of a score. Formulas: fastattn/kernels/attention_backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import BLOCK, Blocks, hulls
from fastattn.eager import attention_products
from fastattn.eager.exponential import exp, exp_
from fastattn.eager.products import has_tiles, onednn_takes
from fastattn.eager.random import keep
from fastattn.layout import as_gradient, as_output, new_gradient, new_output, shared_planes
from fastattn.replay import replay

# Rows of a fused block: few skip more columns, from 768 on PyTorch's kernels have larger tiles. `_SLOWER`: what a pair takes below,
# in fp32 and in 16 bits (`python -m bench.report attention`).
_FEW_ROWS, _MANY_ROWS = 256, 768
_SLOWER = {"forward": (1.15, 1.13), "backward": (1.1, 1.45)}
_ADDITIVE = 1 << 22  # numbers of a block's additive mask where it could have fewer rows
# of a dtype: the integers of its size, and how far left of -1 the bits of -inf begin
_MINUS_INFINITY = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7), torch.float16: (torch.int16, 10)}
_BLOCK_SCORES = 1 << 20  # scores of one block of matrix products: 4 MiB of fp32

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fused_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, additive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of PyTorch's fused kernel. Shapes as below."""
    if not slow_alone(query):
        return _fused(query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale)
    twice = None if additive is None else additive.expand(-1, -1, 2, -1)
    out, lse = _fused(query.expand(-1, -1, 2, -1), key, value, 0.0, False, attn_mask=twice, scale=scale)
    return out[:, :, :1], lse[:, :, :1]


def slow_alone(query: Tensor) -> bool:
    """Whether a single row takes longer than two: in bf16 on CPUs without tiles, whose products of one row are slow."""
    return query.shape[2] == 1 and query.dtype == torch.bfloat16 and faster_in_fp32(query.dtype)


def faster_in_fp32(dtype: torch.dtype) -> bool:
    """Whether a row takes less time with keys and values that are fp32 already."""
    return (dtype == torch.bfloat16 and not has_tiles()) or (dtype == torch.float16 and not onednn_takes(dtype))


def fused_backward(
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
    if query.dtype == torch.bfloat16 and not has_tiles() and attention_products.is_small(query, key):
        wide = (t.float() for t in (grad_out, query, key, value, out))
        mask = None if additive is None else additive.float()
        grads = _fused_backward(*wide, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
        return tuple(grad.to(query.dtype) for grad in grads)
    return _fused_backward(grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=additive, scale=scale)


@dataclass(frozen=True)
class Block:
    """Some query rows, the key columns that they see, and what decides their scores."""

    mask: Tensor | Blocks | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    window_left: int | None
    window_right: int | None
    softcap: float
    dropout_p: float
    rows: range
    columns: range
    shift: int  # Nk - Nq: row i stands at column i + shift
    num_keys: int
    first_batch: int = 0  # batch index of the first sample, for dropout's choice
    mirrored: bool = False  # keys and values are given last first
    floor: float = -math.inf  # ALiBi below it hides a key, whose weight would be lost in rounding
    concrete: bool = False  # not inside a transform
    hulls: tuple[range, ...] = ()  # the columns outside of which each 128 rows see nothing, where the mask tells

    def columns_for(self, rows: range) -> range:
        """The columns outside of which these rows see nothing; never empty."""
        low, high = self.columns.start, self.columns.stop
        if self.window_left is not None:
            low = min(max(rows.start + self.shift - self.window_left, low), high - 1)
        if self.window_right is not None:
            high = max(min(rows.stop + self.shift + self.window_right, high), low + 1)
        if self.hulls:
            seen = self.hulls[rows.start // BLOCK : -(-rows.stop // BLOCK)]
            low = min(max(min(hull.start for hull in seen), low), high - 1)
            high = max(min(max(hull.stop for hull in seen), high), low + 1)
        return range(low, high)

    def narrow(self, rows: range) -> Block:
        """The block of these rows: fewer columns where window or mask allow, mask and bias cut to size."""
        columns = self.columns_for(rows)
        cut = [_cut(pair, rows, columns) for pair in (self.mask, self.bias)]
        return replace(self, mask=cut[0], bias=cut[1], rows=rows, columns=columns)

    def strips(self, size: int) -> Iterator[range]:
        return (range(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size))

    def split(self, size: int) -> Iterator[Block]:
        return map(self.narrow, self.strips(size))

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, 1) and (columns,): where rows and columns stand."""
        i = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None] + self.shift
        return i, torch.arange(self.columns.start, self.columns.stop, device=device)

    def hidden(self, device: torch.device) -> Tensor | None:
        """bool, broadcastable to (B, Hq, rows, columns): True = invisible. None where all is visible."""
        hidden = None
        first, last = self.rows.start + self.shift, self.rows.stop - 1 + self.shift
        if self.window_right is not None and self.columns.stop - 1 > first + self.window_right:
            i, j = self.positions(device)
            hidden = j > i + self.window_right
        if self.window_left is not None and self.columns.start < last - self.window_left:
            i, j = self.positions(device)
            before = j < i - self.window_left
            hidden = before if hidden is None else hidden | before
        if self.mask is not None:
            assert isinstance(self.mask, Tensor)  # `narrow` has cut it
            hidden = ~self.mask if hidden is None else hidden | ~self.mask
        return hidden

    def additive(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Broadcastable to (B, Hq, rows, columns): bias and ALiBi, -inf where invisible. None = nothing to add.

        fp32, or the bias's dtype where there is no ALiBi: those are its very numbers, to be added in fp32. A mask alone, which
        is 0 and -inf, may come in `dtype`.
        """
        total = self.bias
        if self.alibi_slopes is not None:
            i, j = self.positions(device)
            alibi = -self.alibi_slopes[..., None, None] * (i - j).abs()
            total = alibi if total is None else total + alibi
        if total is not None and self.concrete:
            return self._hiding(total)
        hidden = self.hidden(device)
        if hidden is None:
            return total
        if self.concrete:  # a tenth of the time of filling
            integer, shift = _MINUS_INFINITY[dtype]
            return hidden.view(torch.int8).neg().to(integer).bitwise_left_shift_(shift).view(dtype)
        total = hidden.new_zeros((), dtype=torch.float32) if total is None else total
        return torch.where(hidden, float("-inf"), total)

    def _hiding(self, total: Tensor) -> Tensor:
        """`total` with -inf where invisible. Only the columns that a side of the window crosses are looked at for it."""
        rows, columns, mask = len(self.rows), len(self.columns), self.mask
        first, last = (row + self.shift - self.columns.start for row in (self.rows.start, self.rows.stop - 1))
        start = columns if self.window_right is None else max(first + self.window_right + 1, 0)
        stop = 0 if self.window_left is None else min(last - self.window_left, columns)
        if start >= columns and stop <= 0 and mask is None:
            return total
        assert not isinstance(mask, Blocks)  # `narrow` has cut it
        shape = torch.broadcast_shapes(total.shape, (1,) if mask is None else mask.shape, (rows, columns))
        out = total.expand(shape).clone(memory_format=torch.contiguous_format)
        if mask is not None:
            out.masked_fill_(~mask, -math.inf)
        if start < columns:
            crossed, diagonal = out[..., start:], first + (self.window_right or 0) - start
            crossed.tril_(diagonal).add_(crossed.new_full(crossed.shape[-2:], -math.inf).triu_(diagonal + 1))
        if stop > 0:
            crossed, diagonal = out[..., :stop], first - (self.window_left or 0)
            crossed.triu_(diagonal).add_(crossed.new_full(crossed.shape[-2:], -math.inf).tril_(diagonal - 1))
        return out

    def by_distance(self, device: torch.device) -> Tensor | None:
        """`additive` of a mirrored block, (B or 1, Hq or 1, rows, columns), without a mask or bias; None = nothing to add.

        It depends on i - j alone. Where the columns run backwards, that is the sum of the indices (a, b) of row and column
        in the block and a constant, so the whole matrix is one vector of rows + columns numbers, read with stride 1 both
        ways. (PyTorch knows no negative strides.)
        """
        rows, columns = len(self.rows), len(self.columns)
        first, last = self.rows.start + self.shift, self.rows.stop - 1 + self.shift
        left, right = self.window_left, self.window_right
        cut_left = left is not None and self.columns.start < last - left
        cut_right = right is not None and self.columns.stop - 1 > first + right
        if self.alibi_slopes is None and not cut_left and not cut_right:
            return None
        distance = torch.arange(rows + columns - 1, device=device) + (first - self.columns.stop + 1)
        if self.alibi_slopes is None:
            vector = torch.zeros(1, 1, len(distance), dtype=torch.float32, device=device)
        else:
            vector = -self.alibi_slopes[..., None] * distance.abs()
            vector.masked_fill_(vector < self.floor, float("-inf"))
        if left is not None:
            vector.masked_fill_(distance > left, float("-inf"))
        if right is not None:
            vector.masked_fill_(distance < -right, float("-inf"))
        return vector.as_strided((*vector.shape[:2], rows, columns), (*vector.stride()[:2], 1, 1))

    def dropout_factors(self, like: Tensor) -> Tensor | None:
        """fp32, the shape of `like` (B, Hq, rows, columns): 0 or 1 / (1 - p). None without dropout."""
        if self.seed is None:
            return None
        b = torch.arange(like.shape[0], device=like.device)[:, None, None, None] + self.first_batch
        h = torch.arange(like.shape[1], device=like.device)[:, None, None]
        i = torch.arange(self.rows.start, self.rows.stop, device=like.device)[:, None]
        return keep(self.seed, b, h, i, self.columns, self.dropout_p).float() / (1.0 - self.dropout_p)

    @property
    def far(self) -> bool:
        """Whether many scores may lie so far below their row's largest that exp underflows."""
        return not (self.mask is self.bias is self.alibi_slopes is None)

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The block's rows of (B, H, Nq, ...)."""
        return tensor if tensor.shape[2] == len(self.rows) else tensor[:, :, self.rows.start : self.rows.stop]

    def of_columns(self, tensor: Tensor) -> Tensor:
        """The block's columns of (B, H, Nk, ...)."""
        start, stop = self.columns.start, self.columns.stop
        if self.mirrored:
            start, stop = self.num_keys - stop, self.num_keys - start
        return tensor if tensor.shape[2] == stop - start else tensor[:, :, start:stop]


def _cut(pair: Tensor | Blocks | None, rows: range, columns: range) -> Tensor | None:
    """The block of a mask or bias (B or 1, H or 1, Nq or 1, Nk or 1). None = nothing to mask or add."""
    if pair is None:
        return None
    if isinstance(pair, Blocks):
        return pair.dense(rows, columns)
    if pair.shape[2] != 1:
        pair = pair[:, :, rows.start : rows.stop]
    return pair if pair.shape[3] == 1 else pair[..., columns.start : columns.stop]


def _concrete(whole: Block, is_cpu: bool) -> Block:
    """The whole, with what a dense mask's values tell: for launchers, which are never inside a transform. (A GPU would wait for it.)"""
    if not is_cpu or whole.mask is None or isinstance(whole.mask, Blocks):
        return replace(whole, concrete=is_cpu)
    mask = shared_planes(whole.mask)
    whole = replace(whole, mask=mask, concrete=True)
    if mask.shape[2] < _MANY_ROWS or mask.shape[3] == 1 or mask.numel() == 0:
        return whole
    # (`any` takes 30 times as long as `amax`)
    strips, rows = mask.view(torch.uint8), mask.shape[2] // BLOCK * BLOCK
    seen = [strips[:, :, :rows].view(*mask.shape[:2], -1, BLOCK, mask.shape[3]).amax(3).amax((0, 1))] if rows else []
    seen += [strips[:, :, rows:].amax(2).amax((0, 1))[None]] if rows < mask.shape[2] else []
    return replace(whole, hulls=hulls(torch.cat(seen) != 0, 1))


def _logits(q: Tensor, k: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
    """(logits, t), fp32 (B, Hq, rows, columns): softcap·t + bias + ALiBi, -inf where invisible, t = tanh(scale·q kᵀ / softcap).

    Without softcap its part is scale·q kᵀ, and t is None. q (B, Hq, rows, D) and k (B, Hkv, columns, D) are the block's, fp32.
    """
    scaled = q * (block.scale / block.softcap if block.softcap else block.scale)
    s = (_grouped(scaled, k) @ k.transpose(-1, -2)).reshape(*q.shape[:3], k.shape[2])
    additive = block.additive(q.device)
    t = torch.tanh(s) if block.softcap else None
    s = s if t is None else t * block.softcap if additive is None else t
    if additive is None:
        return s, t
    total = torch.add(additive, s, alpha=block.softcap or 1.0)
    # (NaN - inf is NaN: `forward` asks again, not concrete, where it finds one)
    return (total if block.concrete else torch.where(additive == float("-inf"), additive, total)), t


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    """(B, Hq, n, m) → (B, Hkv, Hq / Hkv · n, m): the rows of all query heads that share a key head, one below the other."""
    return x.reshape(x.shape[0], kv.shape[1], x.shape[1] // kv.shape[1] * x.shape[2], x.shape[3])


def block_weights(q: Tensor, k: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(P·l after dropout, l, lse) of one block, differentiable: P = exp(S - m) / l; l is 1 for a row that sees nothing."""
    s, _ = _logits(q.float(), k.float(), block)
    m = s.detach().amax(-1, keepdim=True)
    if block.sinks is not None:
        sink = block.sinks.float()[:, None, None]
        m = torch.maximum(m, sink.detach())
    m = m.masked_fill(m == float("-inf"), 0.0)
    p = exp(s - m, block.far)
    l = p.sum(-1, keepdim=True)
    if block.sinks is not None:
        l = l + torch.exp(sink - m)
    dead = l == 0
    l = l.masked_fill(dead, 1.0)
    lse = (m + torch.log(l)).masked_fill(dead, float("-inf")).squeeze(-1)
    z = block.dropout_factors(p)
    return p if z is None else p * z, l, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block, differentiable by any of torch's means. q, k, v are the block's, any dtype."""
    p, l, lse = block_weights(q, k, block)
    out = (_grouped(p, v) @ v.float()).reshape(*q.shape[:3], v.shape[3]) / l
    return out.to(q.dtype), lse


def _nothing(query: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) where there are no queries or no keys."""
    zero = query[..., :0].sum(-1)  # of no number: `* 0` would be NaN where the sum is not finite
    lse = zero.float() + (float("-inf") if sinks is None else sinks.float()[:, None])
    return zero[..., None].expand(*query.shape[:3], value.shape[3]), lse


def _mended(out: Tensor, lse: Tensor, additive: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block, where a row that sees nothing has 0 and -inf whatever its query is."""
    # (the fused kernel says 0 for such a row, or NaN where the query does)
    if additive is None or bool((lse.abs() > 0.0).all()):
        return out, lse
    unknown = lse.isnan()
    blind = (additive.amax(-1) == float("-inf")) & ((lse == 0.0) | unknown)
    if unknown.any():
        out = out.masked_fill(blind[..., None], 0.0)
    return out, lse.masked_fill(blind, float("-inf"))


def whole_block(
    query: Tensor, key: Tensor, mask: Tensor | Blocks | None, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, scale: float, window_left: int | None, window_right: int | None,
    softcap: float, dropout_p: float, first_batch: int = 0,
) -> Block:  # fmt: skip
    n, nk = query.shape[2], key.shape[2]
    return Block(
        mask, bias, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p, range(n), range(nk), nk - n, nk,
        first_batch, hulls=mask.hulls() if isinstance(mask, Blocks) else (),
    )  # fmt: skip


def product_rows(query: Tensor, key: Tensor) -> int:
    """Rows of a block of matrix products."""
    return max(16, _BLOCK_SCORES // max(1, query.shape[0] * query.shape[1] * key.shape[2]) // 16 * 16)


def definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Blocks | None, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, scale: float, window_left: int | None, window_right: int | None,
    softcap: float, dropout_p: float, first_batch: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) by plain differentiable PyTorch: what transforms and forward-mode AD run through."""
    if 0 in (query.shape[2], key.shape[2]):
        return _nothing(query, value, sinks)
    whole = whole_block(
        query, key, mask, bias, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p,
        first_batch,
    )  # fmt: skip
    parts = [
        _attend(b.of_rows(query), b.of_columns(key), b.of_columns(value), b)
        for b in whole.split(product_rows(query, key))
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _fused_blocks(
    query: Tensor, key: Tensor, value: Tensor, whole: Block, backward: bool = False
) -> tuple[list[Block], bool] | None:
    """How PyTorch's fused kernel does the job: (blocks of rows, its own is_causal), or None where it cannot."""
    if query.device.type != "cpu" or whole.softcap or whole.seed is not None or query.shape[3] != value.shape[3]:
        return None
    varies = [isinstance(p, Blocks) or (p is not None and p.shape[2] != 1) for p in (whole.mask, whole.bias)]
    if whole.alibi_slopes is None and not any(varies):
        if whole.window_left is None and whole.window_right is None:
            return [whole], False
        plain = whole.mask is None and whole.bias is None and whole.window_left is None
        # (PyTorch's own causal mask starts at the top left, and multiplies -inf by the scale, which must therefore be positive)
        if plain and whole.window_right == -whole.shift and whole.scale > 0.0:
            return [whole], True
    if whole.mask is None and whole.bias is None:
        whole = replace(whole, mirrored=True, floor=_floor(query, key, whole))
    most = max(_FEW_ROWS, _most_rows(whole))
    if not whole.hulls and whole.window_left is None and whole.window_right is None:
        return [whole] if most >= len(whole.rows) else list(whole.split(most)), False
    few = _SLOWER["backward" if backward else "forward"][query.dtype != torch.float32]

    def cost(size: int) -> float:
        pairs = sum(len(rows) * len(whole.columns_for(rows)) for rows in whole.strips(size))
        return pairs * (few if size < _MANY_ROWS <= len(whole.rows) else 1.0)

    return list(whole.split(min(sorted({_FEW_ROWS, _MANY_ROWS, most}, reverse=True), key=cost))), False


def _most_rows(block: Block) -> int:
    """Rows whose additive mask does not take more than `_ADDITIVE` numbers."""
    if block.mirrored or (block.mask is None and block.alibi_slopes is None):
        return len(block.rows)  # one vector, or a bias that is there already
    planes = [1, 1]
    for pair in (block.mask, block.bias, block.alibi_slopes):
        shape = pair.kinds.shape if isinstance(pair, Blocks) else () if pair is None else pair.shape
        planes = [max(sizes) for sizes in zip(planes, (*shape[:2], 1, 1))]
    return _ADDITIVE // (planes[0] * planes[1] * len(block.columns))


def _floor(query: Tensor, key: Tensor, block: Block) -> float:
    """ALiBi below which a key's weight is less than e^-40 of its row's, where every row sees the key at its own position.

    |scale·q kᵀ| <= c = |scale| max‖q‖ max‖k‖, so that the key at distance 0 has a score of -c at least, and one with ALiBi
    below -2c - 40 has less than -c - 40. Such weights change no digit of a sum, but as denormal numbers they make the products
    of the backward 3 times slower.
    """
    if block.alibi_slopes is None or block.shift < 0 or (block.window_right is not None and block.window_right < 0):
        return -math.inf
    q, k = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (query, key))
    return -2.0 * abs(block.scale) * float(q * k) - 40.0


def _fused_mask(block: Block, is_causal: bool, query: Tensor) -> Tensor | None:
    """The additive mask of a block in the fused kernel's form: 4 dimensions, whole in the last two."""
    if block.mirrored:
        return block.by_distance(query.device)
    additive = None if is_causal else block.additive(query.device, query.dtype)
    if additive is None:
        return None
    if additive.dtype != query.dtype:  # the two dtypes that the kernel reads: the query's and fp32
        additive = additive.float()
    additive = additive.view((1,) * (4 - additive.dim()) + additive.shape)
    return additive.expand(-1, -1, len(block.rows), len(block.columns))


def _as_stored(blocks: list[Block], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value (or their gradients, back again) in the order that the blocks expect."""
    return (key.flip(2), value.flip(2)) if blocks[0].mirrored else (key, value)


def _better_in_fp32(query: Tensor) -> bool:
    """fp16 on CPUs without products of it: PyTorch's kernels take 1.4 times as long as in fp32, with backward 5 times and more."""
    return query.dtype == torch.float16 and query.is_cpu and faster_in_fp32(torch.float16)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Blocks | None, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, scale: float, window_left: int | None, window_right: int | None,
    softcap: float, dropout_p: float, precision: str, first_batch: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). Shapes as in `fastattn.ops.attention`; `precision` is torch's own setting here."""
    if 0 in (query.shape[2], key.shape[2]) or query.numel() == 0:
        out, lse = _nothing(query, value, sinks)
        return as_output(out, query), lse.contiguous()
    if _better_in_fp32(query):
        out, lse = forward(
            query.float(), key.float(), value.float(), mask, bias, alibi_slopes, sinks, seed, scale, window_left,
            window_right, softcap, dropout_p, precision, first_batch,
        )  # fmt: skip
        return as_output(out.to(query.dtype), query), lse
    whole = whole_block(
        query, key, mask, bias, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p,
        first_batch,
    )  # fmt: skip
    whole = _concrete(whole, query.is_cpu)
    fused = _fused_blocks(query, key, value, whole)
    if fused is None:
        blocks, is_causal = list(whole.split(product_rows(query, key))), False
    else:
        blocks, is_causal = fused
        key, value = _as_stored(blocks, key, value)
    parts = []
    for block in blocks:
        q, k, v = block.of_rows(query), block.of_columns(key), block.of_columns(value)
        if fused is None:
            found = _attend(q, k, v, block)
            parts.append(_attend(q, k, v, replace(block, concrete=False)) if found[1].isnan().any() else found)
            continue
        additive = _fused_mask(block, is_causal, query)
        out, lse = fused_forward(q, k, v, is_causal, scale, additive)
        out, lse = _mended(out, lse, additive)
        if sinks is not None:
            with_sink = torch.logaddexp(lse, sinks.float()[:, None])
            out = (out * torch.exp(lse - with_sink)[..., None].nan_to_num(0.0)).to(out.dtype)
            lse = with_sink
        parts.append((out, lse))
    if len(parts) == 1:
        return as_output(parts[0][0], query), parts[0][1].contiguous()
    out = new_output(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for block, (part, part_lse) in zip(blocks, parts):
        block.of_rows(out).copy_(part)
        block.of_rows(lse).copy_(part_lse)
    return out, lse


def _reduce_like(x: Tensor, pair: Tensor) -> Tensor:
    """x (B, Hq, n, m), summed over the dimensions in which `pair` has size 1."""
    over = [d for d in range(4) if pair.shape[d] == 1 and x.shape[d] != 1]
    return x.sum(over, keepdim=True) if over else x


def _add_bias_gradient(grad_bias: Tensor, ds: Tensor, block: Block) -> None:
    """Writes a block's rows of the bias's gradient, or adds them where all rows share one. ds: (B, Hq, rows, columns)"""
    part = _cut(grad_bias, block.rows, block.columns)
    assert part is not None
    if grad_bias.shape[2] == 1:
        part += _reduce_like(ds, part)
        return
    part.copy_(_reduce_like(ds, part))
    if grad_bias.shape[3] != 1:
        block.of_rows(grad_bias)[..., : block.columns.start].zero_()
        block.of_rows(grad_bias)[..., block.columns.stop :].zero_()


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | Blocks | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    scale: float, window_left: int | None, window_right: int | None, softcap: float, dropout_p: float,
    need_bias: bool, need_sinks: bool, precision: str, first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_bias, grad_sinks); the last two None where not needed."""
    if _better_in_fp32(query):
        *grads, grad_bias, grad_sinks = backward(
            grad_out.float(), grad_lse, query.float(), key.float(), value.float(), out.float(), lse, mask, bias, alibi_slopes,
            sinks, seed, scale, window_left, window_right, softcap, dropout_p, need_bias, need_sinks, precision, first_batch,
        )  # fmt: skip
        dq, dk, dv = (as_gradient(grad.to(query.dtype)) for grad in grads)
        return dq, dk, dv, grad_bias, grad_sinks
    delta = (grad_out.float() * out.float()).sum(-1) if grad_lse is not None or need_sinks or softcap else None
    if delta is not None and grad_lse is not None:
        delta = delta - grad_lse
    grad_sinks = None
    if need_sinks:
        assert sinks is not None
        assert delta is not None
        probability = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
        grad_sinks = -(probability * delta).sum((0, 2)).to(sinks.dtype)
    grad_bias = None if not need_bias or bias is None else bias.new_empty(bias.shape, dtype=torch.float32)
    if grad_bias is not None and (grad_bias.shape[2] == 1 or 0 in (query.numel(), key.numel())):
        grad_bias.zero_()
    if 0 in (query.shape[2], key.shape[2]) or query.numel() == 0:
        zeros = [as_gradient(torch.zeros_like(t)) for t in (query, key, value)]
        return (
            zeros[0],
            zeros[1],
            zeros[2],
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            grad_sinks,
        )
    whole = whole_block(
        query, key, mask, bias, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p,
        first_batch,
    )  # fmt: skip
    whole = _concrete(whole, query.is_cpu)
    fused = None if grad_lse is not None or need_bias else _fused_blocks(query, key, value, whole, backward=True)
    if fused is None:
        blocks, is_causal = list(whole.split(product_rows(query, key))), False
        if delta is None:
            delta = (grad_out.float() * out.float()).sum(-1)
    else:
        blocks, is_causal = fused
        key, value = _as_stored(blocks, key, value)
    if not is_causal:
        blind = lse == float("-inf")
        if blind.any():  # their queries, which may be NaN, stay out of the products
            query = query.masked_fill(blind[..., None], 0.0)
            lse = lse.masked_fill(blind, 0.0 if fused else float("inf"))
    if fused and len(blocks) == 1 and len(blocks[0].columns) == key.shape[2]:
        additive = _fused_mask(blocks[0], is_causal, query)
        dq, dk, dv = fused_backward(grad_out, query, key, value, out, lse, is_causal, scale, additive)
        dk, dv = _as_stored(blocks, dk, dv)
        return as_gradient(dq), as_gradient(dk), as_gradient(dv), None, grad_sinks
    dq = new_gradient(query)
    dk, dv = (new_gradient(t, torch.float32).zero_() for t in (key, value))
    for block in blocks:
        q, k, v = block.of_rows(query), block.of_columns(key), block.of_columns(value)
        do, o, row_lse = block.of_rows(grad_out), block.of_rows(out), block.of_rows(lse)
        if fused:
            additive = _fused_mask(block, is_causal, query)
            dq_part, dk_part, dv_part = fused_backward(do, q, k, v, o, row_lse, is_causal, scale, additive)
        else:
            assert delta is not None
            dq_part, dk_part, dv_part, ds = _block_backward(
                do.float(), q.float(), k.float(), v.float(), row_lse, block.of_rows(delta), block
            )
            if grad_bias is not None:
                _add_bias_gradient(grad_bias, ds, block)
        block.of_rows(dq).copy_(dq_part)
        block.of_columns(dk).add_(dk_part)
        block.of_columns(dv).add_(dv_part)
    dk, dv = _as_stored(blocks, dk.to(key.dtype), dv.to(value.dtype))
    return (
        dq,
        as_gradient(dk),
        as_gradient(dv),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        grad_sinks,
    )


def _block_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dS) of one block, everything fp32; lse is +inf for rows that see nothing."""
    s, t = _logits(q, k, block)
    p = exp_(s - lse[..., None], block.far)
    dp = (_grouped(do, v) @ v.transpose(-1, -2)).view(p.shape)
    z = block.dropout_factors(p)
    p_kept = p if z is None else p * z
    ds = (dp if z is None else dp.mul_(z)).sub_(delta[..., None]).mul_(p)
    dx = ds if t is None else torch.addcmul(ds, ds * t, t, value=-1.0)  # ds · (1 - t²)
    dx, p_kept = _grouped(dx, k), _grouped(p_kept, v)
    dq = (dx @ k).view(q.shape).mul_(block.scale)
    dk = (dx.transpose(-1, -2) @ _grouped(q, k)).mul_(block.scale)
    return dq, dk, p_kept.transpose(-1, -2) @ _grouped(do, v), ds


def double_backward(
    grad_grads: Sequence[Tensor | None], needs: Sequence[bool], grad_out: Tensor, grad_lse: Tensor | None, query: Tensor,
    key: Tensor, value: Tensor, mask: Tensor | Blocks | None, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, seed: Tensor | None, scale: float, window_left: int | None, window_right: int | None,
    softcap: float, dropout_p: float, first_batch: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (grad_out, grad_lse, query, key, value, bias, sinks), block by block.

    Args:
        grad_grads: the incoming gradients of the gradients of query, key, value, bias and sinks, or None.
        needs: which of those five the first gradient was taken for.
    """
    inputs = (grad_out, grad_lse, query, key, value, bias, sinks)
    total = [None if t is None else torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in inputs]
    if 0 in (query.shape[2], key.shape[2]) or query.numel() == 0:
        if total[1] is not None and grad_grads[4] is not None:  # without keys the LSE is the sink itself
            total[1] += grad_grads[4].float()[:, None]
        return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(total, inputs))
    whole = whole_block(
        query, key, mask, bias, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p,
        first_batch,
    )  # fmt: skip
    for block in whole.split(product_rows(query, key)):

        def of_block(tensors: Sequence[Tensor | None], block: Block = block) -> list[Tensor | None]:
            """The block's part of (query, key, value, bias, sinks) or of their gradients."""
            q, k, v, pair, sink = tensors
            return [
                None if q is None else block.of_rows(q), None if k is None else block.of_columns(k),
                None if v is None else block.of_columns(v), _cut(pair, block.rows, block.columns), sink,
            ]  # fmt: skip

        def attend(
            q: Tensor, k: Tensor, v: Tensor, pair: Tensor | None, sink: Tensor | None, block: Block = block
        ) -> tuple[Tensor, Tensor]:
            return _attend(q, k, v, replace(block, bias=pair, sinks=sink))

        dys = [block.of_rows(grad_out), None if grad_lse is None else block.of_rows(grad_lse)]
        grads_dy, grads_x = replay(attend, needs, dys, of_block((query, key, value, bias, sinks)), of_block(grad_grads))
        targets = [None if t is None else block.of_rows(t) for t in total[:2]] + of_block(total[2:])
        for target, grad in zip(targets, (*grads_dy, *grads_x)):
            if target is not None and grad is not None:
                target += grad
    return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(total, inputs))


def explain(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> list[str]:
    """How `forward` does this call, in words."""
    whole = _concrete(whole_block(query, key, *rules), query.is_cpu)
    fused = _fused_blocks(query, key, value, whole)
    if fused is None:
        rows = min(product_rows(query, key), query.shape[2])
        return [f"matrix products on blocks of {rows} rows: PyTorch's fused CPU attention lacks this combination"]
    blocks, is_causal = fused
    kernel = f"PyTorch's fused CPU attention{', in fp32' if _better_in_fp32(query) else ''}"
    if len(blocks) == 1:
        return [f"{kernel}, one call{' (is_causal)' if is_causal else ''}"]
    return [f"{kernel}, {len(blocks)} blocks of {len(blocks[0].rows)} rows with the keys that each sees"]
