"""Toy kernels and the functions that launch them, for the tests of the compile proof itself."""

import torch
import triton
import triton.language as tl


@triton.jit
def matmul_tile(
    a, b, out, n_steps, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr
):
    offs_m, offs_n, offs_k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(n_steps):
        a_tile = tl.load(a + (step * ROWS + offs_m[:, None]) * DEPTH + offs_k[None, :])
        b_tile = tl.load(b + (step * DEPTH + offs_k[:, None]) * COLS + offs_n[None, :])
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    tl.store(out + offs_m[:, None] * COLS + offs_n[None, :], acc)


@triton.jit
def softmax_numerators(x, w, out, n, stride, WHAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ exp2(x w - row) over blocks of columns; WHAT names a planted regression."""
    offs_m, offs_n = tl.arange(0, ROWS), tl.arange(0, COLS)
    x_tile = tl.load(x + offs_m[:, None] * ROWS + tl.arange(0, ROWS)[None, :])
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, n, COLS):
        step = stride if WHAT == "scalar load" else 1
        w_tile = tl.load(w + (start + tl.arange(0, ROWS)[:, None]) * COLS + offs_n[None, :] * step)
        s = tl.dot(x_tile, w_tile)
        if WHAT == "unsplit mask":
            s = tl.where(offs_m[:, None] + n >= start + offs_n[None, :], s, float("-inf"))
        total += tl.exp2(s * 0.125 - offs_m[:, None])
    tl.store(out + offs_m[:, None] * COLS + offs_n[None, :], total)


@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + offs, tl.load(x + offs, mask=offs < n) * 2, mask=offs < n)


@triton.jit
def does_not_compile(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, BLOCK + 1))


@triton.autotune(
    [triton.Config({"ROWS": rows, "DEPTH": 2 * rows}, num_stages=3) for rows in (128, 64)], key=[], cache_results=True
)
@triton.jit
def tuned(x, out, n, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    offs = tl.arange(0, ROWS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    acc = tl.zeros([ROWS, ROWS], tl.float32)
    for step in range(n):
        tile = tl.load(x + step * ROWS * DEPTH + offs)
        acc = tl.dot(tile, tile.T, acc)
    tl.store(out + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], acc)


@triton.jit
def copy_tile(x, y, SIZE: tl.constexpr):
    y.store([0, 0], x.load([0, 0]) + SIZE)


def launch_tuned():
    tuned[(1,)](torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64), 1024)


def launch_descriptor():
    from triton.tools.tensor_descriptor import TensorDescriptor

    descriptor = TensorDescriptor.from_tensor(torch.zeros(64, 64), [32, 32])
    copy_tile[(1,)](descriptor, descriptor, SIZE=32)


def launch_resident():
    x = torch.zeros(1000)
    kernel = double.warmup(x, 1000, BLOCK=256, grid=(1,))
    kernel._init_handles()
    kernel[(kernel.n_regs, 1, 1)](x, 1000, 256)


def launch_cuda():
    double[(1,)](torch.zeros(256, device="cuda"), 256, BLOCK=256)


def nothing():
    pass


def launch_matmul(dtype="bfloat16", precision="ieee", rows=64, cols=64, depth=64, num_warps=4, num_stages=2):
    a = torch.zeros(4 * rows, depth, dtype=getattr(torch, dtype))
    b = torch.zeros(4 * depth, cols, dtype=getattr(torch, dtype))
    out = torch.zeros(rows, cols)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    matmul_tile[(1,)](a, b, out, 4, PRECISION=precision, ROWS=rows, COLS=cols, DEPTH=depth, **options)


def launch_double(n=1000):
    for _ in range(2):
        double[(triton.cdiv(n, 256),)](torch.zeros(n), n, BLOCK=256, enable_fp_fusion=True)


def launch_softmax_numerators(what="good"):
    x, w = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64 * 128, dtype=torch.bfloat16)
    options = {"num_warps": 1 if what == "spill" else 4, "enable_fp_fusion": what != "no fusion"}
    softmax_numerators[(1,)](x, w, torch.zeros(64, 128), 1024, 17, WHAT=what, ROWS=64, COLS=128, **options)


def launch_what_does_not_compile():
    does_not_compile[(1,)](torch.zeros(16), BLOCK=16)
