"""Training one model on several processes, which torchrun starts: DistributedDataParallel or FSDP2, over gloo or NCCL.

Each process computes its share of every batch. The order of the data does not depend on the processes, so the losses are
those of one process, up to rounding, and a run may go on with another number of them.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import training
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import TrainingError

from fastattn.models import GPT

KINDS = ("none", "ddp", "fsdp")


class Processes:
    """The processes that train one model together; a single one does not notice them.

    Attributes:
        kind: "none", "ddp" (each process holds the model) or "fsdp" (each holds a shard of every weight).
        rank, count: number of this process, and how many there are.
        device: this process's own.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self.rank, self.count = (0, 1) if kind == "none" else (dist.get_rank(), dist.get_world_size())

    def __str__(self) -> str:
        return str(self.device) if self.kind == "none" else f"{self.count} {self.device.type} processes ({self.kind})"

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of a batch."""
        return rows[self.rank :: self.count]

    def sum(self, value: float) -> float:
        """Over the processes; it makes them wait for each other."""
        if self.count == 1:
            return value
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """Over the processes."""
        return value if self.count == 1 else int(self._reduce(value, dist.ReduceOp.MAX))

    def _reduce(self, value: float, how: dist.ReduceOp) -> float:
        result = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(result, how)
        return result.item()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """What FSDP keeps in parts."""
        return tensor.full_tensor() if self.kind == "fsdp" else tensor

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others enter when the main process has left: they find what it prepared."""
        if not self.main:
            self.sum(0.0)
        yield
        if self.main:
            self.sum(0.0)

    def wrap(self, model: GPT) -> nn.Module:
        """What to call instead of `model`, whose gradients become means over the processes; FSDP2 shards it in place."""
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh(self.device.type, (self.count,))
            for module in (*model.blocks, model):
                fully_shard(module, mesh=mesh)
        return model

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Within it the processes exchange gradients only after the `last` of a step's backward passes."""
        if self.kind == "ddp" and not last:
            return wrapped.no_sync()
        if self.kind == "fsdp":
            wrapped.set_requires_gradient_sync(last)
        return nullcontext()

    def save_pretrained(self, model: GPT, folder: Path) -> None:
        """The main process writes the whole model; the others wait until it has."""
        if self.kind == "fsdp":
            model.save_pretrained(folder)
            return
        with self.main_first():
            if self.main:
                model.save_pretrained(folder)


def rank() -> int:
    """Number of this process among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def join(kind: str, device: str) -> Iterator[Processes]:
    """Become one of the processes that torchrun started; all but the first no longer print.

    Args:
        kind: one of KINDS.
        device: "auto", or a device's name; each process takes its own GPU.

    Raises:
        TrainingError: `kind` and torchrun do not go together, there are fewer GPUs than processes, or another process ended.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        if count > 1:
            raise TrainingError(f"torchrun started {count} processes: add --parallel ddp or --parallel fsdp")
        yield Processes(kind, training.choose_device(device))
        return
    if not dist.is_available():
        raise TrainingError("--parallel needs torch.distributed, which this PyTorch was built without")
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        command = f"torchrun --nproc-per-node 2 {sys.argv[0]} --parallel {kind}"
        raise TrainingError(f"--parallel {kind} needs torchrun, which starts the processes: {command} ...")
    chosen = training.choose_device(device)
    if chosen.type != "cpu":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.accelerator.device_count()
        if ":" in device:
            raise TrainingError(f"--device {device} is one GPU; each process takes its own: --device {chosen.type}")
        if here > gpus:
            raise TrainingError(f"{here} processes on a machine with {gpus} GPUs: at most one each, or --device cpu")
        chosen = torch.device(chosen.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(chosen)
    dist.init_process_group(dist.get_default_backend_for_device(chosen))
    with open(os.devnull, "w") as silence, redirect_stdout(silence) if rank() else nullcontext():
        try:
            yield Processes(kind, chosen)
        except RuntimeError as error:
            if not _lost(error):
                raise
            raise TrainingError("another process of this run has ended; what was saved before is unharmed") from error
    dist.destroy_process_group()  # after an error it could wait for processes that wait for this one


def _lost(error: RuntimeError) -> bool:
    """Whether a process that this one waits for is gone; gloo has no class for that."""
    return isinstance(error, dist.DistError) or ("gloo" in str(error) and "by peer" in str(error))


def prepare_blocks(model: GPT, *, compiled: bool, checkpointed: bool) -> None:
    """Change how the blocks compute, where they stand, so that parameters keep their names.

    Args:
        compiled: by torch.compile; the blocks are alike, so there is one compilation. It comes first: torch.compile does
            not look into a checkpointed function.
        checkpointed: only each block's input is kept for the backward pass, which computes the block a second time.
    """
    for block in model.blocks:
        if compiled:
            block.forward = torch.compile(block.forward)
        if checkpointed:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
