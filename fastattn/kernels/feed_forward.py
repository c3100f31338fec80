"""Linear layers with their activation, gate and derivative fused into the matrix product.

Forward, with W as in nn.Linear (out, in):

    z = X Wᵀ + b,   y = act(z)           or, gated,   g = X Wgᵀ + bg,   y = act(g) · z

and the backward of a linear layer that follows, seen from its input y with dY its output's gradient and V its weight:

    dz = (dY V) · act'(z)                or, gated,   dg = (dY V) · z · act'(g),   dz = (dY V) · act(g)

Every product accumulates in fp32. Programs walk over the output in groups of GROUP_M block rows, so that the blocks
that run at the same time share their operands in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import dropout_threshold
from fastattn.kernels.activations import activate
from fastattn.kernels.config import ELEMENTWISE_BLOCK, matmul_config
from fastattn.kernels.launch import contiguous, current_target, launch
from fastattn.kernels.order import side_by_side
from fastattn.kernels.random import dropout, keep_of_rows


@triton.jit
def block_of_program(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first column) of this program's block: column after column, GROUP_M block rows at a time."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    row, column = side_by_side(tl.program_id(0), blocks_m, blocks_n, GROUP_M)
    return row * BLOCK_M, column * BLOCK_N


@triton.jit
def multiply(
    acc,  # fp32 [BLOCK_M, BLOCK_N]
    A, B,  # (rows, depth) with unit stride along a row, (depth, columns) with any strides
    offs_m, offs_n, rows, columns, depth, stride_am, stride_bk, stride_bn,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A B for one block."""
    offs_k = tl.arange(0, BLOCK_K)
    a_pointers = A + offs_m.to(tl.int64)[:, None] * stride_am + offs_k[None, :]
    b_pointers = B + offs_k.to(tl.int64)[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn
    mask_a, mask_b = (offs_m < rows)[:, None], (offs_n < columns)[None, :]
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_pointers, mask=mask_a, other=0.0)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_pointers, mask=mask_b, other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            a = tl.load(a_pointers, mask=mask_a & (offs_k < depth - start)[None, :], other=0.0)
            b = tl.load(b_pointers, mask=mask_b & (offs_k < depth - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K * stride_bk
    return acc


@triton.jit
def add_bias(acc, BIAS, offs_n, columns):
    if BIAS is not None:
        acc += tl.load(BIAS + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def load_block(POINTER, offsets, mask):
    return tl.load(POINTER + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_block(POINTER, value, offsets, mask):
    if POINTER is not None:
        tl.store(POINTER + offsets, value.to(POINTER.dtype.element_ty), mask=mask)


@triton.jit
def halves(block):
    """The left and the right half of [BLOCK_M, BLOCK_N]."""
    split: tl.constexpr = (block.shape[0], 2, block.shape[1] // 2)
    return tl.split(tl.permute(tl.reshape(block, split), (0, 2, 1)))


@triton.jit
def finish_linear(
    z, g,  # fp32 [BLOCK_M, BLOCK_N] or a part of its columns, the products without bias; g is None without a gate
    BIAS, GATE_BIAS, RESIDUAL, SEED, OUT, Z, G,  # as in `linear_kernel`
    offs_m, start_n, rows, columns, threshold, keep_scale,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The end of `linear_kernel`, in parts one after the other to save registers."""
    if PARTS > 1:
        half: tl.constexpr = z.shape[1] // 2
        z_left, z_right = halves(z)
        g_left, g_right = None, None
        if g is not None:
            g_left, g_right = halves(g)
        finish_linear(
            z_left, g_left, BIAS, GATE_BIAS, RESIDUAL, SEED, OUT, Z, G, offs_m, start_n, rows, columns, threshold,
            keep_scale, ACTIVATION, PARTS // 2,
        )  # fmt: skip
        finish_linear(
            z_right, g_right, BIAS, GATE_BIAS, RESIDUAL, SEED, OUT, Z, G, offs_m, start_n + half, rows, columns,
            threshold, keep_scale, ACTIVATION, PARTS // 2,
        )  # fmt: skip
    else:
        offs_n = start_n + tl.arange(0, z.shape[1])
        offsets = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
        mask = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
        z = add_bias(z, BIAS, offs_n, columns)
        store_block(Z, z, offsets, mask)
        if g is None:
            out, _ = activate(z, ACTIVATION)
        else:
            g = add_bias(g, GATE_BIAS, offs_n, columns)
            store_block(G, g, offsets, mask)
            activated, _ = activate(g, ACTIVATION)
            out = activated * z
        out = dropout(out, SEED, offs_m, offs_n, threshold, keep_scale)
        if RESIDUAL is not None:
            out += load_block(RESIDUAL, offsets, mask)
        store_block(OUT, out, offsets, mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def linear_kernel(
    X,  # (rows, depth), unit stride along a row
    WEIGHT, BIAS,  # (depth, columns) with any strides; (columns,), or None
    GATE_WEIGHT, GATE_BIAS,  # the same of the gate, or None
    RESIDUAL,  # (rows, columns), contiguous, or None
    SEED,  # int64 (1,), or None: no dropout
    OUT, Z, G,  # (rows, columns), contiguous; Z and G may be None
    rows, columns, depth, stride_x, stride_wk, stride_wn, stride_gk, stride_gn, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = dropout(act(X W + b), or act(X Wg + bg) · (X W + b)) + RESIDUAL; Z and G keep the two products."""
    start_m, start_n = block_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    z = multiply(
        zeros, X, WEIGHT, offs_m, offs_n, rows, columns, depth, stride_x, stride_wk, stride_wn,
        BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    g = None
    if GATE_WEIGHT is not None:
        g = multiply(
            zeros, X, GATE_WEIGHT, offs_m, offs_n, rows, columns, depth, stride_x, stride_gk, stride_gn,
            BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    finish_linear(
        z, g, BIAS, GATE_BIAS, RESIDUAL, SEED, OUT, Z, G, offs_m, start_n, rows, columns, threshold, keep_scale,
        ACTIVATION, PARTS,
    )  # fmt: skip


@triton.jit
def finish_hidden_backward(
    d_hidden,  # fp32 [BLOCK_M, BLOCK_N] or a part of its columns
    Z, G, DZ, DG, HIDDEN,  # as in `hidden_backward_kernel`
    offs_m, start_n, rows, columns, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The end of `hidden_backward_kernel`, in parts."""
    if PARTS > 1:
        half: tl.constexpr = d_hidden.shape[1] // 2
        left, right = halves(d_hidden)
        finish_hidden_backward(left, Z, G, DZ, DG, HIDDEN, offs_m, start_n, rows, columns, ACTIVATION, PARTS // 2)
        finish_hidden_backward(
            right, Z, G, DZ, DG, HIDDEN, offs_m, start_n + half, rows, columns, ACTIVATION, PARTS // 2
        )
    else:
        offs_n = start_n + tl.arange(0, d_hidden.shape[1])
        offsets = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
        mask = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
        z = load_block(Z, offsets, mask)
        if G is None:
            hidden, derivative = activate(z, ACTIVATION)
            store_block(DZ, d_hidden * derivative, offsets, mask)
        else:
            activated, derivative = activate(load_block(G, offsets, mask), ACTIVATION)
            hidden = activated * z
            store_block(DZ, d_hidden * activated, offsets, mask)
            store_block(DG, d_hidden * z * derivative, offsets, mask)
        store_block(HIDDEN, hidden, offsets, mask)


@triton.jit(do_not_specialize=["rows"])
def hidden_backward_kernel(
    DY,  # (rows, depth), unit stride along a row
    WEIGHT,  # (depth, columns) with any strides: the second layer's
    Z, G,  # (rows, columns), contiguous; G is None without a gate
    DZ, DG, HIDDEN,  # (rows, columns), contiguous; DG is None without a gate, HIDDEN where it was kept
    rows, columns, depth, stride_dy, stride_wk, stride_wn,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DZ = (DY W) act'(z), or the gated pair; HIDDEN, where it was not kept, is act(z) or act(g) · z once more."""
    start_m, start_n = block_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    d_hidden = multiply(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), DY, WEIGHT, offs_m, offs_n, rows, columns, depth,
        stride_dy, stride_wk, stride_wn, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    finish_hidden_backward(d_hidden, Z, G, DZ, DG, HIDDEN, offs_m, start_n, rows, columns, ACTIVATION, PARTS)


@triton.jit(do_not_specialize=["rows"])
def input_backward_kernel(
    DZ, WEIGHT,  # (rows, depth) with unit stride along a row, (depth, columns) with any strides
    DG, GATE_WEIGHT,  # the same of the gate, or None
    DX,  # (rows, columns), contiguous
    rows, columns, depth, stride_dz, stride_wk, stride_wn, stride_dg, stride_gk, stride_gn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DX = DZ W, or DZ W + DG Wg in one sum."""
    start_m, start_n = block_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    dx = multiply(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), DZ, WEIGHT, offs_m, offs_n, rows, columns, depth,
        stride_dz, stride_wk, stride_wn, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    if GATE_WEIGHT is not None:
        dx = multiply(
            dx, DG, GATE_WEIGHT, offs_m, offs_n, rows, columns, depth, stride_dg, stride_gk, stride_gn,
            BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    offsets = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    store_block(DX, dx, offsets, (offs_m < rows)[:, None] & (offs_n < columns)[None, :])


@triton.jit(do_not_specialize=["numbers"])
def activation_backward_kernel(DY, Z, DZ, numbers, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """DZ = DY · act'(Z), number by number."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numbers
    _, derivative = activate(load_block(Z, offsets, mask), ACTIVATION)
    store_block(DZ, load_block(DY, offsets, mask) * derivative, offsets, mask)


@triton.jit(do_not_specialize=["numbers", "threshold"])
def dropout_backward_kernel(DY, SEED, OUT, numbers, columns, threshold, keep_scale, BLOCK: tl.constexpr):
    """OUT = DY · keep / (1 - p), number by number of a (rows, columns) tensor."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numbers
    row, column = (offsets // columns).to(tl.int32), (offsets % columns).to(tl.int32)
    kept = keep_of_rows(tl.load(SEED), row, column, threshold)
    store_block(OUT, tl.where(kept, load_block(DY, offsets, mask) * keep_scale, 0.0), offsets, mask)


def unit_rows(tensor: Tensor) -> Tensor:
    """`tensor` (rows, columns) with unit stride along a row, copied only if it has another."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dropout(act(z) or act(g) · z) + residual, z, g); z and g are empty without `save`, g also without a gate."""
    x, gated = unit_rows(input), gate_weight is not None
    shape = (x.shape[0], weight.shape[0])
    out, z = x.new_empty(shape), x.new_empty(shape if save else 0)
    g = x.new_empty(shape if save and gated else 0)
    constants, parts, grid = _blocks(*shape, x.shape[1], x.element_size(), precision, 1 + gated, 1 + gated)
    launch(
        linear_kernel, grid,
        x, weight, contiguous(bias), gate_weight, contiguous(gate_bias), contiguous(residual), seed,
        out, z if save else None, g if g.numel() else None,
        *shape, x.shape[1], x.stride(0), weight.stride(1), weight.stride(0),
        *((0, 0) if gate_weight is None else (gate_weight.stride(1), gate_weight.stride(0))),
        dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        ACTIVATION=activation, PARTS=parts, **constants,
    )  # fmt: skip
    return out, z, g


def hidden_backward(
    grad_output: Tensor,
    weight: Tensor,
    z: Tensor,
    g: Tensor,
    gated: bool,
    activation: str,
    need_hidden: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dg, hidden) from dY (rows, out) and the second layer's weight (out, in); dg and hidden may be empty."""
    dy = unit_rows(grad_output)
    shape = (dy.shape[0], weight.shape[1])
    dz, hidden = dy.new_empty(shape), dy.new_empty(shape if need_hidden else 0)
    dg = dy.new_empty(shape if gated else 0)
    constants, parts, grid = _blocks(*shape, dy.shape[1], dy.element_size(), precision)
    launch(
        hidden_backward_kernel, grid,
        dy, weight, z, g if gated else None, dz, dg if gated else None, hidden if need_hidden else None,
        *shape, dy.shape[1], dy.stride(0), weight.stride(0), weight.stride(1),
        ACTIVATION=activation, PARTS=parts, **constants,
    )  # fmt: skip
    return dz, dg, hidden


def input_backward(
    grad_z: Tensor, weight: Tensor, grad_g: Tensor | None, gate_weight: Tensor | None, precision: str
) -> Tensor:
    """dX = dZ W (+ dG Wg)."""
    dz, dg = unit_rows(grad_z), None if grad_g is None else unit_rows(grad_g)
    shape = (dz.shape[0], weight.shape[1])
    dx = dz.new_empty(shape)
    constants, _, grid = _blocks(
        *shape, dz.shape[1], dz.element_size(), precision, products=1 if gate_weight is None else 2
    )
    launch(
        input_backward_kernel, grid,
        dz, weight, dg, gate_weight, dx,
        *shape, dz.shape[1], dz.stride(0), weight.stride(0), weight.stride(1),
        *((0, 0, 0) if dg is None or gate_weight is None else (dg.stride(0), *gate_weight.stride())),
        **constants,
    )  # fmt: skip
    return dx


def activation_backward(grad_output: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz = dY · act'(z), z contiguous."""
    dz = z.new_empty(z.shape)
    launch(
        activation_backward_kernel, (triton.cdiv(z.numel(), ELEMENTWISE_BLOCK),),
        grad_output.contiguous(), z, dz, z.numel(),
        ACTIVATION=activation, BLOCK=ELEMENTWISE_BLOCK,
    )  # fmt: skip
    return dz


def dropout_backward(grad_output: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """dY · keep / (1 - p) of (rows, columns)."""
    dy = grad_output.contiguous()
    out = dy.new_empty(dy.shape)
    launch(
        dropout_backward_kernel, (triton.cdiv(dy.numel(), ELEMENTWISE_BLOCK),),
        dy, seed, out, dy.numel(), dy.shape[1], dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        BLOCK=ELEMENTWISE_BLOCK,
    )  # fmt: skip
    return out


def _blocks(
    rows: int, columns: int, depth: int, itemsize: int, precision: str, products: int = 1, accumulators: int = 1
) -> tuple[dict[str, Any], int, tuple[int]]:
    """The constants of a matrix product's kernel, in how many parts it may end, and its grid."""
    config = matmul_config(current_target(), columns, depth, itemsize, products, accumulators)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN_K": depth % config.block_k == 0,
        "GROUP_M": config.group_m,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return constants, config.parts, (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)


def explain(columns: int, depth: int, itemsize: int, gated: bool) -> str:
    """The tiles of a forward product with a (columns, depth) weight."""
    c = matmul_config(current_target(), columns, depth, itemsize, 1 + gated, 1 + gated)
    return f"{c.block_m} x {c.block_n} tiles, {c.block_k} deep, {c.num_warps} warps, {c.num_stages} stages; activation fused"
