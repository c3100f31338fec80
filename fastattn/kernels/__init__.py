"""Triton kernels and their launchers: the only folder that imports triton."""

import os

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from fastattn.kernels import interpreter

    interpreter.install()
