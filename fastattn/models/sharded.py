"""Models whose parameters are shared among processes (FSDP2, tensor parallelism), as one process would hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PROJECTIONS = ("query", "key", "value")


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of them is a distributed tensor."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors.values())


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU, in the names of a model that is not shared; nothing for who does not `keep` them.

    Every process has to call this.
    """
    whole = {}
    for name, tensor in tensors.items():
        one = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            whole[name] = one.cpu()
    for name in [name for name in whole if ".in_proj.query." in name]:  # tensor_parallel.SplitProjection
        parts = [whole.pop(name.replace(".query.", f".{part}.")) for part in _PROJECTIONS]
        whole[name.replace(".query.", ".")] = torch.cat(parts)
    return whole


@contextmanager
def unsharded(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Inside, an FSDP2 model holds its own parameters whole, so that methods other than `forward` work; its blocks gather theirs."""
    unshard, reshard = getattr(model, "unshard", None), getattr(model, "reshard", None)
    if unshard is None or reshard is None:
        yield
        return
    with torch.no_grad():
        model(tokens[:1, :1])  # from its first forward FSDP knows that this is the root
    unshard()
    try:
        yield
    finally:
        reshard()
