"""Rotary position embedding in Triton: query and key in one launch, forward and backward.

A head's first 2·HALF numbers are pairs (a, b), read as complex numbers a + ib and multiplied by c = cos θ + i sin θ, where θ
depends on the token's position and the pair; the gradient is the product with the conjugate of c. A program takes a block
of tokens, reads their cosines and sines once, and walks over heads of the query and then of the key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from fastattn.kernels.config import head_splits, rotary_config
from fastattn.kernels.launch import current_target, launch
from fastattn.kernels.tiles import pair_strides, strides
from fastattn.layout import new_output

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def load_angles(TABLE, offs_n, strides, rows, mask_n, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """[BLOCK_N, BLOCK_HALF] cosines or sines in fp32; NaN for a position that the table does not have."""
    offs_d = tl.arange(0, BLOCK_HALF)
    known = mask_n & (offs_n >= 0) & (offs_n < rows)
    pointers = TABLE + offs_n[:, None] * strides[1] + offs_d[None, :]
    values = tl.load(pointers, mask=known[:, None] & (offs_d < HALF)[None, :], other=float("nan"))
    return values.to(tl.float32)


@triton.jit
def rotate_head(
    X, OUT, offs_n, stride_x, stride_out, mask_n, cos, sin,
    HALF: tl.constexpr, TAIL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """(a, b) → (a cos - b sin, b cos + a sin) for the tokens of one head; OUT may be X."""
    kind = OUT.dtype.element_ty
    x_rows, out_rows = X + offs_n[:, None] * stride_x, OUT + offs_n[:, None] * stride_out
    if INTERLEAVED:
        # [BLOCK_N, 2 * BLOCK_HALF]: a and b lie side by side
        offs_d = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = mask_n[:, None] & (offs_d < 2 * HALF)
        x = tl.load(x_rows + offs_d, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_HALF, 2]))
        y = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(out_rows + offs_d, tl.reshape(y, [BLOCK_N, 2 * BLOCK_HALF]).to(kind), mask=mask)
    else:
        # [BLOCK_N, BLOCK_HALF] each: all a, then all b
        offs_d = tl.arange(0, BLOCK_HALF)[None, :]
        mask = mask_n[:, None] & (offs_d < HALF)
        a = tl.load(x_rows + offs_d, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_rows + HALF + offs_d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_rows + offs_d, (a * cos - b * sin).to(kind), mask=mask)
        tl.store(out_rows + HALF + offs_d, (b * cos + a * sin).to(kind), mask=mask)
    if TAIL > 0:  # [BLOCK_N, BLOCK_TAIL]: what is not rotated
        offs_t = tl.arange(0, BLOCK_TAIL)[None, :]
        mask = mask_n[:, None] & (offs_t < TAIL)
        tl.store(out_rows + 2 * HALF + offs_t, tl.load(x_rows + 2 * HALF + offs_t, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["offset", "query_heads", "key_heads", "num_tokens", "table_rows", "tiles", "splits"])
def rotary_kernel(
    Q, K,  # (B, Hq, N, D) and (B, Hkv, N, D), unit stride along D; K may be None
    COS, SIN,  # (B or 1, table_rows, HALF), unit stride along HALF
    POSITIONS,  # integers (B or 1, N), or None: offset, offset + 1, ...
    OUT_Q, OUT_K,  # as Q and K, which they may be
    q_strides, k_strides, cos_strides, sin_strides, position_strides, out_q_strides, out_k_strides,
    offset, query_heads, key_heads, num_tokens, table_rows, tiles, splits,
    HALF: tl.constexpr, TAIL: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens of one sequence, every splits-th head."""
    b, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    rows = offs_n + offset
    if POSITIONS is not None:
        at = POSITIONS + b * position_strides[0] + offs_n * position_strides[1]
        rows = tl.load(at, mask=mask_n, other=0).to(tl.int64)
    cos = load_angles(COS + b * cos_strides[0], rows, cos_strides, table_rows, mask_n, HALF, BLOCK_HALF)
    sin = load_angles(SIN + b * sin_strides[0], rows, sin_strides, table_rows, mask_n, HALF, BLOCK_HALF)
    if CONJUGATE:
        sin = -sin
    for head in range(first, query_heads, splits):
        h = tl.cast(head, tl.int64)
        rotate_head(
            Q + b * q_strides[0] + h * q_strides[1], OUT_Q + b * out_q_strides[0] + h * out_q_strides[1],
            offs_n, q_strides[2], out_q_strides[2], mask_n, cos, sin,
            HALF, TAIL, INTERLEAVED, BLOCK_N, BLOCK_HALF, BLOCK_TAIL,
        )  # fmt: skip
    if K is not None:
        for head in range(first, key_heads, splits):
            h = tl.cast(head, tl.int64)
            rotate_head(
                K + b * k_strides[0] + h * k_strides[1], OUT_K + b * out_k_strides[0] + h * out_k_strides[1],
                offs_n, k_strides[2], out_k_strides[2], mask_n, cos, sin,
                HALF, TAIL, INTERLEAVED, BLOCK_N, BLOCK_HALF, BLOCK_TAIL,
            )  # fmt: skip


def rotate(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """(query, key) rotated, as `fastattn.ops.rotary` describes them; the last dimension of every tensor is contiguous."""
    batch, heads, tokens, dim = query.shape
    half = cos.shape[2]
    tail = 0 if inplace else dim - 2 * half
    out_query = query if inplace else new_output(query, dim)
    out_key = key if inplace or key is None else new_output(key, dim)
    key_heads = 0 if key is None else key.shape[1]
    block_half, block_tail, block_n, num_warps = rotary_config(half, tail)
    tiles = batch * triton.cdiv(tokens, block_n)
    splits = head_splits(current_target(), tiles, max(heads, key_heads))
    launch(
        rotary_kernel, (tiles, splits),
        query, key, cos, sin, positions, out_query, out_key,
        strides(query), strides(key), pair_strides(cos), pair_strides(sin), pair_strides(positions),
        strides(out_query), strides(out_key),
        offset, heads, key_heads, tokens, cos.shape[1], max(1, tiles // max(batch, 1)), splits,
        HALF=half, TAIL=tail, INTERLEAVED=interleaved, CONJUGATE=conjugate, BLOCK_N=block_n, BLOCK_HALF=block_half,
        BLOCK_TAIL=block_tail, num_warps=num_warps,
    )  # fmt: skip
    return out_query, out_key


def explain(query: Tensor, cos: Tensor) -> list[str]:
    """The block of tokens that a program takes for heads and tables of this width."""
    half = cos.shape[-1]
    *_, block_n, num_warps = rotary_config(half, query.shape[3] - 2 * half)
    return [f"query and key in one launch, {block_n} tokens a program, {num_warps} warps"]
