"""Tensor parallelism of a GPT: each process computes its share of the heads and of the hidden features.

The first product of each pair is split by columns, the second by rows, whose results are summed once (Shoeybi et al.,
2019, https://arxiv.org/abs/1909.08053). Embeddings, norms and the loss are computed by every process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from fastattn.models.gpt import GPT
from fastattn.models.layers import SelfAttention

_COLUMNS = ("attention.in_proj.query", "attention.in_proj.key", "attention.in_proj.value")


class SplitProjection(nn.Module):
    """The queries, keys and values of `SelfAttention.in_proj`, side by side, from a layer for each."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        rows = [n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)]
        packed = attention.in_proj
        weights = packed.weight.detach().split(rows)
        biases = [None] * 3 if packed.bias is None else packed.bias.detach().split(rows)
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def tensor_parallel(model: GPT, mesh: DeviceMesh) -> GPT:
    """Divide the blocks of `model` among the processes of `mesh`, in place, with `parallelize_module`.

    Every process calls this with the same weights, and then the model with the same tokens. The parameters that are shared
    become distributed tensors (`save_pretrained` gathers them, torch.distributed.checkpoint saves them in parts), and each
    `attention.in_proj` becomes three layers, so that whole heads can be shared. FSDP2 over another dimension of the mesh
    comes afterwards.

    Args:
        model: as it was built or loaded.
        mesh: of one dimension; its size must divide the heads of keys and values, and d_ff.

    Returns:
        the model.

    Raises:
        ValueError: a mesh that does not fit the model; nothing has happened to it then.

    Example:
        >>> mesh = torch.distributed.init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> model = tensor_parallel(GPT.from_pretrained(folder), mesh)  # doctest: +SKIP
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: pass mesh['tensor'], a slice of it")
    for name in ("num_heads", "num_kv_heads", "d_ff"):
        if getattr(model.config, name) % mesh.size():
            raise ValueError(
                f"{name} must be a multiple of the mesh's {mesh.size()}, got {getattr(model.config, name)}"
            )
    hidden = ("feed_forward.linear1", "feed_forward.gate") if model.config.gated else ("feed_forward.linear1",)
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in (*_COLUMNS, *hidden)}
    plan |= {name: RowwiseParallel() for name in ("attention.out_proj", "feed_forward.linear2")}
    for block in model.blocks:
        attention: SelfAttention = block.attention  # type: ignore[assignment]
        attention.in_proj = SplitProjection(attention)  # type: ignore[assignment]
        parallelize_module(block, mesh, plan)
    return model
