"""Offsets beyond 2³¹ elements: views whose rows lie gigabytes apart, of which only the touched pages take memory.

An offset that wraps around at 32 bits is a segmentation fault in the interpreter, so the checks run in a process of
their own; the sanitizer, whose state would cover the gaps, is not in it.
"""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")

FAR = 2**30 + 16  # fits 32 bits itself, twice as much does not
ROW = 70_000_000  # the rows of one block of 32 reach beyond 2³¹

CHECK = """
import torch, fastattn

def spread(x, dim, stride):
    '''A copy of x whose elements along `dim` are `stride` elements apart.'''
    rest = [size for d, size in enumerate(x.shape) if d != dim]
    strides = list(torch.empty(rest).stride())
    strides.insert(dim, stride)
    span = (x.shape[dim] - 1) * stride + x[(slice(None),) * dim + (0,)].numel()
    far = torch.empty(span, dtype=x.dtype).as_strided(x.shape, strides)
    return far.copy_(x)

def same(function, inputs, dim, stride):
    plain = [x.clone().requires_grad_() for x in inputs]
    spread_out = [spread(x, dim, stride).requires_grad_() for x in inputs]
    with fastattn.backend.use("triton"):
        for a, b in zip(run(function, plain), run(function, spread_out)):
            assert torch.equal(a, b), (a - b).abs().max()

def run(function, leaves):
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

torch.manual_seed(0)
def attend(q, k, v):
    return fastattn.attention(q, k, v, causal=True)

def same_cache(dim, stride):
    query, new = torch.randn(3, 3, 1, 16).half(), torch.randn(2, 3, 3, 1, 16).half()
    results = []
    for change in (torch.clone, lambda x: spread(x, dim, stride)):
        keys, values = (change(x) for x in torch.ones(2, 3, 3, 40, 16).half())
        with fastattn.backend.use("triton"):
            out = fastattn.attention_with_kv_cache(query, keys, values, torch.tensor([39, 0, 20]), key=new[0], value=new[1])
        results.append((out, keys, values))
    assert all(torch.equal(a, b) for a, b in zip(*results))
"""
CHECKS = {
    "attention, batches": f"same(attend, torch.randn(3, 3, 1, 40, 16).half().unbind(), 0, {FAR})",
    "attention, heads": f"same(attend, torch.randn(3, 1, 3, 40, 16).half().unbind(), 1, {FAR})",
    "attention, rows": f"same(attend, torch.randn(3, 1, 1, 40, 16).half().unbind(), 2, {ROW})",
    "cache, batches": f"same_cache(0, {FAR})",
    "cache, heads": f"same_cache(1, {FAR})",
    "cache, rows": f"same_cache(2, {ROW})",
    "layer norm": f"same(lambda x: fastattn.layer_norm(x, 16), [torch.randn(3, 16).half()], 0, {FAR})",
    "wide layer norm": f"same(lambda x: fastattn.layer_norm(x, 16_390), [torch.randn(3, 16_390).half()], 0, {FAR})",
    "linear": "weight = torch.randn(16, 16).half(); "
    f"same(lambda x: fastattn.linear(x, weight, activation='gelu'), [torch.randn(3, 16).half()], 0, {FAR})",
}


def test_offsets_beyond_32_bits(pytestconfig):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(pytestconfig.rootpath)}
    steps = [f"print({name!r}, flush=True); {check}" for name, check in CHECKS.items()]
    command = [sys.executable, "-c", "\n".join([CHECK, *steps])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    begun = result.stdout.splitlines()
    assert result.returncode == 0, f"{begun[-1:]}: exit status {result.returncode}\n{result.stderr[-2000:]}"
    assert begun == list(CHECKS)
