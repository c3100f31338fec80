"""The benchmarks' own arithmetic: exponents, and comparisons that see a slowdown and nothing where there is none."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from functools import partial
from itertools import groupby

import pytest
import torch

from bench.bench_normalization import Norm
from bench.contest import Estimate, Times, fast, fast_ratio, race
from bench.processes import Alone
from bench.report import _markdown, _plot_bars, _plot_roofline, change, compare, pyplot, read
from bench.scaling import CURVES, JUDGED, POINTS, exponent, verdict
from bench.sensitivity import slowed, verdicts


def test_exponent():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_two_times_decide_no_exponent():
    assert verdict(2.6, 2.0).endswith("EXCEEDED)")
    told = verdict(2.6, 2.0, judged=False)
    assert "EXCEEDED" not in told
    assert f"not judged: too few lengths, --longest {JUDGED} has enough" in told
    for longest, judged in ((JUDGED // 2, False), (JUDGED, True)):
        sizes = [size for size in CURVES["full"].sizes if size <= longest]
        assert (len(sizes[len(sizes) // 2 :]) >= POINTS) == judged


def test_short_lengths_are_not_judged_by_their_times(monkeypatch, tmp_path, capsys):
    from bench import scaling

    monkeypatch.setattr(scaling, "seconds", lambda kind, size, *_: 1e-9 * size**3)
    monkeypatch.setattr(scaling, "in_child", lambda _, kind, size, *__: size)
    monkeypatch.setattr(scaling, "peak", lambda kind, size, *_: size)
    assert scaling.main(["full", "--longest", "2048", "--out", str(tmp_path)]) == 0
    assert "time 3.00 (expected 2.0, not judged" in capsys.readouterr().out
    assert scaling.main(["full", "--longest", str(JUDGED), "--out", str(tmp_path)]) == 1


MACHINE = {
    "device": "a CPU", "threads": 2, "noisy": False, "copy_GB_per_s": 10.0, "matmul_GFLOP_per_s": {"float32": 100}
}  # fmt: skip


def test_pictures_and_table_say_what_they_show(monkeypatch, tmp_path):
    figures = {"times_ours_low": 0.9, "times_ours_high": 1.1, "TFLOP/s": 0.05, "GB/s": 20.0, "share_of_copy": 2.0}
    rows = [{"case": "c", "provider": name, "times_ours": 1.0, **figures} for name in ("fastattn", "torch")]
    plt, drawn = pyplot(), []
    monkeypatch.setattr(plt, "close", drawn.append)
    _plot_bars(rows, MACHINE, tmp_path)
    _plot_roofline(rows, MACHINE, tmp_path)
    titles = [figure.axes[0].get_title() for figure in drawn]
    assert titles[0] == "Time of others relative to fastattn's\na CPU, 2 threads"
    assert titles[1] == "Speed of each case below this machine's limits (lines)\na CPU, 2 threads"
    head, _, table = _markdown({"machine": MACHINE, "rows": rows}).partition("| case")
    assert "Above 100 % is no error" in head
    assert "200%" in table


NAMED = """
from bench.conftest import SELECTED, _announce
def test_case(request):
    request.config.stash[SELECTED] = {"a": [], "b": []}
    _announce(request.config, "rotary", 1)
"""


def test_the_case_that_is_timed_is_named(tmp_path, pytestconfig):
    """On standard error, past pytest's capture."""
    (tmp_path / "test_named.py").write_text(NAMED)
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stderr == "\n1/2 rotary "


def result(ours, theirs):
    rows = [{"case": "c", "provider": name, "rounds": r} for name, r in (("fastattn", ours), ("torch", theirs))]
    return {"rows": rows}


@pytest.mark.parametrize(("factor", "flagged"), [(1.0, 0), (1.2, 1), (0.8, 0)], ids=["noise", "slower", "faster"])
def test_comparison_flags_a_slowdown_and_not_noise(factor, flagged):
    """The second machine is twice as slow, which is nobody's fault."""
    generator = torch.Generator().manual_seed(0)

    def rounds(scale):
        return (scale * (1 + 0.03 * torch.randn(20, generator=generator))).tolist()

    old, new = result(rounds(1.0), rounds(1.1)), result(rounds(2.0 * factor), rounds(2.2))
    table, slower = compare(old, new)
    assert slower == flagged
    assert ("SLOWER" in table, "faster" in table) == (factor > 1, factor < 1)
    found, peer = change({r["provider"]: r for r in old["rows"]}, {r["provider"]: r for r in new["rows"]})
    assert peer == "torch"
    assert found.value == pytest.approx(factor, rel=0.05)


