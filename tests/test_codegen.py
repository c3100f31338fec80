"""The machine-code report: its parsing on known code, its arithmetic on known kernels, its tables and its command."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from bench.codegen import measure, pipes, published, report, timeline, user_file
from bench.codegen.bounds import report_loop
from bench.codegen.hardware import MULTIPROCESSORS
from bench.codegen.loops import find_loops
from bench.codegen.occupancy import occupancy
from bench.codegen.resources import Resources
from bench.codegen.sass import parse
from tests import reference

SASS = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R4 ;
        /*0030*/              @!P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   MUFU.EX2 R9, R8 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/                   STG.E.U16 [R2.64], R9 ;
        /*0080*/               @P3 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_disassembly_is_parsed():
    program = parse(SASS)
    load = program.instructions[1]
    assert (load.opcode, load.modifiers, load.predicate, load.address) == ("LDG", ["E", "128"], "@!P0", 0x10)
    assert program.labels[".L_x_2"] == 4
    with pytest.raises(ValueError, match="no code section"):
        parse("nothing")


def test_loops_are_found_and_waiting_is_not_work():
    program = parse(SASS)
    outer, inner = find_loops(program)
    assert [program.instructions[i].opcode for i in inner.instructions] == ["HMMA", "MUFU", "BRA"]
    assert [program.instructions[i].opcode for i in outer.instructions] == ["LDG", "STG", "BRA"]
    assert (outer.is_innermost, inner.is_innermost) == (False, True)


def test_bounds_of_a_loop_by_hand():
    # per warp on sm_80: HMMA 16·8·16 / 1024 = 2 cycles, exp2 32 / 16 = 2, issue 3 / 4
    (loop,) = [loop for loop in find_loops(parse(SASS)) if loop.is_innermost]
    result = report_loop(parse(SASS), loop.instructions, MULTIPROCESSORS["sm_80"], 4, is_whole_kernel=False)
    assert result.cycles == {"tensor": 8.0, "special": 8.0, "issue": 3.0}
    assert result.tensor_flops == 2 * 16 * 8 * 16 * 4
    assert (result.overlapped, result.alternating, result.serial) == (1.0, 0.5, 0.5)


def test_what_is_never_executed_only_takes_its_turn():
    never = parse(SASS.replace("  MUFU.EX2 R9, R8", "@!PT LDS RZ, [RZ]"))
    (loop,) = [loop for loop in find_loops(never) if loop.is_innermost]
    result = report_loop(never, loop.instructions, MULTIPROCESSORS["sm_80"], 4, is_whole_kernel=False)
    assert result.cycles == {"tensor": 8.0, "issue": 3.0}


@pytest.mark.parametrize(
    ("code", "size"),
    [("LDG.E.128", 16), ("LDG.E.64.CONSTANT", 8), ("STG.E", 4), ("LDG.E.U16", 2), ("LDS.U8", 1), ("LDSM.16.M88.4", 16)],
)
def test_width_of_an_access(code, size):
    instruction = parse(SASS.replace("LDG.E.128", code)).instructions[1]
    assert pipes.access_bytes(instruction) == size


@pytest.mark.parametrize(
    ("target", "registers", "shared", "blocks", "limit"),
    [
        ("sm_80", 255, 0, 2, "registers"),
        ("sm_80", 32, 48 * 1024, 3, "shared memory"),
        ("sm_90", 32, 100 * 1024, 2, "shared memory"),
        ("sm_86", 16, 0, 12, "warps"),
        ("sm_90", 128, 0, 4, "registers"),
    ],
)
def test_occupancy(target, registers, shared, blocks, limit):
    result = occupancy(Resources("k", target, (1, 1, 1), 4, 1, registers, 0, shared, 0, 0, 0, {}))
    assert (result.blocks, result.warps, result.limited_by) == (blocks, 4 * blocks, limit)


@pytest.mark.parametrize("target", MULTIPROCESSORS)
def test_tensor_work_in_the_machine_code_is_the_analytic_count(compile_worker, target):
    (row,) = compile_worker.reports("tests.toy_launches:launch_matmul", target)
    loop = row["loops"][0]
    assert loop["tensor_flops"] == 2 * 64 * 64 * 64
    assert 0 < loop["serial"] <= loop["alternating"] <= loop["overlapped"] <= 1
    assert loop["bytes_per_global_access"] == 16


def test_a_kernel_without_loops_is_reported_whole(compile_worker):
    row = compile_worker.reports("tests.toy_launches:launch_double", "sm_90", n=1000)[0]
    (loop,) = row["loops"]
    assert loop["is_whole_kernel"]
    assert loop["alternating"] is None
    assert 0 < loop["pipe_per_dram"] < 1
    assert row["minimum_bytes"] == 4000


def test_amd_code_is_counted(compile_worker):
    (row,) = compile_worker.reports("tests.toy_launches:launch_matmul", "gfx942")
    assert row["instruction_mix"]["mfma"] == row["resources"]["tensor_instructions"]["MFMA"]
    assert row["loops"] == []


def test_report_files(compile_worker, tmp_path, monkeypatch):
    rows = [
        {"case": "toy", **row}
        for target in ("sm_80", "gfx942")
        for row in compile_worker.reports("tests.toy_launches:launch_matmul", target)
    ]
    rows[0]["violations"] = ["matmul_tile on sm_80 spills"]
    written = report.write_report(rows, tmp_path)
    assert [path.name for path in written] == ["report.md", "report.json", "bounds.png", "occupancy.png"]
    assert all(path.stat().st_size > 0 for path in written)
    assert json.loads((tmp_path / "report.json").read_text()) == rows
    assert "**matmul_tile on sm_80 spills**" in (tmp_path / "report.md").read_text()
    assert "! matmul_tile on sm_80 spills" in report.terminal_table(rows)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert report.write_report(rows, tmp_path) == written[:2], "without matplotlib"
    header, _, line = report.summary_table(rows).splitlines()
    assert header == "| case | kernel | sm_80 A100 | gfx942 MI300X |"
    assert line.startswith("| toy | matmul_tile | ")
    assert f"({rows[0]['resources']['registers']}, " in line
    assert [cell.endswith("!") for cell in line.replace(" |", "|").split("|")[3:5]] == [True, False]


@pytest.mark.parametrize(
    ("place", "signature", "message"),
    [
        ("nowhere.py:kernel", "", "existing file"),
        (f"{__file__}:no_such_name", "", "has no 'no_such_name'"),
        ("tests/toy_launches.py:__name__", "", "is neither a function nor a kernel, but str"),
        ("tests/toy_launches.py:double", "x=*fp7", "unknown type"),
        ("tests/toy_launches.py:double", "x", "not NAME=VALUE"),
        ("tests/toy_launches.py:double", "", "double is a kernel: its arguments are given by --signature"),
        ("tests/toy_launches.py:double", "x=None", "None, is one of --constants"),
    ],
)
def test_bad_places_are_named(place, signature, message):
    with pytest.raises(ValueError, match=message):
        user_file.launch(place, signature, "BLOCK=128")


def test_a_kernel_of_any_file_with_its_signature(compile_worker):
    options = {"signature": "x=*bf16,n=i32", "constants": "BLOCK=1024,num_warps=2"}
    launched = "bench.codegen.user_file:launch"
    (row,) = compile_worker.reports(launched, "sm_90", place="tests/toy_launches.py:double", **options)
    assert (row["resources"]["kernel"], row["resources"]["num_warps"]) == ("double", 2)
    assert row["loops"][0]["bytes_per_global_access"] == 16


SCALE = """
from __future__ import annotations
import dataclasses
import triton
import triton.language as tl
from {near} import twice

