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
import fastattn.models


def attention(
    dtype: str = "bfloat16",
    head_dim: int = 64,
    value_dim: int | None = None,
    kv_heads: int = 2,
    queries: int = 128,
    keys: int = 128,
    flags: tuple[str, ...] = (),
    backward: bool = True,
    batch: int = 1,
    heads: int = 2,
    lse_gradient: bool = True,
) -> None:
    """One training step's attention launches; `flags` names the score features that are on."""
    kind = getattr(torch, dtype)
    query = torch.zeros(batch, heads, queries, head_dim, dtype=kind, requires_grad=backward)
    key = torch.zeros(batch, kv_heads, keys, head_dim, dtype=kind, requires_grad=backward)
    value = torch.zeros(batch, kv_heads, keys, value_dim or head_dim, dtype=kind, requires_grad=backward)
    options: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window": (64, 32)},
        "mask": {"mask": torch.zeros(1, 1, queries, keys, dtype=torch.bool)},
        "blocks": {"mask": fastattn.BlockMask.causal(queries, keys)},
        "bias": {"bias": torch.zeros(1, heads, queries, keys, dtype=kind, requires_grad=backward)},
        "alibi": {"alibi_slopes": torch.zeros(heads)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(heads, requires_grad=backward)},
        "dropout": {"dropout_p": 0.1},
    }
    chosen = {name: value for flag in flags for name, value in options[flag].items()}
    with fastattn.backend.use("triton"):
        out, lse = fastattn.attention(query, key, value, return_lse=True, **chosen)
        if backward:
            outputs = (out, lse) if lse_gradient else (out,)
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def varlen_attention(dtype: str = "bfloat16", head_dim: int = 64, flags: tuple[str, ...] = ("causal",)) -> None:
    """Attention over two packed sequences, forward and backward."""

    def packed(heads: int) -> torch.Tensor:
        return torch.zeros(160, heads, head_dim, dtype=getattr(torch, dtype), requires_grad=True)

    offsets = torch.tensor([0, 64, 160], dtype=torch.int32)
    options: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window": (64, 32)},
        "alibi": {"alibi_slopes": torch.zeros(4)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(4, requires_grad=True)},
        "dropout": {"dropout_p": 0.1},
    }
    chosen = {name: value for flag in flags for name, value in options[flag].items()}
    with fastattn.backend.use("triton"):
        out: Any = fastattn.varlen_attention(packed(4), packed(2), packed(2), offsets, offsets, 96, 96, **chosen)
        torch.autograd.backward(out, torch.zeros_like(out))


