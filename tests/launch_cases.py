"""Calls of the public API whose launches the compile worker compiles for GPUs: forward and backward, nothing runs."""

import torch

import fastattn


def attention(
    dtype="bfloat16", head_dim=64, value_dim=None, kv_heads=2, queries=128, keys=128, flags=(), backward=True
) -> None:
    """One training step's attention launches; `flags` names the score features that are on."""
    kind = getattr(torch, dtype)
    query = torch.zeros(1, 2, queries, head_dim, dtype=kind, requires_grad=backward)
    key = torch.zeros(1, kv_heads, keys, head_dim, dtype=kind, requires_grad=backward)
    value = torch.zeros(1, kv_heads, keys, value_dim or head_dim, dtype=kind, requires_grad=backward)
    options = {
        "causal": {"causal": True},
        "window": {"window": (64, 32)},
        "mask": {"mask": torch.zeros(1, 1, queries, keys, dtype=torch.bool)},
        "bias": {"bias": torch.zeros(1, 2, queries, keys, dtype=kind, requires_grad=backward)},
        "alibi": {"alibi_slopes": torch.zeros(2)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(2, requires_grad=backward)},
        "dropout": {"dropout_p": 0.1},
    }
    chosen = {name: value for flag in flags for name, value in options[flag].items()}
    with fastattn.backend.use("triton"):
        out, lse = fastattn.attention(query, key, value, return_lse=True, **chosen)
        if backward:
            torch.autograd.backward((out, lse), (torch.zeros_like(out), torch.zeros_like(lse)))
