"""Where no GPU is, every kernel under test runs in Triton's interpreter, watched by the sanitizer."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read at triton's first import
    os.environ.setdefault("FASTATTN_BACKEND", "eager")  # kernel tests opt in: `with fastattn.backend.use("triton")`

    import fastattn.kernels  # noqa: F401  repairs the interpreter
    from tests import sanitizer

    sanitizer.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> None:
    """`torch.empty` returns NaN (integers: their largest value), so that an element never written cannot look right."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
