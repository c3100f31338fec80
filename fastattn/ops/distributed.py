"""Attention of distributed tensors (DTensor): each process computes batches and heads of its own, which need nothing of the others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.block_mask import Blocks
from fastattn.ops.library import in_transform
from fastattn.score_rules import ScoreRules


def is_distributed(*tensors: Tensor | None) -> bool:
    """Whether one of them is; in transforms, which put tensors of theirs around them, none can be shared out."""
    return not in_transform() and any(hasattr(t, "device_mesh") for t in tensors)


def in_shares(function: Callable[..., tuple[Tensor, ...]], query: Any, key: Any, value: Any, rules: ScoreRules) -> Any:
    """`function(query, key, value, rules)`, tensors (B, Hq, ...), of canonical arguments some of which are distributed.

    As with PyTorch's own operations: what is sharded in another way than by batches or heads is gathered first; a plain mask,
    bias, slopes or sinks are the same in every process, and their gradients the whole ones.

    Raises:
        ValueError: query, key and value that are not all distributed, over one mesh; dropout, whose seed and whose places
            each process would have for itself.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not all(isinstance(t, DTensor) and t.device_mesh == query.device_mesh for t in (query, key, value)):
        kinds = ", ".join(type(t).__name__ for t in (query, key, value))
        raise ValueError(f"query, key and value must be DTensors over one mesh where one argument is one, got {kinds}")
    if rules.seed is not None:
        raise ValueError(f"dropout_p must be 0 where query, key and value are DTensors, got {rules.dropout_p}")
    mesh = query.device_mesh
    axes = _axes(query, key, value)
    shares = [Replicate() if axis is None else Shard(axis) for axis in axes]

    def own(tensor: Tensor | None, first: int = 0) -> Any:
        """This process's share of a tensor whose dimension 0 is the batches', or (`first` 1) the heads'."""
        if tensor is None:
            return None
        whole = tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)
        dims = [
            None if axis is None or axis < first or tensor.shape[axis - first] == 1 else axis - first for axis in axes
        ]
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        # of numbers that are the same for all batches or heads, each process has a part of the gradient
        gradients = [Partial() if p == Replicate() and axis is not None else p for axis, p in zip(axes, placements)]
        return whole.redistribute(mesh, placements).to_local(grad_placements=gradients)

    mask = rules.mask
    if isinstance(mask, Blocks):
        mask = Blocks(mask.tiles, *[own(t) for t in mask[1:]])
    else:
        mask = own(mask)
    slopes, bias, sinks = own(rules.alibi_slopes), own(rules.bias), own(rules.sinks, first=1)
    rules = rules._replace(mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks)
    results = function(own(query), own(key), own(value), rules)
    return tuple(_whole(result, mesh, shares, query.shape[:2]) for result in results)


def _axes(query: Any, key: Any, value: Any) -> list[int | None]:
    """For each dimension of the mesh: 0 where its processes share the batches, 1 the heads, None where all compute all."""
    axes: list[int | None] = []
    parts = 1  # that the heads are cut into
    for i, size in enumerate(query.device_mesh.shape):
        given = [axis for t in (query, key, value) for axis in (0, 1) if t.placements[i].is_shard(axis)]
        axis = given[0] if given and query.shape[given[0]] > 1 else None
        if axis == 1:
            even = query.shape[1] % (parts * size) == 0 and (key.shape[1] == 1 or key.shape[1] % (parts * size) == 0)
            axis, parts = (1, parts * size) if even else (None, parts)
        axes.append(axis)
    return axes


def _whole(share: Tensor, mesh: Any, placements: list[Any], leading: tuple[int, ...]) -> Tensor:
    """The distributed tensor (*leading, ...) that processes have such shares of, in their memory layout."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*leading, *share.shape[2:]])
    together = share.dim() == 4 and share.stride(1) < share.stride(2)  # a row's heads, as in `layout.new_output`
    like = torch.empty(shape, device="meta")
    stride = like.transpose(1, 2).contiguous().transpose(1, 2).stride() if together else like.stride()
    return DTensor.from_local(share, mesh, placements, shape=shape, stride=stride)
