"""The compile worker over toy kernels: what it reads is right, and what it should refuse is refused."""

import pytest

from bench.codegen.resources import Resources
from bench.codegen.worker import WorkerError
from fastattn.kernels.targets import TARGETS

MATMUL, DOUBLE = "tests.toy_launches:launch_matmul", "tests.toy_launches:launch_double"


@pytest.mark.parametrize("target", TARGETS)
def test_a_matmul_uses_the_tensor_cores_of_every_target(compile_worker, target):
    (launch,) = compile_worker.launches(MATMUL, target)
    instruction = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}.get(target, "HMMA")
    assert launch.tensor_instructions[instruction] > 0
    assert launch.dots == 1
    assert 16 < launch.registers <= 255
    assert launch.shared_bytes >= 64 * 64 * 2
    assert launch.violations() == []


def test_launches_are_reported_in_order_with_their_grid(compile_worker):
    launches = compile_worker.launches(DOUBLE, "sm_90", n=1000)
    assert [(launch.kernel, launch.grid) for launch in launches] == [("double", (4, 1, 1))] * 2
    assert launches[0].dots == 0
    assert launches[0].violations() == []


def test_fp32_products_at_ieee_precision_need_no_tensor_core(compile_worker):
    (exact,) = compile_worker.launches(MATMUL, "sm_80", dtype="float32", precision="ieee", rows=32, cols=32, depth=32)
    (tf32,) = compile_worker.launches(MATMUL, "sm_80", dtype="float32", precision="tf32", rows=32, cols=32, depth=32)
    assert (exact.dots, tf32.dots) == (0, 1)
    assert exact.tensor_instructions == {}
    assert exact.violations() == []
    assert tf32.tensor_instructions["HMMA"] > 0
    assert tf32.violations() == []


def test_small_tiles_may_use_the_warp_level_instruction(compile_worker):
    (launch,) = compile_worker.launches(MATMUL, "sm_90", rows=16)
    assert launch.tensor_instructions.keys() == {"HMMA"}
    assert launch.violations() == []


@pytest.mark.parametrize(("target", "num_warps"), [("sm_80", 4), ("gfx942", 2)])
def test_a_tile_too_large_for_the_registers_is_refused(compile_worker, target, num_warps):
    (launch,) = compile_worker.launches(MATMUL, target, rows=256, cols=256, depth=32, num_warps=num_warps)
    assert launch.spill_bytes > 0
    assert any("spills" in violation for violation in launch.violations())


def test_the_compiler_itself_refuses_too_much_shared_memory(compile_worker):
    with pytest.raises(WorkerError, match=r"OutOfResources.*shared memory"):
        compile_worker.launches(MATMUL, "sm_120", rows=128, cols=128, depth=128, num_warps=8, num_stages=4)


def test_a_compile_error_is_reported_and_the_worker_lives_on(compile_worker):
    with pytest.raises(WorkerError, match="CompilationError"):
        compile_worker.launches("tests.toy_launches:launch_what_does_not_compile", "sm_90")
    assert len(compile_worker.launches(DOUBLE, "sm_90")) == 2


def test_an_unknown_target_is_named(compile_worker):
    with pytest.raises(WorkerError, match="unknown target 'sm_70'; known: sm_80"):
        compile_worker.launches(DOUBLE, "sm_70")


def resources(**changes):
    good = Resources("k", "sm_90", (1, 1, 1), 4, 2, 128, 0, 1024, 0, 1, 64, {"HGMMA": 4})
    return Resources(**{**good.as_json(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory of 232448"),
        ({"target": "sm_80", "shared_bytes": 166913, "tensor_instructions": {"HMMA": 1}}, "of 166912"),
        ({"target": "sm_120", "shared_bytes": 101377, "tensor_instructions": {"HMMA": 1}}, "of 101376"),
        ({"target": "gfx942", "shared_bytes": 65537, "tensor_instructions": {"MFMA": 1}}, "of 65536"),
        ({"target": "sm_100", "tensor_memory_columns": 513, "tensor_instructions": {"UTCHMMA": 1}}, "columns"),
        ({"tensor_instructions": {"HMMA": 4}}, "none of HGMMA"),
        ({"target": "sm_80", "tensor_instructions": {}}, "none of HMMA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_limit_is_checked(changes, message):
    (violation,) = resources(**changes).violations()
    assert message in violation
    assert resources().violations() == []
