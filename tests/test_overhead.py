"""The host's work per call does not grow: calls are counted, which a busy machine does not change."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.calls import BUDGETS, count_calls
from fastattn import backend

ALLOWED = 1.05  # another Python counts a few calls more or less


@pytest.fixture(scope="module")
def counts(pytestconfig):
    """{op: {direction: calls}}, from a process in which kernels are not interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
    environment.pop("FASTATTN_BACKEND", None)
    command = [sys.executable, "-m", "bench.overhead", "--counts"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_no_op_makes_more_calls_than_its_budget(counts):
    """`python -m bench.overhead --write-budgets` records new ones; the times that they stand for are printed without it."""
    budgets = json.loads(BUDGETS.read_text())
    assert counts.keys() == budgets.keys()
    over = {
        f"{op} {direction}": f"{calls} calls, {budgets[op][direction]} when it was recorded"
        for op, directions in counts.items()
        for direction, calls in directions.items()
        if calls > ALLOWED * budgets[op][direction]
    }
    assert over == {}


def test_calls_of_the_package_are_counted_and_no_others():
    assert count_calls(lambda: json.dumps([1, 2])) == 0
    assert count_calls(lambda: backend._checked("eager", "here")) == 1
    assert count_calls(lambda: [backend.input_precision(torch.bfloat16) for _ in range(3)]) == 3