def test_results_are_read_from_a_folder_and_compared_where_they_have_a_case_in_common(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(result([1.0, 1.1], [1.0, 1.1])))
    assert "| c | 1.00 |" in compare(read(tmp_path), read(tmp_path / "results.json"))[0]
    with pytest.raises(ValueError, match="no case of fastattn's in common"):
        compare(read(tmp_path), {"rows": []})
    (tmp_path / "results.json").write_text(json.dumps(result([], [1.0])))
    with pytest.raises(ValueError, match="is not a results"):
        read(tmp_path)


def test_disturbed_rounds_decide_nothing():
    quiet = [1.0, 1.01, 1.02, 1.03, 1.04] * 4
    assert fast(quiet) == pytest.approx(1.0)
    assert fast([*quiet[:10], *(9.0 for _ in range(10))]) == pytest.approx(1.0, abs=0.02)
    assert fast([2.0]) == 2.0
    assert fast_ratio([(3.0, 20.0), (3.0, 2.0), (30.0, 2.0)] * 5) == 1.5
    assert Times({"a": [3.0, 3.0, 30.0], "b": [20.0, 2.0, 2.0]}).ratio("a", "b").value == 1.5


def test_bounds_widen_with_the_noise():
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, generator=generator).exp().tolist() for n in (10, 1000))
    assert Estimate.of(fast, many).low < fast(many) < Estimate.of(fast, many).high
    width = [bounds.high / bounds.low for bounds in (Estimate.of(fast, few), Estimate.of(fast, many))]
    assert width[0] > 2 * width[1] > 2.0