@dataclasses.dataclass
class Size:
    rows: int

@triton.jit
def scale(x, bias, SHAPE: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr):
    offs = tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    y = twice(tl.load(x + offs)).to(DTYPE)
    if bias is not None and KIND == "a, b":
        y += tl.load(bias + offs)
    tl.store(x + offs, y)
"""


@pytest.mark.parametrize("near", ["helpers_beside", ".helpers_beside"])
def test_a_file_imports_what_lies_beside_it(compile_worker, tmp_path, near):
    """Also a file of a package, from its package."""
    folder = tmp_path / f"kernels_of_{len(near)}"
    folder.mkdir()
    if near.startswith("."):
        (folder / "__init__.py").touch()
    (folder / "scale.py").write_text(SCALE.format(near=near))
    (folder / "helpers_beside.py").write_text("import triton\n@triton.jit\ndef twice(x):\n    return 2 * x\n")
    options = {"signature": "x=*fp32", "constants": "bias=None,SHAPE=(2, 64),DTYPE=tl.float32,KIND='a, b',"}
    launched = "bench.codegen.user_file:launch"
    (row,) = compile_worker.reports(launched, "sm_90", place=f"{folder / 'scale.py'}:scale", **options)
    assert (row["arguments"]["bias"], row["arguments"]["SHAPE"], row["arguments"]["KIND"]) == (None, [2, 64], "a, b")


def test_an_autotuner_takes_the_first_configuration_that_fits(compile_worker, tmp_path):
    """Each GPU its own, for it can measure none; and says so on no disk."""
    for target, rows in (("sm_90", 128), ("sm_120", 64), ("sm_90", 128)):
        (row,) = compile_worker.reports("tests.toy_launches:launch_tuned", target)
        assert row["resources"]["largest_dot_rows"] == rows
    options = {"place": "tests/toy_launches.py:tuned", "signature": "x=*bf16,out=*fp32,n=i32"}
    launched = "bench.codegen.user_file:launch"
    (row,) = compile_worker.reports(launched, "sm_90", constants="ROWS=32,DEPTH=32", **options)
    assert row["resources"]["largest_dot_rows"] == 32


def test_a_launch_may_ask_what_a_kernel_needs(compile_worker):
    """As Triton's tutorial on softmax does, which starts as many programs as fit."""
    for target in ("sm_80", "sm_100", "gfx942"):
        (row,) = compile_worker.reports("tests.toy_launches:launch_resident", target)
        assert row["resources"]["grid"][0] == row["resources"]["registers"] > 0


