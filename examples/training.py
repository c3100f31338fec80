"""What every training script needs: device and precision, schedule, checkpoints, metrics, a picture of the curve."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from corpus import DataError
from torch import nn

from fastattn.heap import keep_freed_memory
from fastattn.models.pretrained import atomic_write


class TrainingError(Exception):
    """Training cannot start or go on; the message says why and what to do."""


def choose_device(name: str) -> torch.device:
    """`auto` is the machine's accelerator if it has one."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # an AssertionError is how torch says that it has no CUDA
            raise TrainingError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies bf16 matrices, otherwise fp32."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "xpu"
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def seed(*numbers: int) -> None:
    """Seed PyTorch's generators with a few numbers, such as a run's seed and the step: what is drawn depends on no more."""
    torch.manual_seed(np.random.SeedSequence(numbers).generate_state(1, np.uint64).item())


def seed_number(text: str) -> int:
    """A --seed, for `argparse`."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {number}")
    return number


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def warmup_note(warmup: int, steps: int) -> str:
    """A line for the start of a run that is over before its warm-up; empty for others."""
    if warmup < steps:
        return ""
    return (
        f"note   --warmup {warmup} is not less than the {steps:,} steps of the run: the learning rate only rises, and little "
        f"is learnt; try --warmup {steps // 10}"
    )


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def refuse_models(folder: Path, advice: str) -> None:
    """TrainingError where `folder` holds a model, which would be written over."""
    for name in ("config.json", "model.safetensors", "classifier.pt2"):
        if (folder / name).exists():
            raise TrainingError(f"{folder / name} exists: {advice}")


@contextmanager
def named_by_options(arguments: argparse.Namespace) -> Iterator[None]:
    """A ValueError within becomes a TrainingError that calls parameters by their options, as num_heads by --heads."""

    def option(parameter: re.Match[str]) -> str:
        names = (parameter[0], re.sub("^(num|max_new)_", "", parameter[0]))
        return next((f"--{name.replace('_', '-')}" for name in names if hasattr(arguments, name)), parameter[0])

    try:
        yield
    except ValueError as error:
        raise TrainingError(re.sub(r"^\w+(?= must )|\b[a-z]+_\w+", option, str(error))) from error


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make the folder that an option names; TrainingError where it cannot be one, or not be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TrainingError(f"{option} {folder} cannot be a folder to write into: {error.strerror}") from error


def make_place(file: Path) -> None:
    """Make the folder of a file that --out names; TrainingError, before the work is done, where it could not be written."""
    if file.is_dir():
        raise TrainingError(f"--out {file} is a folder: give the name of a file")
    make_folder(file.parent)


def check_out(out: Path, saved: list[Path], arguments: argparse.Namespace) -> None:
    """TrainingError where a run into `out` would write over another run, or over a model that none of ours began.

    Args:
        out: the run's folder.
        saved: the checkpoints in it.
        arguments: with `resume` and `overwrite`.
    """
    advice = "--overwrite to start anew, or change --out"
    if saved and not (arguments.resume or arguments.overwrite):
        raise TrainingError(f"{saved[0]} exists: add --resume to go on, {advice}")
    killed = arguments.resume and (out / "metrics.jsonl").exists()  # between its first model and its first checkpoint
    if not (saved or killed or arguments.overwrite):
        refuse_models(out, f"a model that no checkpoint belongs to; add {advice}")


def say(text: str) -> None:
    """Print; a reader who has gone does not end a training."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_stdout()


