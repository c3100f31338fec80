"""Every kernel, through the public API and with its real launch arguments, compiles for every target and fits it."""

import pytest

from bench.codegen.cases import CASES, Case

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def check(worker, case: Case, target: str) -> None:
    launches = worker.launches(case.path, target, **case.arguments)
    assert launches, "the case launched nothing"
    violations = [violation for launch in launches for violation in launch.violations()]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [case for case in CASES if case.core], ids=lambda case: case.name)
def test_core_launch_fits_the_target(compile_worker, case, target):
    check(compile_worker, case, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.core], ids=lambda case: case.name)
def test_launch_fits_the_target(compile_worker, case, target):
    check(compile_worker, case, target)
