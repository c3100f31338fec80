"""Tensor parallelism of multi-head attention: a style for plans of `torch.distributed.tensor.parallel`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from fastattn.nn.attention import MultiheadAttention


class HeadsParallel(ParallelStyle):
    """Each process of a mesh computes its share of the heads of a `fastattn.nn.MultiheadAttention`.

    The input projections are split by columns, the output projection by rows, whose results are summed once (Shoeybi et al.,
    2019, https://arxiv.org/abs/1909.08053). A packed `in_proj_weight` becomes `q_proj_weight`, `k_proj_weight` and
    `v_proj_weight`, distributed tensors as the other parameters become (checkpoint them with torch.distributed.checkpoint).

    Raises:
        TypeError: the module is no `fastattn.nn.MultiheadAttention`.
        ValueError: heads that the mesh does not divide, `add_bias_kv` or `add_zero_attn`; and later, in the forward,
            `need_weights=True` or a mask that differs among heads: a process has only its own heads.

    Example:
        >>> plan = {"layers.*.self_attn": HeadsParallel(), "layers.*.linear1": ColwiseParallel(),
        ...         "layers.*.linear2": RowwiseParallel()}                                            # doctest: +SKIP
        >>> parallelize_module(encoder, init_device_mesh("cuda", (2,)), plan)                         # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MultiheadAttention):
            raise TypeError(f"module must be a fastattn.nn.MultiheadAttention, got {type(module).__name__}")
        if module.num_heads % device_mesh.size():
            raise ValueError(f"num_heads must be a multiple of the mesh's {device_mesh.size()}, got {module.num_heads}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn must be False: their key belongs to every head")
        packed = module.in_proj_weight
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = packed.chunk(3) if packed is not None else [getattr(module, name) for name in names]
        for name, weight in zip(names, weights):
            setattr(module, name, _distributed(weight, device_mesh, Shard(0)))
        module.register_parameter("in_proj_weight", None)
        if module.in_proj_bias is not None:
            module.in_proj_bias = _distributed(module.in_proj_bias, device_mesh, Replicate())
        RowwiseParallel()._apply(module.out_proj, device_mesh)
        return module


def _distributed(parameter: Tensor, mesh: DeviceMesh, placement: Shard | Replicate) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
