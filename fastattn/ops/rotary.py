"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import checks
from fastattn.backend import device_guard, implementation
from fastattn.eager.rotary import definition
from fastattn.layout import as_output, new_output
from fastattn.ops.library import call, define, differentiate, left_to_compiler, needs_composite, tensors_only
from fastattn.tracing import readable

INTEGERS = (torch.int64, torch.int32)


def rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864) of query and key.

    Each pair (a, b) of a head's first 2 · half numbers turns by the angle θ of its token and pair; the rest stays:

        (a, b) → (a cos θ - b sin θ, b cos θ + a sin θ)

    The pairs are number j with number half + j (GPT-NeoX, Llama), or if `interleaved` 2j with 2j + 1 (GPT-J). The products
    are fp32 for every dtype, and autocast changes nothing. `fastattn.rotary_tables` makes the tables.

    Args:
        query: (B, Hq, N, D), fp32, fp16 or bf16, any strides.
        key: (B, Hkv, N, D), dtype of `query`, or None.
        cos, sin: (rows, half), a row for each position, or (B or 1, N, half), a row for each token; fp32, fp16 or bf16;
            2 · half at most D (less: a partial rotary dimension). They may be scaled, as YaRN does.
        positions: int64 or int32 (N,) or (B or 1, N): the row of each token; default 0, 1, 2, ...
        offset: added to the default positions: an int, or int64 or int32 (B,), such as the lengths of a cache.
        interleaved: which numbers are a pair.
        inplace: write over `query` and `key`, and return them. As with PyTorch's own in-place functions, neither may be
            a leaf that needs a gradient, and a backward that needs the numbers from before raises an error.

    On the CPU, a position outside the tables is an error; on a GPU, where a check would make the host wait, its rows become NaN. A
    gradient of `cos` or `sin`, where one is asked for, is computed in PyTorch on every device.

    Returns:
        (query, key) rotated, in their dtype; key is None where none was given.

    Raises:
        TypeError: dtypes that are not supported or differ.
        ValueError: shapes that do not match, positions outside the tables, `inplace` where that is impossible.

    Example:
        >>> cos, sin = fastattn.rotary_tables(4, 8)
        >>> q, _ = rotary(torch.ones(1, 1, 1, 4), None, cos, sin, offset=2)
        >>> q
        tensor([[[[-1.3254,  0.9798,  0.4932,  1.0198]]]])
    """
    if not isinstance(offset, Tensor):
        offset = checks.check_integer("offset", offset, least=None)
    _check(query, key, cos, sin, positions, offset)
    if isinstance(offset, Tensor):
        steps = torch.arange(query.shape[2], device=offset.device)
        positions, offset = offset[:, None] + steps, 0
    elif positions is not None and positions.dim() == 1:
        positions = positions[None]
    cos, sin = (table if table.dim() == 3 else table[None] for table in (cos, sin))
    constants = (cos, sin, positions, offset, interleaved)
    if inplace:
        _check_inplace(query, key)
        return _rotate_inplace(query, key, constants)
    return _rotate(query, key, constants)


def _needs_definition(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
    table_gradient = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    return table_gradient or needs_composite(query, key, cos, sin)


def _rotate(query: Tensor, key: Tensor | None, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    cos, sin, positions, *_ = constants
    if _needs_definition(query, key, cos, sin) or (positions is None and left_to_compiler(query, key, cos, sin)):
        _check_rows(positions, cos.shape[1])
        query, key = _in_rows(query), None if key is None else _in_rows(key)
        rotated = as_output(definition(query, *constants), query)
        return rotated, None if key is None else as_output(definition(key, *constants), key)
    rotated, rotated_key = call(rotary_op, query, key, *constants, False)
    return rotated, None if key is None else rotated_key


def _rotate_inplace(query: Tensor, key: Tensor | None, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key))
    cos, sin, positions, *_ = constants
    if _needs_definition(query, key, cos, sin) or (recorded and torch.compiler.is_compiling()):
        before, key_before = query, key
        if cos.requires_grad or sin.requires_grad:  # whose gradients need the numbers that are written over
            before, key_before = query.clone(), None if key is None else key.clone()
        rotated, rotated_key = _rotate(before, key_before, constants)
        return query.copy_(rotated), None if key is None or rotated_key is None else key.copy_(rotated_key)
    if recorded:
        _check_rows(positions, cos.shape[1])  # before autograd is told that they are written over
        query = _Overwritten.apply(query, *constants)
        key = None if key is None else _Overwritten.apply(key, *constants)
        call(rotary_in_place_op, query.detach(), None if key is None else key.detach(), *constants)
    else:
        call(rotary_in_place_op, query, key, *constants)
    return query, key


def _check(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int | Tensor
) -> None:
    checks.check_tensor("query", query)
    checks.check_rank("query", query, 4, "(B, Hq, N, D)")
    batch, _, tokens, dim = query.shape
    if key is not None:
        checks.check_tensor("key", key, (query.dtype,))
        checks.check_rank("key", key, 4, "(B, Hkv, N, D)")
        if (key.shape[0], *key.shape[2:]) != (batch, tokens, dim):
            raise ValueError(
                f"key must be (B, Hkv, N, D) = ({batch}, Hkv, {tokens}, {dim}) as query, got {tuple(key.shape)}"
            )
    checks.check_tensor("cos", cos)
    checks.check_tensor("sin", sin)
    if cos.dim() not in (2, 3) or not 1 <= cos.shape[-1] <= dim // 2:
        raise ValueError(
            f"cos must be (rows, half) or (B, N, half) with 1 <= half <= {dim // 2}, got shape {tuple(cos.shape)}"
        )
    checks.check_shape("sin", sin, tuple(cos.shape), "the shape of cos")
    by_token = cos.dim() == 3
    if by_token and (cos.shape[0] not in (1, batch) or cos.shape[1] != tokens):
        raise ValueError(f"cos must be ({batch} or 1, {tokens}, half), a row for each token, got {tuple(cos.shape)}")
    has_offset = isinstance(offset, Tensor) or offset != 0
    if (by_token and has_offset) or (positions is not None and (by_token or has_offset)):
        raise ValueError("only one of positions, offset and tables with a row for each token can be given")
    if positions is not None:
        checks.check_tensor("positions", positions, INTEGERS)
        if tuple(positions.shape) not in ((tokens,), (1, tokens), (batch, tokens)):
            raise ValueError(f"positions must be ({tokens},) or ({batch} or 1, {tokens}), got {tuple(positions.shape)}")
    if isinstance(offset, Tensor):
        checks.check_tensor("offset", offset, INTEGERS)
        checks.check_shape("offset", offset, (batch,), "one for each sequence")
    elif positions is None and not 0 <= offset <= cos.shape[-2] - tokens:
        raise ValueError(f"offset must be in [0, {cos.shape[-2]} rows - {tokens} tokens], got {offset}")
    given = {"positions": positions, "offset": offset if isinstance(offset, Tensor) else None}
    checks.check_same_device(query=query, key=key, cos=cos, sin=sin, **given)


def _check_inplace(query: Tensor, key: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key)):
        if x is None:
            continue
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise ValueError(f"inplace must be False: {name} is a leaf that needs a gradient")
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError(f"inplace must be False: elements of {name} share memory (it is expanded)")


def _check_rows(positions: Tensor | None, rows: int) -> None:
    if positions is None or not readable(positions):
        return
    wrong = positions[(positions < 0) | (positions >= rows)]
    if wrong.numel():
        raise ValueError(f"positions (and offset) must be in [0, {rows}), the rows of cos, got {wrong[0].item()}")


class _Overwritten(torch.autograd.Function):
    """What in-place rotation of one tensor is to autograd: the tensor itself, with the rotation's gradient.

    Its numbers are rotated afterwards, query and key in one launch; the backward needs none of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *constants: Any) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(*constants[:3])
        ctx.constants = constants[3:]
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return call(rotary_op, grad, None, *ctx.saved_tensors, *ctx.constants, True)[0], *[None] * 5


