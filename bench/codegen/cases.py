"""What the package launches, as functions that call its public API: the compile proof and the report both run them.

A function builds small CPU tensors, calls an op with the Triton backend, forward and backward, and returns nothing; the
shapes are large enough for the ordinary configuration to be chosen (a configuration never depends on a length). Run
under the stand-in driver, nothing is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import fastattn


def attention(
    dtype: str = "bfloat16",
    head_dim: int = 64,
    value_dim: int | None = None,
    kv_heads: int = 2,
    queries: int = 128,
    keys: int = 128,
    flags: tuple[str, ...] = (),
    backward: bool = True,
) -> None:
    """One training step's attention launches; `flags` names the score features that are on."""
    kind = getattr(torch, dtype)
    query = torch.zeros(1, 2, queries, head_dim, dtype=kind, requires_grad=backward)
    key = torch.zeros(1, kv_heads, keys, head_dim, dtype=kind, requires_grad=backward)
    value = torch.zeros(1, kv_heads, keys, value_dim or head_dim, dtype=kind, requires_grad=backward)
    options: dict[str, dict[str, Any]] = {
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


@dataclass(frozen=True)
class Case:
    """A function of this module with its arguments. The compile proof always runs the `core` cases."""

    name: str
    function: str
    arguments: dict[str, Any]
    core: bool = False

    @property
    def path(self) -> str:
        return f"{__name__}:{self.function}"


def _attention_cases() -> Iterator[Case]:
    def case(name: str, core: bool = False, **arguments: Any) -> Case:
        return Case(f"attention {name}", "attention", arguments, core)

    yield case("bf16 D64 causal", core=True, flags=["causal"])
    yield case("bf16 D128 causal", core=True, head_dim=128, flags=["causal"])
    yield case("bf16 D256", core=True, head_dim=256)
    yield case("fp16 D80 mask bias", core=True, dtype="float16", head_dim=80, flags=["mask", "bias"])
    yield case("fp32 D16 causal", core=True, dtype="float32", head_dim=16, flags=["causal"])
    everything = ["window", "mask", "bias", "alibi", "softcap", "sinks", "dropout"]
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (16, 64, 80, 128, 256):
            for name, flags in {"full": [], "causal": ["causal"], "everything": everything}.items():
                yield case(f"{dtype} D{head_dim} {name}", dtype=dtype, head_dim=head_dim, flags=flags)
    for flag in everything:
        yield case(f"bf16 D64 {flag}", flags=[flag])
        yield case(f"bf16 D128 {flag}", head_dim=128, flags=[flag])
    yield case("bf16 D192 Dv128", head_dim=192, value_dim=128, flags=["causal"])


CASES = [*_attention_cases()]
