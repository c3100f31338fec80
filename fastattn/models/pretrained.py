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
from torch import nn

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
    """ValueError unless the fields `names` are positive integers, the heads divide d_model and dropouts are in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if config.d_model % config.num_heads:
        raise ValueError(f"d_model must be a multiple of num_heads, got {config.d_model} and {config.num_heads}")
    if config.d_model // config.num_heads > 256:
        raise ValueError(f"d_model / num_heads must be at most 256, got {config.d_model // config.num_heads}")
    for name in ("dropout", "attention_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)!r}")


class Pretrained(nn.Module):
    """A model that is built from one dataclass of settings, `config`, and saves itself to a folder.

    Subclasses set `config_class`, take the configuration as their only argument and keep it as `self.config`.
    """

    config_class: ClassVar[type]
    config: Any

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`; each file is replaced atomically."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(folder / "model.safetensors") as file:
            file.write(_safetensors().save(tensors, metadata={"format": "pt"}))
        settings = {"model": type(self).__name__, **dataclasses.asdict(self.config)}
        with atomic_write(folder / "config.json") as file:
            file.write(json.dumps(settings, indent=2).encode() + b"\n")

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Model:
        """The model that `save_pretrained(path)` wrote, in evaluation mode.

        Args:
            path: the folder.
            device: where the parameters go.
            dtype: of the parameters; None keeps the one they were saved in.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder holds another kind of model, or files that do not belong together.
        """
        folder = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a folder written by save_pretrained")
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = settings.pop("model", None)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'} is not a JSON object: {error}") from error
        if kind != cls.__name__:
            raise ValueError(f"{folder} holds a {kind}, not a {cls.__name__}")
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"{folder / 'config.json'} has unknown settings {unknown}; known: {sorted(known)}")
        model = cls(cls.config_class(**settings))
        tensors = _safetensors().load_file(folder / "model.safetensors")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder}: model.safetensors does not fit config.json: {error}") from error
        if dtype is None:
            dtype = next(iter(tensors.values())).dtype
        return model.to(device=device, dtype=dtype).eval()