def _in_rows(x: Tensor) -> Tensor:
    """`x`, whose heads' numbers are neighbours in memory."""
    return x if x.stride(3) == 1 else x.contiguous()


def _launch(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    _check_rows(positions, cos.shape[1])
    cos, sin = (table if table.stride(2) == 1 else table.contiguous() for table in (cos, sin))
    with device_guard(query.device):
        return implementation("rotary", query.device).rotate(
            query, key, cos, sin, positions, offset, interleaved, conjugate, inplace
        )


def _forward(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, ...]:
    query, key = _in_rows(query), None if key is None else _in_rows(key)
    return tensors_only(query, *_launch(query, key, cos, sin, positions, offset, interleaved, conjugate, False))


def _fake(query: Tensor, key: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    query, key = _in_rows(query), None if key is None else _in_rows(key)
    return tensors_only(query, *(x if x is None else new_output(x, x.shape[3]) for x in (query, key)))


rotary_op = define(
    "rotary(Tensor query, Tensor? key, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved, "
    "bool conjugate) -> (Tensor query, Tensor key)",
    _forward,
    _fake,
)


def _inplace(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> None:
    given = [x for x in (query, key) if x is not None]
    if all(x.stride(3) == 1 for x in given):
        _launch(query, key, cos, sin, positions, offset, interleaved, False, True)
        for x in given:
            if not x.is_inference():
                torch.autograd.graph.increment_version(x)  # a kernel's writes are invisible to autograd
    else:
        for x, y in zip(given, _forward(query, key, cos, sin, positions, offset, interleaved, False)):
            x.copy_(y)


def _inplace_fake(*arguments: Any) -> None:
    return None


rotary_in_place_op = define(
    "rotary_(Tensor(a!) query, Tensor(b!)? key, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, "
    "bool interleaved) -> ()",
    _inplace,
    _inplace_fake,
)


def _gradient(
    needs: Sequence[bool], grad_outputs: Sequence[Tensor | None], arguments: Sequence[Any], outputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """A rotation is linear: its gradient is the rotation back, by the same op."""
    *_, cos, sin, positions, offset, interleaved, conjugate = arguments
    wanted = [i for i in (0, 1) if needs[i] and grad_outputs[i] is not None]
    given = [grad_outputs[i] for i in wanted] + [None]
    grads: list[Tensor | None] = [None, None]
    if wanted:
        found = call(rotary_op, given[0], given[1], cos, sin, positions, offset, interleaved, not conjugate)
        for i, grad in zip(wanted, found):
            grads[i] = grad
    return grads


differentiate(rotary_op, _gradient, drop_arguments=(0, 1))


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What `fastattn.explain` says of a call of this module's functions."""
    given = inspect.signature(function).bind(*args, **options).arguments
    return implementation("rotary", given["query"].device).explain(given["query"], given["cos"])
