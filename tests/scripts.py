"""Running the example scripts in processes of their own, and killing them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {
    **os.environ,
    "TRITON_INTERPRET": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(EXAMPLES.parent),
    "PYTHONWARNINGS": "error",
}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *arguments]


def wait_for(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until the run has written `step` records."""
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_at_random(arguments: list[str], out: Path, records: int) -> None:
    """Start a script and end it with kill -9 a moment after it has written so many records."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for(process, out, records)
    time.sleep(random.Random().uniform(0, 0.05))
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
