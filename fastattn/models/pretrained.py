"""Saving a model to a folder, and loading it back: `config.json` + `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastattn.checks import check_integer
from fastattn.models.sharded import gathered, is_sharded
from fastattn.tracing import readable

Model = TypeVar("Model", bound="Pretrained")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is complete and on the disk.

    Until then the bytes go to `.<name>.tmp` in the same folder. Whatever happens in between (an exception, a full disk,
    a killed process), the file that was there before stays as it was.

    Example:
        >>> with atomic_write("state.json") as file:  # doctest: +SKIP
        ...     file.write(b"{}")

    Raises:
        OSError: what the system says, for example that no space is left; the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        message = "saving and loading models needs the package safetensors: pip install safetensors"
        raise ImportError(message) from error
    return safetensors.torch


def check_sizes(config: Any, *names: str) -> None:
    """An error unless the fields `names` are positive integers, the heads divide d_model and dropouts are in [0, 1)."""
    for name in names:
        object.__setattr__(config, name, check_integer(name, getattr(config, name), least=1))
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and config.d_model % config.num_heads:
        raise ValueError(f"d_model must be a multiple of num_heads, got {config.d_model} and {config.num_heads}")
    if (head_dim or config.d_model // config.num_heads) > 256:
        raise ValueError(
            f"d_model / num_heads must be at most 256, got {head_dim or config.d_model // config.num_heads}"
        )
    for name in ("dropout", "attention_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)!r}")


def check_indices(name: str, tensor: Tensor, axes: tuple[str, ...], ignored: int | None = None, **size: int) -> None:
    """TypeError or ValueError unless `tensor` is int64, has these axes, and lies in [0, size) or is `ignored`.

    Its values are looked at where they are `readable`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be an int64 tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got dtype {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != len(axes):
        raise ValueError(
            f"{name} must have {len(axes)} dimensions ({', '.join(axes)}), got shape {tuple(tensor.shape)}"
        )
    if not readable(tensor):
        return
    ((meaning, end),) = size.items()
    outside = (tensor < 0) | (tensor >= end)
    if ignored is not None:
        outside &= tensor != ignored
    if outside.any():
        raise ValueError(f"{name} must be in [0, {end}) ({meaning}), got {tensor[outside][0].item()}")


class Pretrained(nn.Module):
    """A model that is built from one dataclass of settings, `config`, and saves itself to a folder.

    Subclasses set `config_class`, take the configuration as their only argument and keep it as `self.config`.
    """

    config_class: ClassVar[type]
    config: Any

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`; each file is replaced atomically.

        Where processes share the parameters (FSDP2, `tensor_parallel`), all have to call this: the first writes the whole model.
        """
        state = self.state_dict()
        if not is_sharded(state):
            self._write(Path(path), state)
            return
        first = dist.get_rank() == 0
        state = gathered(state, keep=first)
        try:
            if first:
                self._write(Path(path), state)
        finally:
            dist.barrier()  # the others wait, also for an error

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings, tensors = self._to_files(state)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with atomic_write(folder / "model.safetensors") as file:
            file.write(_safetensors().save(tensors, metadata={"format": "pt"}))
        with atomic_write(folder / "config.json") as file:
            file.write(json.dumps(settings, indent=2).encode() + b"\n")

    def _to_files(self, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `config.json` and `model.safetensors` hold of a model in this state."""
        return {"model": type(self).__name__.removeprefix("FSDP"), **dataclasses.asdict(self.config)}, state

    @classmethod
    def _from_files(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and the state from what the files hold."""
        kind = settings.pop("model", None)
        if kind != cls.__name__:
            raise ValueError(f"the folder holds a {kind}, not a {cls.__name__}")
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"config.json has unknown settings {unknown}; known: {sorted(known)}")
        return cls.config_class(**settings), tensors

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Model:
        """The model that a folder holds, in evaluation mode.

        Args:
            path: the folder: `config.json` and `model.safetensors`, or the files that `model.safetensors.index.json` names.
            device: where the parameters go.
            dtype: of the parameters; None keeps the one they were saved in.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder holds another kind of model, or files that do not belong together.
        """
        folder = Path(path)
        settings = read_json(folder / "config.json")
        tensors = _read_tensors(folder)
        if dtype is None:
            dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        try:
            config, state = cls._from_files(settings, tensors)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder}: {error}") from error
        model = cls(config)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the tensors do not fit config.json: {error}") from error
        return model.to(device=device, dtype=dtype).eval()


def read_json(path: Path) -> dict[str, Any]:
    if not path.parent.exists():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is not a folder with a saved model")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object, but {type(settings).__name__}")
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the files ("shards") that the index beside them lists."""
    names = ["model.safetensors"]
    if (index := folder / "model.safetensors.index.json").is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map, which says in which files the tensors are")
        names = sorted(set(shards.values()))
    load_file, tensors = _safetensors().load_file, {}
    from safetensors import SafetensorError

    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is not a folder with a saved model")
        try:
            tensors.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or incomplete: {error}") from error
    return tensors
