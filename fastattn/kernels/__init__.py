"""Triton kernels and their launchers: the only folder that imports triton."""

from fastattn.interpreting import interpreting

if interpreting():
    from fastattn.kernels import interpreter

    interpreter.install()