def drop_stdout() -> None:
    """Print into nothing from now on, also what is still buffered: the reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`; the system takes the lock away when the process ends, however it ends.

    The folder is made where it is missing, and taken away again where nothing was put into it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    with open(folder / ".lock", "wb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError as error:
            raise TrainingError(f"another process is training into {folder}") from error
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [".lock"]:
                with suppress(OSError):  # Windows deletes no open file; or somebody else's file is there by now
                    (folder / ".lock").unlink()
                    for path in made:
                        path.rmdir()


def run_script(held: AbstractContextManager[Any], make: Callable[[Any], Any], process: int = 0) -> int:
    """Run a trainer to its end and return the script's exit status; what people can mend becomes one line.

    Args:
        held: what is held meanwhile, such as the folder's lock.
        make: makes the trainer from what `held` gives.
        process: the number of this process, named in an error where it is not the first.
    """
    keep_freed_memory()
    try:
        with held as given:
            trainer = make(given)
            say(trainer.describe())
            status: int = trainer.run()
            if status == 0:
                trainer.finish()
            return status
    except (DataError, TrainingError, OSError) as error:
        print(f"error{f' (process {process})' if process else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was saved before is unharmed", file=sys.stderr)
        return 130


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop honours after its step; a second one is final."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


# A setting that changes with others where it is not given, and how the names of those others begin.
FOLLOWS = {
    "model.vocab_size": ("data.",),
    "model.num_classes": ("data.",),
    "model.d_ff": ("model.d_model",),
    "model.head_dim": ("model.d_model", "model.num_heads"),
    "model.num_kv_heads": ("model.num_heads",),
    "model.qkv_bias": ("model.bias",),
}


class Checkpoint:
    """Everything that a run needs to go on exactly where it was, in one file that is replaced atomically.

    Args:
        path: of the file.
        identity: nested settings that decide the loss curve; a checkpoint with other ones is refused.
        may_grow: the name of a number among them which may be larger than it was, such as "training.steps".

    Attributes:
        grown_from: what that number was, where it is larger now than in the checkpoint that was read; else None.
    """

    def __init__(self, path: Path, identity: dict[str, Any], may_grow: str = "") -> None:
        self.path = path
        self.identity = identity
        self.may_grow = may_grow
        self.grown_from: int | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, **progress: Any) -> None:
        state = {
            "identity": self.identity,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "cpu_generator": torch.get_rng_state(),
            "device_generator": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
            "progress": progress,
        }
        try:
            with atomic_write(self.path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch.save hides the system's OSError behind a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else error
            kept = "; the previous checkpoint is unharmed" if self.path.exists() else ""
            raise TrainingError(f"cannot write the checkpoint {self.path}: {reason}{kept}") from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
        """Restore model, optimizer and random generators; the `progress` that was saved is returned."""
        state = self.read(device)
        with readable(self.path):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["cpu_generator"].cpu())
            if state["device_generator"] is not None:
                torch.get_device_module(device).set_rng_state(state["device_generator"].cpu(), device)
            return dict(state["progress"])

    def read(self, device: torch.device | str) -> dict[str, Any]:
        """What `save` wrote; a checkpoint of another configuration is refused."""
        with readable(self.path):
            state = torch.load(self.path, map_location=device, weights_only=True)
            self.check(state["identity"], self.path)
            return dict(state)

    def check(self, identity: dict[str, Any], path: Path) -> None:
        """TrainingError, with every setting that was changed, where `path` was not written by this configuration."""
        then, now = _flat(identity), _flat(self.identity)
        if then != now:
            names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            if names == [self.may_grow] and then[self.may_grow] < now[self.may_grow]:
                self.grown_from = then[self.may_grow]
                return
            given = [name for name in names if not any(other.startswith(FOLLOWS.get(name, ())) for other in names)]
            changes = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in given)
            raise TrainingError(
                f"{path} belongs to a run with another configuration: {changes}. Give the old values to go on, "
                "another --out to train beside it, or --overwrite to start anew"
            )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong within becomes a TrainingError that says that `path` is damaged, and what to do."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise TrainingError(
            f"{path} cannot be read as a checkpoint ({reason}): put back a copy, or add --overwrite to start anew"
        ) from error


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def event_writer(folder: Path, wanted: bool | None) -> Any:
    """What writes TensorBoard's event files into `folder`, or None; `wanted` None means: if the package is there."""
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise TrainingError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        return None
    return SummaryWriter(str(folder))


