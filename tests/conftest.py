"""Kernels under test run in Triton's interpreter, watched by the sanitizer, on every machine alike.

`FASTATTN_TEST_GPU=1` (`make gpu`) runs the tests marked `gpu` instead, compiled, on the machine's GPU: interpreted and
compiled kernels do not mix in one process.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from bench.codegen.worker import CompileWorker
from tests.scripts import EXAMPLES

ON_GPU = os.environ.get("FASTATTN_TEST_GPU") == "1"

# Each process of `make test` has a core of its own, and so do the scripts that tests start and compare with.
torch.set_num_threads(1)

if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read at triton's first import
    os.environ.setdefault("FASTATTN_BACKEND", "eager")  # kernel tests opt in: `with fastattn.backend.use("triton")`

    import fastattn.kernels  # noqa: F401  repairs the interpreter
    from tests import sanitizer

    sanitizer.install()


def pytest_configure(config: pytest.Config) -> None:
    if ON_GPU:  # where PyTorch warns of TF32 that is left off, and of its own debug mode: both would be errors
        config.addinivalue_line("filterwarnings", "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not (ON_GPU and torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))
        elif "gpu" not in item.keywords and ON_GPU:
            item.add_marker(pytest.mark.skip(reason="interpreted: make test"))


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> None:
    """`torch.empty` returns NaN (integers: their largest value), so that an element never written cannot look right."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the example scripts importable, for what needs no process of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="session")
def compile_worker(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompileWorker]:
    """Compiles for GPUs in a process of its own; what it compiled is kept between test runs in pytest's cache."""
    cache = getattr(pytestconfig, "cache", None)
    with CompileWorker(cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")) as worker:
        yield worker
