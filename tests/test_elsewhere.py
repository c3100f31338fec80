"""How the tests of a GPU reach it (tests/elsewhere.py), shown with copies on the CPU and with tensors that have no numbers."""

import os
import subprocess
import sys

import pytest
import torch

from tests import contract, elsewhere, test_attention, test_decode, test_varlen
from tests.test_gpu import FAMILIES

FAMILY_CASES = [(family, name) for family, cases in FAMILIES.items() for name in cases]


@pytest.fixture
def copies(monkeypatch):
    elsewhere.install(monkeypatch, "cpu")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("normalization", "dropout_everything"),
        ("feed forward", "gated_dropout_residual"),
        ("rotary", "positions"),
        ("loss", "everything_none"),
    ],
)
def test_copies_keep_the_contract(family, name, copies):
    op = FAMILIES[family][name]
    contract.check_values(op, "triton", torch.bfloat16)
    contract.check_double_backward(op, "eager")
    if family != "loss":
        contract.check_registration(op, "eager")
    if "dropout" not in name:
        contract.check_compiles(op, "eager", dynamic=True)
        contract.check_transforms(op, "eager")


def test_copies_in_attention(copies):
    test_attention.check(test_attention.CASES["pair_all"], torch.float32, "triton")
    test_varlen.test_matches_the_definition("everything", torch.float32, "triton")
    test_decode.test_matches_the_definition("everything", torch.float32, "triton")
    test_decode.test_appends_in_place_and_nothing_else("paged_odd", "eager")


@pytest.mark.parametrize(("family", "name"), FAMILY_CASES)
def test_nothing_stays_on_the_cpu(family, name, monkeypatch):
    """An argument that did would meet tensors of another device."""
    elsewhere.install(monkeypatch, "meta", back="meta")
    op = FAMILIES[family][name]
    results = op.call(op.ours)(*op.tensors())
    assert all(y.is_meta for y in results)


WARNS = """
import warnings, pytest, torch
torch.cuda.is_available = lambda: True

@pytest.mark.gpu
def test_that_warns():
    warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled.")
"""


def test_what_pytorch_warns_of_on_a_gpu_is_no_error(pytestconfig, tmp_path):
    (tmp_path / "test_warns.py").write_text(WARNS)
    command = ["-m", "pytest", "-q", "-p", "tests.conftest", "-c", pytestconfig.rootpath / "pyproject.toml", tmp_path]
    environment = {**os.environ, "FASTATTN_TEST_GPU": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, *command], cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert "1 passed, 1 warning" in run.stdout, run.stdout + run.stderr
