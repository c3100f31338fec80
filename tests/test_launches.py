"""Every kernel, through the public API and with its real launch arguments, compiles for every target and fits it."""

import itertools

import pytest

from bench.codegen import budgets
from bench.codegen.cases import CASES, Case

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
EVERY_LAUNCH = [(case, target) for case in CASES for target in TARGETS]


def core_launches() -> list[tuple[Case, str]]:
    """The core cases that have no budget, each on one target in turn; test_budgets compiles the others on several."""
    cases = [case for case in CASES if case.core and case not in budgets.budget_cases()]
    in_turn = itertools.cycle(TARGETS[1:] + TARGETS[:1])  # so the longest fall on what compiles soonest
    return list(zip(cases, in_turn))


CORE_LAUNCHES = core_launches()


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_op_has_a_budget_on_every_target():
    assert {case.function for case in budgets.budget_cases()} == {case.function for case in CASES}
    assert budgets.TARGETS == TARGETS


def launch_id(value: Case | str) -> str:
    return value if isinstance(value, str) else value.name


def check(worker, case: Case, target: str) -> None:
    launches = worker.launches(case.path, target, **case.arguments)
    assert launches, "the case launched nothing"
    violations = [violation for launch in launches for violation in launch.violations()]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize(("case", "target"), CORE_LAUNCHES, ids=launch_id)
def test_core_launch_fits_the_target(compile_worker, case, target):
    check(compile_worker, case, target)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target"), [x for x in EVERY_LAUNCH if x not in CORE_LAUNCHES], ids=launch_id)
def test_launch_fits_the_target(compile_worker, case, target):
    check(compile_worker, case, target)
