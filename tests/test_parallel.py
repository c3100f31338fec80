"""examples/train_gpt.py on several processes: the losses of one, whatever happens to the processes on the way."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastattn.models import GPT, GPTConfig
from tests import distributed_worker

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

SCRIPT = Path(__file__).parent.parent / "examples" / "train_gpt.py"
TINY = (
    "--context-length 16 --layers 2 --heads 2 --d-model 16 --vocab-size 300 --batch-size 4 --dtype fp32 --device cpu "
    "--steps 60 --eval-every 10 --eval-batches 3 --sample-tokens 5"
)
ENVIRONMENT = {
    **os.environ,
    "TRITON_INTERPRET": "0",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(SCRIPT.parent.parent),
    "PYTHONWARNINGS": "error",
}
RUNS = {
    "ddp accumulating": "--parallel ddp --batch-size 2 --accumulate 2 --eval-batches 6",
    "fsdp": "--parallel fsdp",
}
SLOW_RUNS = {
    "ddp": "--parallel ddp",
    "fsdp accumulating": "--parallel fsdp --batch-size 2 --accumulate 2 --eval-batches 6 --checkpoint-activations",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "king", "and", "queen", "of", "night", "come", "hither", "my", "lord", "is", "not", "to", "be"]
    choose = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text("\n".join(" ".join(choose.choices(words, k=8)) for _ in range(300)))
    return path


def settings(text: Path, out: Path, more: str = "") -> list[str]:
    return ["--data", str(text), "--out", str(out), *TINY.split(), *more.split()]


def command(processes: int, arguments: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(SCRIPT), *arguments]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)


def curve(out: Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "lr", "gradient_norm", "val_loss", "final_val_loss")
    return {(record["step"], name): record[name] for record in records for name in kept if name in record}


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    result = run(command(1, settings(text, out)))
    assert result.returncode == 0, result.stderr
    losses = [value for (_, name), value in curve(out).items() if name == "loss"]
    assert losses[-1] < losses[0] - 1
    return out


def interrupt(process: subprocess.Popen[str], processes: int, number: signal.Signals) -> None:
    """SIGKILL comes unannounced and meets one process of several; the others are told by torchrun."""
    pid = process.pid
    if processes > 1 and number == signal.SIGKILL:
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])
    os.kill(pid, number)


def train_in_stages(stages: list[tuple[int, str, signal.Signals | None]], text: Path, out: Path) -> None:
    """Each stage takes its number of processes, and its signal after ten or more further steps, or goes on to the end."""
    for stage, (processes, kind, number) in enumerate(stages, 1):
        arguments = command(processes, settings(text, out, f"--parallel {kind} --resume"))
        if number is None:
            result = run(arguments)
            assert result.returncode == 0, result.stderr
            return
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"loss"') < 12 * stage:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        interrupt(process, processes, number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode != 0
        if number == signal.SIGTERM:
            assert "SIGTERM: saved after step" in stdout, stderr
        assert any(out.glob("checkpoint*")), stderr


def train_on_two(chosen: dict[str, str], text: Path, folder: Path) -> Path:
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in chosen]
    runs = {store.port: settings(text, folder / name, more) for store, (name, more) in zip(stores, chosen.items())}
    mp.spawn(distributed_worker.run_script, (2, str(SCRIPT), runs), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def on_two(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_two(RUNS, text, tmp_path_factory.mktemp("two"))


def check_alike(out: Path, alone: Path) -> None:
    assert curve(out) == pytest.approx(curve(alone), rel=1e-4)
    weights = [GPT.from_pretrained(folder).state_dict() for folder in (out, alone)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, on_two: Path, alone: Path) -> None:
    check_alike(on_two / name, alone)


@pytest.mark.slow
def test_two_processes_train_as_one_in_other_ways(text: Path, alone: Path, tmp_path: Path) -> None:
    train_on_two(SLOW_RUNS, text, tmp_path)
    for name in SLOW_RUNS:
        check_alike(tmp_path / name, alone)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
def test_killed_runs_resume_on_another_number_of_processes(text: Path, alone: Path, tmp_path: Path) -> None:
    train_in_stages([(2, "fsdp", signal.SIGKILL), (1, "none", None)], text, tmp_path)
    assert curve(tmp_path) == pytest.approx(curve(alone), rel=1e-4)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint.pt"]


@pytest.mark.slow
def test_four_processes_train_as_one(text: Path, alone: Path, tmp_path: Path) -> None:
    """And they hand over to two, to one, and back, killed and asked to stop; two contexts per forward pass are too few for four."""
    stages = [(4, "fsdp", signal.SIGTERM), (2, "ddp", signal.SIGKILL), (1, "none", signal.SIGTERM), (4, "ddp", None)]
    train_in_stages(stages, text, tmp_path / "stages")
    assert curve(tmp_path / "stages") == pytest.approx(curve(alone), rel=1e-4)
    stages = [(1, "none", signal.SIGKILL), (2, "fsdp", None)]
    train_in_stages(stages, text, tmp_path / "sharded")
    assert curve(tmp_path / "sharded") == pytest.approx(curve(alone), rel=1e-4)
    assert [path.name for path in (tmp_path / "sharded").glob("*checkpoint*")] == ["checkpoint-60"]
    for kind in ("ddp", "fsdp"):
        result = run(command(4, settings(text, tmp_path / kind, f"--parallel {kind}")))
        assert result.returncode == 0, result.stderr
        assert curve(tmp_path / kind) == pytest.approx(curve(alone), rel=1e-4)


def test_shards_of_another_run_and_broken_ones_are_refused(text: Path, on_two: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(on_two / "fsdp", tmp_path / "copy"))
    again = settings(text, out, "--resume")
    assert "training.lr was 0.002 and is 1.0" in run(command(1, [*again, "--lr", "1"])).stderr
    os.truncate(next(out.glob("checkpoint-60/*.distcp")), 100)
    broken = run(command(1, again))
    assert broken.returncode == 1
    assert f"{out / 'checkpoint-60'} cannot be read as a checkpoint" in broken.stderr


@pytest.mark.parametrize("checkpointed", [False, True], ids=["compiled", "compiled and checkpointed"])
def test_blocks_compile_once_and_mean_the_same(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    import parallel

    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(100, context_length=8, num_layers=3, num_heads=2, d_model=16)), torch.arange(9)[None]
    gradients = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        parallel.prepare_blocks(model, compiled=compiled, checkpointed=compiled and checkpointed)
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


ERRORS = {
    "no torchrun": (1, "--parallel ddp", "--parallel ddp needs torchrun"),
    "no --parallel": (2, "", "torchrun started 2 processes: add --parallel ddp or --parallel fsdp"),
    "batch": (2, "--parallel ddp --batch-size 3", "--batch-size must be a multiple of the 2 processes, got 3"),
    "the first one's": (2, "--parallel ddp --vocab-size 9", "--vocab-size must be at least 257"),
}


@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        pytest.param(*error, id=name, marks=[pytest.mark.slow] if name in ("batch", "the first one's") else [])
        for name, error in ERRORS.items()
    ],
)
def test_errors(processes: int, options: str, message: str, text: Path, tmp_path: Path) -> None:
    result = run(command(processes, settings(text, tmp_path, options)))
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr
    assert "[rank1]: Traceback" not in result.stderr
    assert not list(tmp_path.glob("checkpoint*"))
