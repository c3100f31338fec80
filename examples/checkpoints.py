"""The checkpoints of a run on any number of processes: one file, or with FSDP a folder of shards.

    checkpoint.pt              one process, or DDP
    checkpoint-<step>/         FSDP: each process writes its shards, the main one run.json

Both are read by every kind and number of processes. A checkpoint appears under its name when it is complete; the older
ones are deleted after that, and nothing else is: a folder counts where it holds what FSDP's checkpoints consist of.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from parallel import Processes
from torch import nn
from training import Checkpoint, TrainingError, readable


def find(out: Path) -> list[Path]:
    """The checkpoints in `out`, the one to go on from first; several where a process died before it deleted the others."""
    file = out / "checkpoint.pt"
    steps = {path: path.name.removeprefix("checkpoint-") for path in out.glob("checkpoint-*")}
    ours = [path for path, step in steps.items() if step.isdecimal() and _is_sharded(path)]
    folders = sorted(ours, key=lambda path: int(steps[path]), reverse=True)
    return [file, *folders] if file.exists() else folders


def _is_sharded(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("run.json", ".metadata"))


def delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Checkpoints:
    """Saves and loads everything that a run needs to go on; all its processes call each method together.

    Args:
        out: the run's folder.
        identity: nested settings that decide the loss curve; a checkpoint with other ones is refused.
        processes: that train the model.
    """

    def __init__(self, out: Path, identity: dict[str, Any], processes: Processes) -> None:
        self.out = out
        self.processes = processes
        self.file = Checkpoint(out / "checkpoint.pt", identity, may_grow="training.steps")
        self._current: Path | None = None  # what this run loaded or saved last

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, **progress: Any) -> None:
        progress["step"] = step
        written = self.file.path
        if self.processes.kind == "fsdp":
            written = self.out / f"checkpoint-{step}"
            if written != self._current:
                self._save_shards(written, model, optimizer, progress)
        elif self.processes.main:
            self.file.save(model, optimizer, self.processes.device, **progress)
        self._current = written
        if self.processes.main:
            delete([path for path in find(self.out) if path != written])

    def _save_shards(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
    ) -> None:
        import shards

        temporary = self.out / ".checkpoint.tmp"
        try:
            with self.processes.main_first():
                if self.processes.main:
                    shutil.rmtree(temporary, ignore_errors=True)
            shards.save(temporary, model, optimizer)
            if self.processes.main:
                (temporary / "run.json").write_text(json.dumps({"identity": self.file.identity, "progress": progress}))
                delete([path for path in find(self.out) if path == folder])  # of the run that this one overwrites
                os.rename(temporary, folder)
        except (shards.ShardError, OSError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = "; the previous checkpoint is unharmed" if find(self.out) else ""
            raise TrainingError(f"cannot write the checkpoint {folder}: {error}{kept}") from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restore model and optimizer; the step and the other progress that was saved are returned."""
        path = self._current = find(self.out)[0]
        if path == self.file.path and self.processes.kind != "fsdp":
            return self.file.load(model, optimizer, self.processes.device)
        import shards

        if path == self.file.path:
            state = self.file.read("cpu")
            with readable(path):
                shards.distribute(state["model"], state["optimizer"], model, optimizer)
                return dict(state["progress"])
        with readable(path):
            run = json.loads((path / "run.json").read_text())
            self.file.check(run["identity"], path)
            shards.load(path, model, optimizer)
            return dict(run["progress"])
