"""What the memory-bound kernels move, counted access by access in the interpreter, is the least that their formulas allow."""

import numpy as np
import pytest
import torch

import fastattn
from tests import sanitizer

M, N = 128, 512


def tensor(dtype, *shape):
    return torch.randn(*shape).to(dtype).requires_grad_()


def layer_norm(dtype, width=N, **options):
    x = tensor(dtype, M * N // width, width)
    return lambda: fastattn.layer_norm(x, width, **options)


def residual_norm(dtype):
    x, residual = tensor(dtype, M, N), tensor(dtype, M, N)
    return lambda: fastattn.rms_norm(x, N, residual=residual)


def rotary(dtype):
    query, key = tensor(dtype, 16, 16, 16, 64), tensor(dtype, 16, 16, 16, 64)
    tables = fastattn.rotary_tables(64, 64)
    return lambda: fastattn.rotary(query, key, *tables)


def cross_entropy(dtype):
    logits, target = tensor(dtype, 8, 16384), torch.arange(8)
    return lambda: fastattn.cross_entropy(logits, target)


# numbers of size M · N that are read and written once: forward, backward
LEAST = {
    "layer_norm": (layer_norm, 2, 3),  # x, y; x, dy, dx
    "rms_norm with residual": (residual_norm, 4, 4),  # x, residual, h, y; h, dy, dh, dx
    "wide layer_norm": (lambda dtype: layer_norm(dtype, 16384), 3, 5),  # x twice; x and dy twice, dx
    "rotary": (rotary, 16, 16),  # q, k and what they become, 4 M · N each
    "cross_entropy": (cross_entropy, 2, 4),  # logits; logits and gradient (there are twice M · N)
}


@pytest.fixture
def moved(monkeypatch):
    """The bytes that interpreted kernels have loaded and stored."""
    bytes_moved = [0]
    original = sanitizer.Launch.access

    def count(self, kind, pointers, mask):
        shape = np.asarray(pointers.data).shape
        elements = np.broadcast_to(True if mask is None else getattr(mask, "data", mask), shape).sum()
        bytes_moved[0] += int(elements) * pointers.get_element_ty().primitive_bitwidth // 8
        original(self, kind, pointers, mask)

    monkeypatch.setattr(sanitizer.Launch, "access", count)
    return bytes_moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEAST)
def test_no_byte_moves_twice(moved, name, dtype):
    make, *least = LEAST[name]
    call = make(dtype)
    with fastattn.backend.use("triton"):
        result = call()
        outputs = result if isinstance(result, tuple) else (result,)
        forward, moved[0] = moved[0], 0
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    for what, bytes_moved, numbers in zip(("forward", "backward"), (forward, moved[0]), least):
        formula = numbers * M * N * dtype.itemsize
        assert 0.99 * formula <= bytes_moved <= 1.08 * formula, f"{what}: {bytes_moved / (M * N * dtype.itemsize):.2f}"
