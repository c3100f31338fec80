"""The examples in docstrings run, and give what they say; those in the README run, each by itself."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn

NEEDS = (".kernels", ".backend")  # a GPU; the choice of a backend that these tests do not make
MODULES = [m.name for m in pkgutil.walk_packages(fastattn.__path__, "fastattn.") if not any(n in m.name for n in NEEDS)]
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    known = {"fastattn": fastattn, "torch": torch, "nn": nn}
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs=known, optionflags=options)
    assert not failed


def test_examples_of_the_readme() -> None:
    pytest.importorskip("transformers")
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, {})
