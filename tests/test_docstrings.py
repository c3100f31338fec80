"""The examples in docstrings run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import fastattn

NEEDS = (".kernels", ".backend")  # a GPU; the choice of a backend that these tests do not make
MODULES = [m.name for m in pkgutil.walk_packages(fastattn.__path__, "fastattn.") if not any(n in m.name for n in NEEDS)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    known = {"fastattn": fastattn, "torch": torch, "nn": nn}
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs=known, optionflags=options)
    assert not failed
