"""State of a model and its optimizer that is spread over processes, by torch.distributed.checkpoint.

Its parts are known by the parameters' names, not by the process that holds them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


class ShardError(Exception):
    """A process cannot read or write its part."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each process writes its shards into `folder`."""
    weights, state = get_state_dict(model, optimizer)
    with _first_failure():
        checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each process reads what it needs of `folder`, whatever the number of processes that wrote it."""
    weights, state = get_state_dict(model, optimizer)
    with _first_failure(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process: as intended
        checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def distribute(
    weights: dict[str, Any], state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Give each process its shards of the state_dicts that an unsharded model and its optimizer had."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    by_name = {
        "state": {order[index]: values for index, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=by_name, options=options)


@contextmanager
def _first_failure() -> Iterator[None]:
    """A CheckpointException, which is no Exception, holds what went wrong on each process."""
    try:
        yield
    except CheckpointException as error:
        (failure, _), *_ = error.failures.values()
        raise ShardError(str(failure)) from error
