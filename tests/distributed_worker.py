"""Training runs, alone or on several processes: what each process of tests/test_distributed.py runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastattn
from fastattn.models import GPT, GPTConfig

WRAPPERS = ("ddp", "fsdp", "fsdp_linears")
STEPS, BATCH, LENGTH, WIDTH = 3, 4, 6, 16


class Encoder(nn.Module):
    """Ours, or torch's that was patched; returns a loss."""

    def __init__(self, patched: bool) -> None:
        super().__init__()
        library = nn if patched else fastattn.nn
        layer = library.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = library.TransformerEncoder(layer, 2, library.LayerNorm(WIDTH), enable_nested_tensor=False)
        if patched:
            fastattn.patch(self)

    def forward(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - x.flip(1)).square().mean()


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(GPTConfig(vocab_size=40, context_length=LENGTH, num_layers=2, num_heads=4, d_model=WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 20).long().clamp(max=39)
        return self.gpt(tokens, tokens.roll(-1, 1))[1]


MODELS = {"encoder": lambda: Encoder(False), "patched": lambda: Encoder(True), "gpt": LanguageModel}


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.gpt.blocks if isinstance(model, LanguageModel) else model.encoder.layers)


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp_linears":
        for module in [m for m in model.modules() if type(m) is nn.Linear]:
            fully_shard(module)
    if how.startswith("fsdp"):
        for block in blocks(model):
            fully_shard(block)
        return fully_shard(model)
    return model


def train(name: str, how: str = "alone") -> list[float]:
    """The losses of `STEPS` steps over the same data, whatever the number of processes."""
    torch.manual_seed(0)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = wrap(MODELS[name](), how)
    data = torch.randn(BATCH, LENGTH, WIDTH).chunk(world)[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append((total / world).item())
    return losses


def run_all(rank: int, world: int, folder: str) -> None:
    """What each of `world` processes runs: every case, one after the other; the losses go to `folder`."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", FASTATTN_BACKEND="eager")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(Path(folder) / "store"), world), rank=rank, world_size=world
    )
    losses = {(name, how): train(name, how) for name in MODELS for how in WRAPPERS}
    if rank == 0:
        torch.save(losses, Path(folder) / "losses.pt")
    dist.destroy_process_group()
