"""What a benchmark is made of: a case (one job at one size) and providers (who can do it).

A provider is one small function: it takes the case and returns what does the job, or raises `Unavailable` with the reason.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import Tensor

from bench import machine
from bench.contest import Run
from tests.compare import assert_close

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Unavailable(Exception):
    """A provider cannot do a case here; the message says why."""


def need(package: str) -> ModuleType:
    """The package, or Unavailable where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"the package {package} is not installed") from error


def in_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it, for exactly the shapes it gets; never silently the plain function.

    Raises:
        Unavailable: nothing here can compile what it makes.
    """
    problem = _compile_problem()
    if problem:
        raise Unavailable(f"torch.compile does not work here: {problem}")
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


@cache
def _compile_problem() -> str:
    """What goes wrong when the smallest function is compiled, or nothing."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=machine.device()))
    except Exception as error:
        return str(error).strip().partition("\n")[0]
    return ""


@dataclass(frozen=True)
class Case(ABC):
    """One job at one size.

    Attributes:
        dtype: "fp32", "bf16" or "fp16".
        alone: whether on a CPU each provider is timed in a process of its own, as who uses it has it.
    """

    alone: ClassVar[bool] = False
    dtype: str

    @property
    @abstractmethod
    def name(self) -> str:
        """The title of the comparison."""

    @property
    def flops(self) -> float | None:
        """Floating-point operations of one run, at least."""
        return None

    @property
    def traffic(self) -> float | None:
        """Bytes that one run has to read and write, at least."""
        return None

    @abstractmethod
    def small(self) -> Any:
        """The same job, so small that the definition can check it."""

    @abstractmethod
    def job(self, provider: Callable[[Any], Any]) -> Run:
        """The job, ready to run."""

    @abstractmethod
    def check(self, provider: Callable[[Any], Any]) -> None:
        """AssertionError unless the provider's results at a small size agree with the fp64 definition."""


def comparison(
    providers: Mapping[str, object],
    default: Iterable[Case],
    rest: Iterable[Case] = (),
    slow: Callable[[Any, str], bool] = lambda case, name: False,
) -> pytest.MarkDecorator:
    """Parametrizes a test with `case` and `provider`: every provider in every case.

    Args:
        providers: by name.
        default: the cases that run without further ado.
        rest: those that only `--all` runs.
        slow: whether only `--all` runs a provider, by its name, in a default case.
    """
    marked = [(case, False) for case in default]
    marked += [(case, True) for case in rest if (case, False) not in marked]
    return pytest.mark.parametrize(
        ("case", "provider"),
        [
            pytest.param(case, name, id=f"{case.name}-{name}", marks=[pytest.mark.slow] * (extra or slow(case, name)))
            for case, extra in marked
            for name in providers
        ],
    )


def if_compiled(case: Case, name: str) -> bool:
    """For `comparison`: a provider that torch.compile takes its time for."""
    return "torch.compile" in name


C = TypeVar("C", bound="OpCase")
Provider = Callable[[C], Callable[..., Tensor]]


@dataclass(frozen=True)
class OpCase(Case, Generic[C]):
    """A function of tensors with one output, or that and its gradients.

    Attributes:
        backward: take the gradients of all the inputs that `differentiable` counts.
    """

    backward: bool

    @abstractmethod
    def inputs(self) -> list[Tensor]:
        """The tensors, differentiable ones first."""

    @property
    @abstractmethod
    def differentiable(self) -> int:
        """How many of the inputs get gradients."""

    @abstractmethod
    def definition(self, *inputs: Tensor) -> Tensor:
        """What the result should be, in the dtype of the inputs, on the CPU."""

    def job(self, provider: Provider[Any]) -> Run:
        return self._run(provider(self), *_shared_inputs(self))

    def check(self, provider: Provider[Any]) -> None:
        case = self.small()
        torch.manual_seed(0)
        inputs = case.inputs()
        dy = case._grad_output(inputs)
        got = case._run(provider(case), inputs, dy)()
        inputs, dy = [x.cpu() for x in inputs], dy.cpu()
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        truth, plain = case._run(case.definition, wide, dy.double())(), case._run(case.definition, inputs, dy)()
        for i, (ours, *expected) in enumerate(zip(got, truth, plain)):
            assert_close(f"gradient {i}" if i else "output", ours.cpu(), *expected)

    def _grad_output(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.randn_like(inputs[0])

    def _run(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], list[Tensor]]:
        n = self.differentiable if self.backward else 0
        leaves = [x.detach().requires_grad_(i < n) for i, x in enumerate(inputs)]

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(self.backward):
                out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves[:n], dy)] if n else [out]

        return run

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=machine.device()).to(DTYPES[self.dtype])


@lru_cache(maxsize=1)
def _shared_inputs(case: OpCase[Any]) -> tuple[list[Tensor], Tensor]:
    """The inputs and the gradient that all providers of a case get: where memory lies decides up to a third of a short run's time."""
    inputs = case.inputs()
    return inputs, case._grad_output(inputs)