def test_a_planted_slowdown_takes_that_much_longer():
    def clock(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    work = lambda: sum(range(100_000))  # noqa: E731
    planted = slowed(work, 0.5)
    rounds = [(clock(work), clock(planted)) for _ in range(30)]  # in turn: the machine's own speed changes, too
    plain, slow = map(min, zip(*rounds))
    assert 1.3 < slow / plain < 1.8


def test_short_runs_are_timed_behind_one_of_their_own():
    """Otherwise a run is timed with what another left in the caches."""
    log = []
    run = lambda name: (log.append(name), time.sleep(3e-3))  # noqa: E731
    race({name: partial(run, name) for name in "ab"}, torch.device("cpu"), seconds=0.0, rounds=5)
    assert min(len([*runs]) for _, runs in groupby(log)) == 2


def leaving_a_trace(folder, case):
    """A provider that leaves a file named after its process."""
    return lambda x, *_: (folder / str(os.getpid())).touch() or x


def test_a_job_alone_keeps_a_process_of_its_own(tmp_path):
    case, provider = Norm("fp32", False, 4, 8), partial(leaving_a_trace, tmp_path)
    with closing(Alone(case, provider)) as first, closing(Alone(case, provider)) as second:
        for run in (first, second, first):
            run()
    traces = {int(path.name) for path in tmp_path.iterdir()}
    assert len(traces | {os.getpid()}) == 3


def test_a_provider_that_fails_alone_says_so():
    with pytest.raises(TypeError, match="not callable"):
        Alone(Norm("fp32", False, 4, 8), None)


def test_all_providers_get_the_same_memory():
    seen = []
    case = Norm("fp32", False, 4, 8)
    for _ in range(2):
        case.job(lambda case: lambda x, *_: seen.append(x.data_ptr()) or x)()
    assert seen[0] == seen[1]


REFUSED = [
    ("bench.report", ["loss", "--threads", "0"], "--threads: must be at least 1, got 0"),
    ("bench.report", ["loss", "--seconds", "-1"], "--seconds: must be above 0, got -1"),
    ("bench.report", ["loss", "--out", "FILE"], "--out: cannot be a folder"),
    (
        "bench.report",
        ["--compare", "nowhere", "nowhere"],
        "--compare: nowhere cannot be read: No such file or directory",
    ),
    ("bench.report", ["--compare", "FILE", "FILE"], "file is not a results.json of this benchmark (KeyError('rows'))"),
    ("bench.report", ["--compare", "FOLDER", "FOLDER"], "/results.json cannot be read: "),
    ("bench.scaling", ["loss", "--out", "FILE"], "--out: cannot be a folder"),
    ("bench.scaling", ["full", "--heads", "0"], "--heads: must be at least 1, got 0"),
    ("bench.scaling", ["full", "--dim", "257"], "--dim must be in 1..256, got 257"),
    ("bench.sensitivity", ["--seconds", "0"], "--seconds: must be above 0, got 0"),
    ("bench.sensitivity", ["--runs", "1"], "--runs must be at least 2"),
    ("bench.sensitivity", ["--planted", "nan"], "--planted above 0"),
    ("bench.overhead", ["--seconds", "-1"], "--seconds: must be above 0"),
    ("bench.startup", ["--arch", "foo"], "--arch must be one of sm_80, "),
    ("bench.startup", ["--only", "zzz"], "no first call has 'zzz' in its name; there are attention, "),
    ("bench.tune", ["attention_forward", "--jobs", "0"], "--jobs: must be at least 1, got 0"),
    ("bench.tune", ["attention_forward", "--head-dims", "x"], "--head-dims: invalid literal"),
    ("bench.tune", ["attention_forward", "--head-dims", "0"], "--head-dims must be in 1..256, got [0]"),
    ("bench.tune", ["attention_forward", "--targets", "foo"], "--targets must be of sm_80, "),
    ("bench.tune", ["attention_forward", "--flags", "foo"], "--flags must be of causal, "),
    ("bench.tune", ["attention_forward", "--dtype", "foo"], "--dtype: invalid choice: 'foo'"),
    ("bench.codegen.__main__", ["--jobs", "0"], "--jobs: must be at least 1, got 0"),
    ("bench.codegen.__main__", ["--targets", "sm_90,sm_1"], "--targets must be of sm_80, "),
    ("bench.codegen.__main__", ["--targets", ""], "gfx942, got ''"),
    ("bench.codegen.__main__", ["--kernels", "zzz"], "no case has 'zzz' in its name"),
    ("bench.codegen.__main__", ["--output", "FILE"], "--output: cannot be a folder"),
    ("bench.codegen.schedule", ["--heads", "8"], "unrecognized arguments: --heads 8"),
]
SAID = """
import contextlib, importlib, io, json, os, sys
def said(module, arguments):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            known = {"FILE": sys.argv[1], "FOLDER": os.path.dirname(sys.argv[1])}
            importlib.import_module(module).main([known.get(word, word) for word in arguments])
        except SystemExit as end:
            return end.code, error.getvalue()
print(json.dumps([said(module, arguments) for module, arguments, _ in json.loads(sys.argv[2])]))
"""


def test_what_is_wrong_is_known_before_anything_is_measured(tmp_path):
    """In a process of its own, as importing some of them turns Triton's interpreter off."""
    (tmp_path / "file").write_text("{}")
    command = [sys.executable, "-c", SAID, str(tmp_path / "file"), json.dumps(REFUSED)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    for (code, error), (module, arguments, message) in zip(found, REFUSED):
        assert code == 2, (module, arguments)
        assert message in error
        assert error.startswith(f"usage: python -m {module.removesuffix('.__main__')} ")


WAITING = """
import time
from bench.pool import compilers
with compilers(2) as pool:
    jobs = [pool.submit(time.sleep, 30) for _ in range(8)]
    print("ready", flush=True)
    print([job.result() for job in jobs])
"""


def test_an_interrupt_ends_what_compiles():
    command = [sys.executable, "-c", WAITING]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        process.stdout.readline()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        try:
            assert process.wait(10) != 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_real_timings_flag_a_slowdown_of_a_fifth_and_nothing_else():
    """A run that others disturb too much gets no verdict, so half of them suffice; `python -m bench.sensitivity` is the longer form."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        as_is, slow = verdicts(planted=0.2, runs=4, seconds=1.0)
    finally:
        torch.set_num_threads(threads)
    assert not any("SLOWER" in line or "faster" in line for line in as_is), as_is
    assert sum("SLOWER" in line for line in slow) >= 2, slow