def _delete_events(folder: Path) -> None:
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
    with suppress(OSError):  # it holds other files, or is not there
        folder.rmdir()


class Metrics:
    """A file of JSON lines, one a record, each with the number of steps done, and TensorBoard's copy of it.

    Args:
        path: of the file.
        step: records beyond this step are dropped: a resumed run writes them again.
        writes: whether there are files at all; of several processes one writes.
        tensorboard: whether TensorBoard's files are written beside it; None: if the package is installed.
    """

    def __init__(self, path: Path, step: int, *, writes: bool = True, tensorboard: bool | None = None) -> None:
        self.path = path
        self.writes = writes
        self.records = [record for record in self._read(path) if record["step"] <= step]
        if writes:
            with atomic_write(path) as file:
                file.writelines(json.dumps(record).encode() + b"\n" for record in self.records)
        events = path.with_name("tensorboard")
        if writes:
            _delete_events(events)  # of the steps that a resumed run repeats, one copy remains
        self._events = event_writer(events, tensorboard) if writes else None
        for record in self.records:
            self._log(record)

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        """What is there; what a killed process or a power cut left of a line does not count."""
        records = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                record = json.loads(line)
                if isinstance(record["step"], int):
                    records.append(record)
            except (ValueError, TypeError, KeyError):
                continue
        return records

    def write(self, **record: Any) -> None:
        self.records.append(record)
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._log(record)

    def _log(self, record: dict[str, Any]) -> None:
        if self._events is not None:
            for name, value in record.items():
                if name != "step":
                    self._events.add_scalar(name, value, record["step"])

    def series(self, name: str) -> tuple[list[int], list[float]]:
        found = [(record["step"], record[name]) for record in self.records if name in record]
        return [step for step, _ in found], [value for _, value in found]


def pyplot() -> Any:
    """matplotlib's, drawing into files: a script on a server has no screen; dollars in a name begin no mathematics."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_picture(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a PNG file; a character that the font lacks, as of Chinese, becomes a box."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=dpi)


def plot_losses(metrics: Metrics, baselines: dict[str, float], path: Path, title: str) -> None:
    """Training and validation loss against steps, with the baselines as dashed lines."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps, losses = metrics.series("loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", label="training (smoothed)")
    steps, losses = metrics.series("val_loss")
    axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="validation, a part of it")
    steps, losses = metrics.series("final_val_loss")
    if losses:
        label = f"the best model on all of it, {losses[-1]:.3f}"
        axes.plot(steps[-1], losses[-1], color="black", marker="D", linestyle="", label=label)
    for (name, value), style in zip(baselines.items(), (":", "--")):
        axes.axhline(value, color="gray", linestyle=style, label=f"{name} baseline, {value:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.autoscale_view()  # a line that lies inside the limits so far has not moved them
    axes.set_ylim(top=1.1 * max([*baselines.values(), 0.0]))
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)
    plt.close(figure)


def plot_progress(metrics: Metrics, path: Path) -> None:
    """Learning rate, norm of the gradient and speed against steps."""
    plt = pyplot()
    names = {"lr": "learning rate", "gradient_norm": "norm of the gradient", "tokens_per_second": "tokens per second"}
    figure, axes = plt.subplots(1, len(names), figsize=(12, 3), layout="constrained")
    for axis, (name, title) in zip(axes, names.items()):
        axis.plot(*metrics.series(name), linewidth=0.8)
        axis.set(xlabel="step", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    save_picture(figure, path)
    plt.close(figure)


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over a fiftieth of the values, at most 20; corrected for its start at zero.

    A longer one would lag so far behind in a short run that training seems worse than validation.
    """
    keep = 1 - 1 / min(20, max(1, len(values) / 50))
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = keep * average + (1 - keep) * value
        smoothed.append(average / (1 - keep**count))
    return smoothed