def kv_cache(
    dtype: str = "bfloat16",
    head_dim: int = 64,
    heads: int = 8,
    queries: int = 1,
    page_size: int | None = None,
    flags: tuple[str, ...] = (),
) -> None:
    """Tokens appended to the caches of two sequences, attention in several splits, and their merge."""
    kind = getattr(torch, dtype)
    query, new = (torch.zeros(2, h, queries, head_dim, dtype=kind) for h in (heads, 2))
    shape = (2, 2, 1024, head_dim) if page_size is None else (2048 // page_size, 2, page_size, head_dim)
    table = None if page_size is None else torch.zeros(2, 1024 // page_size, dtype=torch.int32)
    options: dict[str, dict[str, Any]] = {
        "window": {"window": (64, 0)},
        "alibi": {"alibi_slopes": torch.zeros(heads)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(heads)},
        "leftpad": {"cache_leftpad": torch.zeros(2, dtype=torch.int32)},
    }
    chosen = {name: value for flag in flags for name, value in options[flag].items()}
    with fastattn.backend.use("triton"):
        fastattn.attention_with_kv_cache(
            query, *torch.zeros(2, *shape, dtype=kind), torch.zeros(2, dtype=torch.int32), key=new, value=new,
            block_table=table, **chosen,
        )  # fmt: skip


def linear_cross_entropy(dtype: str = "bfloat16", classes: int = 1000, **options: Any) -> None:
    """Linear cross entropy, forward and backward; the products around the kernel are PyTorch's."""
    hidden = torch.zeros(64, 32, dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.zeros(classes, 32, dtype=getattr(torch, dtype), requires_grad=True)
    target = torch.zeros(64, dtype=torch.long)
    with fastattn.backend.use("triton"):
        fastattn.linear_cross_entropy(hidden, weight, target, **options).backward()


def cross_entropy(
    dtype: str = "bfloat16", classes: int = 1000, weighted: bool = False, rows: int = 64, **options: Any
) -> None:
    """Cross entropy of logits, with predictions, forward and backward."""
    logits = torch.zeros(rows, classes, dtype=getattr(torch, dtype), requires_grad=True)
    target = torch.zeros(rows, dtype=torch.long)
    options |= {"class_weight": torch.ones(classes)} if weighted else {}
    with fastattn.backend.use("triton"):
        loss, _ = fastattn.cross_entropy(logits, target, return_predictions=True, **options)
        loss.backward()


def rotary(
    dtype: str = "bfloat16",
    head_dim: int = 128,
    rotary_dim: int = 128,
    interleaved: bool = False,
    offsets: bool = False,
    inplace: bool = False,
) -> None:
    """Rotary embedding of 8 query heads and 2 key heads over 2 sequences of 256 tokens, forward and backward."""
    query, key = (
        torch.zeros(2, 256, heads, head_dim, dtype=getattr(torch, dtype), requires_grad=True).transpose(1, 2)
        for heads in (8, 2)
    )
    tables = fastattn.rotary_tables(rotary_dim, 512)
    with fastattn.backend.use("triton"):
        if inplace:
            query, key = query * 1.0, key * 1.0
        offset = torch.tensor([5, 9]) if offsets else 3
        outputs: Any = fastattn.rotary(query, key, *tables, offset=offset, interleaved=interleaved, inplace=inplace)
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def normalization(
    dtype: str = "bfloat16", width: int = 768, rows: int = 64, op: str = "layer_norm", flags: tuple[str, ...] = ()
) -> None:
    """Forward and backward of layer or RMS norm; flags: "plain" (no weight), "residual" (in fp32), "modulation", "dropout"."""
    kind = getattr(torch, dtype)
    row = torch.zeros(rows, width, dtype=kind, requires_grad=True)
    weights: dict[str, Any] = {} if "plain" in flags else {"weight": torch.ones(width, requires_grad=True)}
    if weights and op == "layer_norm":
        weights["bias"] = torch.zeros(width, requires_grad=True)
    if "residual" in flags:
        weights["residual"] = torch.zeros(rows, width, requires_grad=True)
    if "dropout" in flags:
        weights["dropout_p"] = 0.1
    if "modulation" in flags:
        weights["scale"] = torch.zeros(width, dtype=kind, requires_grad=True)
        weights["shift"] = torch.zeros(width, dtype=kind, requires_grad=True)
    with fastattn.backend.use("triton"):
        result = getattr(fastattn, op)(row, width, **weights)
        outputs = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def feed_forward(
    dtype: str = "bfloat16",
    width: int = 256,
    hidden: int = 1024,
    rows: int = 256,
    activation: str = "gelu",
    gated: bool = False,
    recompute: str = "none",
) -> None:
    """Forward and backward of a feed-forward layer with biases; `width` that 16 does not divide is a ragged product."""

    def parameter(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), requires_grad=True)

    first, second = (parameter(hidden, width), parameter(hidden)), (parameter(width, hidden), parameter(width))
    gate = {"gate_weight": parameter(hidden, width), "gate_bias": parameter(hidden)} if gated else {}
    with fastattn.backend.use("triton"):
        out = fastattn.feed_forward(
            parameter(rows, width), *first, *second, activation=activation, recompute=recompute, **gate
        )
        out.backward(torch.zeros_like(out))


def _gpt() -> fastattn.models.GPT:
    config = fastattn.models.GPTConfig(512, context_length=1024, num_layers=2, num_heads=12, d_model=768)
    return fastattn.models.GPT(config)


def training_step(batch: int = 4) -> None:
    """Forward and backward of two layers of GPT-2's width over 4 sequences of 1,024 tokens, bf16 autocast."""
    tokens = torch.zeros(batch, 1024, dtype=torch.long)
    with fastattn.backend.use("triton"), torch.autocast(tokens.device.type, torch.bfloat16):
        _, loss = _gpt()(tokens, tokens)
        loss.backward()


def decode_step() -> None:
    """Two tokens of 8 sequences after a prompt of 512, bf16: the prompt, then one step."""
    tokens = torch.zeros(8, 512, dtype=torch.long)
    with fastattn.backend.use("triton"):
        _gpt().bfloat16().eval().generate(tokens, 2, temperature=0.0)


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
    # fp16 has the configurations and the instructions of bf16
    widths = {"bfloat16": (16, 64, 80, 128, 256), "float16": (64, 128), "float32": (16, 64, 80, 128, 256)}
    for dtype, head_dims in widths.items():
        for head_dim in head_dims:
            for name, flags in {"full": [], "causal": ["causal"], "everything": everything}.items():
                yield case(f"{dtype} D{head_dim} {name}", dtype=dtype, head_dim=head_dim, flags=flags)
    for flag in everything:
        yield case(f"bf16 D64 {flag}", flags=[flag])
        yield case(f"bf16 D128 {flag}", head_dim=128, flags=[flag])
        yield case(f"bf16 D256 {flag}", head_dim=256, flags=[flag])
        yield case(f"fp32 D128 {flag}", dtype="float32", head_dim=128, flags=[flag])
    some = {"queries": 256, "keys": 256}  # one block in a row would be a constant
    for head_dim in (64, 128, 256):
        yield case(f"bf16 D{head_dim} blocks", core=head_dim == 128, head_dim=head_dim, flags=["blocks"], **some)
        yield case(f"fp32 D{head_dim} blocks", dtype="float32", head_dim=head_dim, flags=["blocks"], **some)
        for dtype in ("float16", "float32"):
            name = f"{dtype} D{head_dim} blocks everything".replace("float", "fp")
            yield case(name, dtype=dtype, head_dim=head_dim, flags=["blocks", *everything[2:]], **some)
    # a mask of 512 pairs a side and more is read by blocks, found by kernels of their own
    large = {"queries": 512, "keys": 512}
    yield case("bf16 D64 large mask", core=True, flags=["mask"], backward=False, **large)
    for head_dim in (128, 256):
        yield case(f"bf16 D{head_dim} large mask", head_dim=head_dim, flags=["mask"], **large)
    yield case("bf16 D128 large mask window", head_dim=128, flags=["mask", "window"], **large)
    yield case("fp32 D64 large mask odd", dtype="float32", flags=["mask"], queries=515, keys=601)
    yield case("bf16 D192 Dv128", head_dim=192, value_dim=128, flags=["causal"])
    yield case("fp32 D192 Dv80 everything", core=True, dtype="float32", head_dim=192, value_dim=80, flags=everything)
    yield case("bf16 D192 everything", head_dim=192, flags=everything)
    yield case("bf16 D96 Dv160 everything", head_dim=96, value_dim=160, flags=everything)
    # Triton specialises kernels by which strides 16 divides; a training step has no gradient of the LSE
    odd = {"queries": 101, "keys": 131, "flags": everything}
    for head_dim in (72, 128, 256):
        yield case(f"bf16 D{head_dim} odd everything", head_dim=head_dim, **odd)
        yield case(f"fp32 D{head_dim} odd everything", dtype="float32", head_dim=head_dim, **odd)
    grouped = {"heads": 8, "lse_gradient": False}
    for head_dim in (32, 64, 96, 128, 256):
        yield case(f"bf16 D{head_dim} grouped causal", head_dim=head_dim, flags=["causal"], **grouped)
    for flag in ("mask", "bias", "alibi", "softcap"):
        for head_dim in (64, 128, 256):
            of_one = {"head_dim": head_dim, "flags": ["causal", flag]}
            yield case(f"bf16 D{head_dim} causal {flag}", **of_one)
            yield case(f"bf16 D{head_dim} grouped causal {flag}", **of_one, **grouped)
    for head_dim in (64, 128, 256):
        yield case(f"bf16 D{head_dim} window sinks alibi", head_dim=head_dim, flags=["window", "sinks", "alibi"])
    for dtype in ("bfloat16", "float32"):
        yield case(f"{dtype} D128 grouped everything", dtype=dtype, head_dim=128, heads=8, flags=everything)


def _normalization_cases() -> Iterator[Case]:
    def case(name: str, core: bool = False, **arguments: Any) -> Case:
        return Case(f"norm {name}", "normalization", arguments, core)

    yield case("bf16 768", core=True)
    yield case("fp32 100 residual modulation", core=True, dtype="float32", width=100, flags=["residual", "modulation"])
    yield case("bf16 8192", core=True, width=8192)
    yield case(
        "fp32 8192 everything", core=True, dtype="float32", width=8192, flags=["residual", "modulation", "dropout"]
    )
    yield case("bf16 8192 everything", core=True, width=8192, flags=["residual", "modulation", "dropout"])
    yield case("fp16 20000", core=True, dtype="float16", width=20000)
    yield case("bf16 4096 rms residual", core=True, width=4096, op="rms_norm", flags=["residual"])
    for width in (64, 256, 1024, 2048, 4096, 16384, 65536):
        for dtype in ("bfloat16", "float32"):
            yield case(f"{dtype} {width}", dtype=dtype, width=width)
            yield case(f"{dtype} {width} modulation", dtype=dtype, width=width, flags=["modulation"])
            yield case(f"{dtype} {width} plain", dtype=dtype, width=width, flags=["plain"])
            yield case(f"{dtype} {width} everything", dtype=dtype, width=width, flags=["residual", "modulation"])


def _feed_forward_cases() -> Iterator[Case]:
    def case(name: str, core: bool = False, **arguments: Any) -> Case:
        return Case(f"feed_forward {name}", "feed_forward", arguments, core)

    yield case(
        "fp16 gated silu recompute", core=True, dtype="float16", activation="silu", gated=True, recompute="hidden"
    )
    yield case("fp32 ragged relu", core=True, dtype="float32", width=50, hidden=130, activation="relu")
    for activation in ("relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"):
        for gated in (False, True):
            name = f"{activation}{' gated' if gated else ''}"
            yield case(f"bf16 {name}", core=name == "gelu", activation=activation, gated=gated)
            yield case(f"fp32 {name}", dtype="float32", activation=activation, gated=gated)
    for recompute in ("activation", "hidden"):
        yield case(f"bf16 recompute {recompute}", recompute=recompute)
        yield case(f"bf16 gated recompute {recompute}", recompute=recompute, gated=True)


def _other_cases() -> Iterator[Case]:
    yield Case("varlen bf16 D64 causal", "varlen_attention", {}, core=True)
    flags = ["window", "alibi", "softcap", "sinks", "dropout"]
    yield Case("varlen fp16 D80 everything", "varlen_attention", {"dtype": "float16", "head_dim": 80, "flags": flags})
    for dtype in ("bfloat16", "float32"):
        for head_dim in (64, 128, 192, 256):
            for name, chosen in {"causal": ["causal"], "everything": flags}.items():
                arguments = {"dtype": dtype, "head_dim": head_dim, "flags": chosen}
                spilled = (("bfloat16", 64, "everything"), ("float32", 256, "everything"), ("bfloat16", 256, "causal"))
                core = (dtype, head_dim, name) in spilled
                yield Case(f"varlen {dtype} D{head_dim} {name}", "varlen_attention", arguments, core)
    for head_dim in (64, 128, 256):
        arguments = {"head_dim": head_dim, "flags": ["causal", "alibi"]}
        yield Case(f"varlen bf16 D{head_dim} causal alibi", "varlen_attention", arguments)
    yield Case("rotary bf16 D128", "rotary", {}, core=True)
    partial = {"dtype": "float32", "head_dim": 80, "rotary_dim": 32, "interleaved": True, "offsets": True}
    yield Case("rotary fp32 D80 partial interleaved", "rotary", partial, core=True)
    yield Case(
        "rotary fp16 D64 in place", "rotary", {"dtype": "float16", "head_dim": 64, "rotary_dim": 64, "inplace": True}
    )
    yield Case("rotary bf16 D256 interleaved", "rotary", {"head_dim": 256, "rotary_dim": 256, "interleaved": True})
    yield Case("kv cache bf16 D128", "kv_cache", {"head_dim": 128}, core=True)
    yield Case("kv cache bf16 D128 leftpad", "kv_cache", {"head_dim": 128, "flags": ["leftpad"]})
    features = ["window", "alibi", "softcap", "sinks", "leftpad"]
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (16, 64, 80, 128, 256):
            where = {"dtype": dtype, "head_dim": head_dim}
            yield Case(f"kv cache {dtype} D{head_dim}", "kv_cache", where)
            paged = {**where, "page_size": 16, "flags": features}
            core = (dtype, head_dim) in (("float16", 80), ("float32", 256))
            yield Case(f"kv cache {dtype} D{head_dim} paged everything", "kv_cache", paged, core)
    for queries in (8, 64):
        for head_dim in (64, 128, 256):
            several = {"head_dim": head_dim, "queries": queries}
            yield Case(f"kv cache bf16 D{head_dim} {queries} tokens", "kv_cache", several)
    everything = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    yield Case("linear cross entropy bf16", "linear_cross_entropy", {}, core=True)
    yield Case("linear cross entropy fp16 everything", "linear_cross_entropy", {"dtype": "float16", **everything})
    yield Case("linear cross entropy fp32 of 50257", "linear_cross_entropy", {"dtype": "float32", "classes": 50257})
    yield Case("cross entropy bf16 of 50304", "cross_entropy", {"classes": 50304}, core=True)
    weighted = {"dtype": "float32", "weighted": True, **everything}
    yield Case("cross entropy fp32 weighted everything", "cross_entropy", weighted, core=True)


CASES = [*_attention_cases(), *_normalization_cases(), *_feed_forward_cases(), *_other_cases()]
