"""What the package launches, as functions that call its public API: the compile proof and the report both run them.

A function builds small CPU tensors, calls an op with the Triton backend, forward and backward, and returns nothing; the
shapes are large enough for the ordinary configuration to be chosen (a configuration never depends on a length). Run
under the stand-in driver, nothing is executed.
"""

from __future__ import annotations

from typing import Any

import torch

import fastattn


def _tensor(*shape: int, dtype: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype), requires_grad=True)


def attention(
    dtype: str = "bfloat16",
    head_dim: int = 64,
    value_dim: int | None = None,
    kv_heads: int = 2,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    mask: bool = False,
    bias: bool = False,
    alibi: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
    dropout_p: float = 0.0,
    backward: bool = True,
) -> None:
    """Attention over (2, 4, 1024, head_dim) queries and as many keys; each flag switches one feature on."""
    batch, heads, length = 2, 4, 1024
    query = _tensor(batch, heads, length, head_dim, dtype=dtype)
    key = _tensor(batch, kv_heads, length, head_dim, dtype=dtype)
    value = _tensor(batch, kv_heads, length, value_dim or head_dim, dtype=dtype)
    options: dict[str, Any] = {"causal": causal, "softcap": softcap, "dropout_p": dropout_p}
    if window is not None:
        options["window"] = tuple(window)
    if mask:
        options["mask"] = torch.ones(batch, 1, length, length, dtype=torch.bool)
    if bias:
        options["bias"] = _tensor(1, heads, length, length, dtype=dtype)
    if alibi:
        options["alibi_slopes"] = torch.ones(heads)
    if sinks:
        options["sinks"] = _tensor(heads, dtype="float32")
    with fastattn.backend.use("triton"):
        out = fastattn.attention(query, key, value, **options)
        if backward:
            out.sum().backward()
