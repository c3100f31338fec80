"""Tile sizes, warps and stages, as pure functions of the target and the problem's class (never of batch or length)."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.kernels.launch import Target


@dataclass(frozen=True)
class AttentionConfig:
    """One program handles block_m query rows against block_n key columns at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def attention_forward_config(target: Target, head_dim: int, itemsize: int) -> AttentionConfig:
    """head_dim: the larger of Dq and Dv, padded to a power of two; itemsize: bytes per element."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    if itemsize == 4:
        return AttentionConfig(64, 32 if head_dim <= 128 else 16, 4, 1)
    if target.arch in (90, 100):
        return AttentionConfig(128, 64 if head_dim == 256 else 128, 4 if head_dim <= 64 else 8, 2)
    if head_dim <= 64:
        return AttentionConfig(128, 64, 4, 3)
    return AttentionConfig(128, 32, 4, 3) if head_dim == 128 else AttentionConfig(64, 32, 4, 2)


def attention_backward_key_config(target: Target, head_dim: int, itemsize: int) -> AttentionConfig:
    """For dK and dV: block_n key columns stay in registers, block_m query rows pass by."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    if itemsize == 4:
        return AttentionConfig(32, 32, 4, 1)
    if target.arch in (90, 100) and head_dim <= 128:
        return AttentionConfig(64, 128, 8, 1)
    return AttentionConfig(32, 128, 4, 2) if head_dim <= 64 else AttentionConfig(32, 64, 4, 1)


def attention_backward_query_config(target: Target, head_dim: int, itemsize: int) -> AttentionConfig:
    """For dQ and dBias: block_m query rows stay in registers, block_n key columns pass by."""
    if target.backend == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    if itemsize == 4:
        return AttentionConfig(32, 32, 4, 1)
    if target.arch in (90, 100) and head_dim <= 128:
        return AttentionConfig(64, 128, 4, 1)
    return AttentionConfig(128, 32, 4, 2) if head_dim <= 64 else AttentionConfig(64, 32, 4, 1)
