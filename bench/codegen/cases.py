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

    yield case("bf16 D64 causal", core=True, causal=True)
    yield case("bf16 D128 causal", core=True, head_dim=128, causal=True)
    yield case("bf16 D256", core=True, head_dim=256)
    yield case("fp16 D80 mask bias", core=True, dtype="float16", head_dim=80, mask=True, bias=True)
    yield case("fp32 D16 causal", core=True, dtype="float32", head_dim=16, causal=True)
    everything: dict[str, Any] = {
        "window": (128, 0),
        "mask": True,
        "alibi": True,
        "softcap": 30.0,
        "sinks": True,
        "dropout_p": 0.1,
    }
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (16, 64, 80, 128, 256):
            size = f"{dtype} D{head_dim}"
            yield case(f"{size} plain", dtype=dtype, head_dim=head_dim)
            yield case(f"{size} causal", dtype=dtype, head_dim=head_dim, causal=True)
            yield case(f"{size} everything", dtype=dtype, head_dim=head_dim, **everything)
    for flag, value in {**everything, "bias": True}.items():
        yield case(f"bf16 D64 {flag}", **{flag: value})
        yield case(f"bf16 D128 {flag}", head_dim=128, **{flag: value})
    yield case("bf16 D192 Dv128", head_dim=192, value_dim=128, causal=True)


CASES = [*_attention_cases()]
