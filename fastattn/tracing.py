"""Who looks on while a call is made: what is seen must be seen as an op, and may have no numbers to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def constant_to_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compiler.assume_constant_result` does, which imports the compiler: a second, twice the time of all the rest."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def listening() -> bool:
    """Whether a compiler, a tracer, a mode, a transform or the profiler sees what is called."""
    return tracing() or torch._C._is_torch_function_mode_enabled() or torch.autograd._profiler_enabled()


def tracing() -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a transform is active: its tensors may have no numbers."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def compiling() -> bool:
    """Whether `torch.compile` traces, for the machine that runs it; an export's program may run elsewhere."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def readable(tensor: Tensor) -> bool:
    """Whether a check may look at the numbers: on a GPU the host would wait for them, while tracing there may be none."""
    return tensor.is_cpu and not tracing() and not isinstance(tensor, FakeTensor)