def test_descriptors_are_described_by_their_tensors(compile_worker):
    (row,) = compile_worker.reports("tests.toy_launches:launch_descriptor", "sm_90")
    assert row["arguments"]["x"] == {"dtype": "float32", "itemsize": 4, "shape": [64, 64], "strides": [64, 1]}
    assert row["minimum_bytes"] == 2 * 4 * 64 * 64


def test_published_kernel_is_attention():
    """What the model is validated on computes what its figures were measured on."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, 32).half() for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(2, 64)
    options = {"HEAD_DIM": 32, "BLOCK_M": 32, "BLOCK_N": 16, "CAUSAL": True}
    published.flash_forward[(2, 2)](q, k, v, out, lse, 32**-0.5 * math.log2(math.e), 64, 32, **options)
    expected, expected_lse = reference.attention(*(t[:, None].double() for t in (q, k, v)), causal=True)
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=0, atol=4 * torch.finfo(torch.float16).eps)
    torch.testing.assert_close(lse.double() * math.log(2), expected_lse[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("figure", published.FIGURES, ids=lambda f: f"{f.target}_D{f.head_dim}")
def test_predictions_are_near_published_figures(compile_worker, figure):
    tile = (128, 32, 4, 3) if figure.target == "sm_80" else (128, 128, 8, 2)
    launched = "bench.codegen.published:launch"
    (row,) = compile_worker.reports(launched, figure.target, head_dim=figure.head_dim, causal=figure.causal, tile=tile)
    assert abs(published.predict(figure, {tile: published.bound(row)})["error"]) < 0.1


def test_the_command(pytestconfig):
    command = [sys.executable, "-m", "bench.codegen", "--targets", "sm_90,sm_80", "--jobs", "1"]

    def run(*places):
        return subprocess.run(
            [*command, *places], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False
        )

    said = run("tests/toy_launches.py:launch_matmul", "tests/toy_launches.py:launch_cuda").stdout
    assert "matmul_tile" in said
    assert torch.cuda.is_available() or "(without a GPU, launch with tensors on the CPU, or give" in said
    result = run("tests/toy_launches.py:launch_matmul", "no.py:x", "tests/toy_launches.py:double")
    assert result.stderr.splitlines() == [
        "'no.py:x' is not path/to/file.py:name of an existing file",
        "tests/toy_launches.py:double: ValueError: double is a kernel: "
        "its arguments are given by --signature 'x=*fp32,n=i32' and --constants",
    ]
    assert (result.stdout, result.returncode) == ("", 1)
    result = run("tests/toy_launches.py:nothing", "tests/toy_launches.py:launch_what_does_not_compile")
    assert result.stdout.splitlines()[-4:] == [
        f"  ! tests/toy_launches.py:{said}"
        for target in ("sm_90", "sm_80")
        for said in (
            f"nothing on {target}: launches no kernel (kernel.warmup compiles one, but does not launch it)",
            f"launch_what_does_not_compile on {target}: CompilationError: arange's range must be a power of 2, "
            "in 'tl.store(x + tl.arange(0, BLOCK), tl.arange(0, BLOCK + 1))'",
        )
    ]


def test_a_reader_who_has_gone_changes_neither_files_nor_status(pytestconfig, tmp_path):
    place = "tests/toy_launches.py:launch_matmul"
    command = [sys.executable, "-m", "bench.codegen", place, "--targets", "sm_90", "--output", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        result = subprocess.run(command, cwd=pytestconfig.rootpath, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (result.stderr, result.returncode) == (b"", 0)
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize("window", [(None, None), (None, 0), (3, 0), (2, 5), (None, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (9, 4)])
def test_visible_pairs_are_counted_one_by_one(queries, keys, window):
    left, right = window
    expected = sum(
        (left is None or j >= i + keys - queries - left) and (right is None or j <= i + keys - queries + right)
        for i in range(queries)
        for j in range(keys)
    )
    assert timeline.visible_pairs(queries, keys, left, right) == expected


def test_predicted_time_of_a_launch_by_hand():
    # a causal pass over (1, 132, 1000, 64) on sm_90: 132 SMs · 2048 · 2 FLOP/clock at half of the peak, 1.755 GHz
    shape = {"shape": [1, 132, 1000, 64]}
    row = {
        "resources": {"kernel": "attention_forward", "target": "sm_90", "grid": (198, 1, 1)},
        "occupancy": {"blocks": 1},
        "loops": [{"alternating": 0.5}],
        "arguments": {"q_ptr": shape, "v_ptr": shape, "left": None, "right": 0},
        "minimum_bytes": 1000,
    }
    step = timeline.predict(row)
    assert step["flops"] == 4 * 132 * 64 * (1000 * 1001 // 2)
    assert step["compute"] == pytest.approx(step["flops"] / (132 * 2048 * 1.755e3))
    assert step["predicted"] == pytest.approx(step["compute"] * 2 / 1.5)  # one and a half waves of blocks take two
    assert "1 launches" in timeline.table([step])


def test_a_training_step_is_recorded_in_launch_order(compile_worker, tmp_path):
    rows = compile_worker.reports("bench.codegen.cases:training_step", "sm_90", batch=1)
    kernels = [row["resources"]["kernel"] for row in rows]
    assert kernels[:3] == ["norm_forward_kernel", "attention_forward", "norm_forward_kernel"]
    assert kernels.count("attention_backward_key") == 2
    steps = [timeline.predict(row) for row in rows]
    assert all(step["predicted"] > 0 for step in steps)
    assert timeline.plot(steps, tmp_path / "timeline.png").stat().st_size > 0


def test_measured_launches_are_matched_with_predicted_ones():
    kernels = ["norm", "attention", "norm"]
    run = [("norm", 1.0), ("memset", 9.0), ("attention", 5.0), ("norm", 2.0)]
    slower = [(name, 3 * time) for name, time in run]
    assert measure.launch_medians([*run, *slower, *run], kernels) == [1.0, 5.0, 2.0]
    with pytest.raises(ValueError, match=r"run 1 launched .*'norm', 'norm'.*, predicted were"):
        measure.launch_medians([*run, run[0], run[3], run[2]], kernels)


def test_measured_against_predicted():
    workload = measure.Workload("norms", "normalization", {"rows": 8})
    predicted = measure.compare(workload, "sm_90", on_gpu=False)
    assert [launch.kernel for launch in predicted] == [
        "norm_forward_kernel",
        "norm_backward_kernel",
        "norm_reduce_kernel",
    ]
    assert "Nothing was measured" in measure.table(predicted)
    measured = [dataclasses.replace(launch, measured=2 * launch.predicted) for launch in predicted]
    table = measure.table(measured)
    assert table.count("| 2.00 |") == 3
    assert "measured ÷ predicted: 2.00 (geometric mean of 3 kernels)" in table
