"""Every op's kernels fit every target, and none needs more than its recorded budget: `python -m bench.codegen --write-budgets` records new ones."""

import pytest
import triton

from bench.codegen import budgets
from bench.codegen.resources import Resources

RECORDED = budgets.read()
CASES = {case.name: case for case in budgets.budget_cases()}
# What takes long to compile is compiled for some targets by default, each of them with several cases; `make test-all` has every one.
BY_DEFAULT = {
    "attention bf16 D64 causal": ("sm_100", "gfx942"),
    "attention bf16 D64 dropout": ("sm_80",),
    "attention bf16 D64 large mask": ("sm_80", "sm_90", "gfx942"),
    "attention bf16 D128 causal": ("sm_90",),
    "attention bf16 D128 blocks": ("sm_120", "gfx942"),
    "varlen bfloat16 D256 causal": ("sm_120",),  # with the least shared memory
    "varlen bfloat16 D256 everything": (),
    "feed_forward bf16 gelu": ("sm_90", "sm_100", "gfx942"),
    "kv cache bf16 D128": ("sm_80", "sm_100", "gfx942"),
}
REFERENCE = [
    pytest.param(name, target, marks=[] if target in BY_DEFAULT.get(name, budgets.TARGETS) else [pytest.mark.slow])
    for name in CASES
    for target in budgets.TARGETS
]


def toy_budget(worker, what):
    (row,) = worker.reports("tests.toy_launches:launch_softmax_numerators", "sm_90", what=what)
    return budgets.budget_of(row)


@pytest.mark.parametrize(
    ("what", "figure"),
    [
        ("spill", "spill_bytes"),
        ("scalar load", "bytes_per_global_access"),
        ("no fusion", "instructions"),
        ("unsplit mask", "instructions"),
    ],
)
def test_a_planted_regression_is_caught(compile_worker, what, figure):
    good, bad = toy_budget(compile_worker, "good"), toy_budget(compile_worker, what)
    assert budgets.regressions(good, good) == []
    assert any(line.startswith(figure) for line in budgets.regressions(bad, good))


def test_every_budget_is_free_of_spills():
    assert [key for key, budget in RECORDED["budgets"].items() if budget["spill_bytes"]] == []


# (what finds a mask's blocks reads N² bytes for N²·D products a head: bench/codegen/TECHNIQUES.md has its figures)
MEMORY_BOUND = {
    key: budget
    for key, budget in RECORDED["budgets"].items()
    if budget.get("pipe_per_dram") and "kv cache" not in key and not key.endswith(("_find_kinds", "_list_blocks"))
}


@pytest.mark.parametrize("key", MEMORY_BOUND)
def test_memory_bound_kernels_wait_for_memory_alone(key):
    """Their instructions keep up with DRAM, which they read and write 16 bytes a thread at a time."""
    budget = MEMORY_BOUND[key]
    assert budget["pipe_per_dram"] < 1.0
    assert budget["wide_share"] >= 0.85, "besides statistics and targets, one number a row"


def test_cross_entropy_leaves_half_of_the_pipes_idle():
    assert RECORDED["budgets"]["cross entropy bf16 of 50304 | sm_90 | cross_entropy_kernel"]["pipe_per_dram"] <= 0.5


def test_budgets_were_recorded_with_the_tested_compiler():
    assert RECORDED["triton"] == triton.__version__


@pytest.mark.parametrize(("name", "target"), REFERENCE)
def test_kernels_keep_their_budget(compile_worker, name, target):
    case = CASES[name]
    rows = [{"case": name, **row} for row in compile_worker.reports(case.path, target, **case.arguments)]
    violations = [line for row in rows for line in Resources.from_json(row["resources"]).violations()]
    assert not violations, "\n".join(violations)
    recorded = RECORDED["budgets"]
    now = budgets.budgets_of(rows)
    expected = {key for key in recorded if key.startswith(f"{name} | {target} |")}
    assert now.keys() == expected, "kernels came or went: record the budgets anew"
    worse = [f"{key}: {line}" for key, budget in now.items() for line in budgets.regressions(budget, recorded[key])]
    assert not worse, "\n".join(worse)
