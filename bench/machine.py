"""The machine that is measured: what it is, what it can do at most, and how quiet it is."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from bench.contest import fast, race

NOISY = 0.10  # (upper - lower quartile) / median of one product repeated
MATRIX = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Limits:
    """What the device does at most.

    Attributes:
        bandwidth: bytes read and written per second by a large copy.
        flops: floating-point operations per second of a large matrix product, by dtype.
        noise: (upper - lower quartile) / median of the time of such a product.
    """

    bandwidth: float
    flops: dict[str, float]
    noise: float

    @property
    def noisy(self) -> bool:
        return self.noise > NOISY


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def limits() -> Limits:
    """Measured once, in a few seconds."""
    where = device()
    source = torch.ones(COPY_BYTES[where.type] // 4, device=where)
    target, n = torch.empty_like(source), MATRIX[where.type]
    jobs = {"copy": lambda: target.copy_(source)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=where).to(dtype) for _ in range(2))
        jobs[str(dtype).removeprefix("torch.")] = lambda a=a, b=b: a @ b  # type: ignore[misc]
    times = race(jobs, where, seconds=3.0, rounds=9).seconds
    copy = fast(times.pop("copy"))
    flops = {dtype: 2 * n**3 / fast(seconds) for dtype, seconds in times.items()}
    low, middle, high = quantiles(times["float32"], n=4, method="inclusive")
    return Limits(2 * COPY_BYTES[where.type] / copy, flops, (high - low) / middle)


def describe() -> dict[str, Any]:
    """What has to stand beside every figure: machine, versions, commit, threads, noise, date."""
    found = limits()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device().type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "noise": round(found.noise, 3),
        "noisy": found.noisy,
        "copy_GB_per_s": round(found.bandwidth / 1e9, 1),
        "matmul_GFLOP_per_s": {dtype: round(rate / 1e9) for dtype, rate in found.flops.items()},
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions("torch", "triton", "transformers")},
        "commit": _commit(),
    }


def slug() -> str:
    """The machine in a file name."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else f"{_cpu_name()}-{os.cpu_count()}cores"
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version
    from importlib.util import find_spec

    return {package: version(package) if find_spec(package) else "not installed" for package in packages}


def _commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
