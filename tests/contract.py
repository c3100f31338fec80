"""What every op keeps: one check per promise, run over the cases of every op.

CASES = {"name": Op(ours, definition, {"input": (3, 4)})}

@pytest.mark.parametrize("check", contract.CHECKS)
...
    check(CASES[name])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from tests.compare import OTHER_DRAWS, assert_close, max_error, value_and_gradients

BACKENDS = ("eager", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Op:
    """One way to call an op.

    Attributes:
        ours: called with the tensors by name; returns a tensor or a tuple of tensors.
        definition: the same, naive, in the dtype of its inputs: with fp64 inputs it is the truth.
        shapes: the shape of each tensor, all differentiable, drawn from the normal distribution.
        plain: the same in plain PyTorch, whose error sets the tolerance; default `definition`.
        dtypes: dtype of the tensors that do not follow the case's.
        factors: multiplies a tensor; fan-in scaling of weights, for example.
        shifts: is added to a tensor.
        grows: the names whose first dimension is a batch and may vary from call to call of a compiled function.
        left_to_compiler: whether the op is its definition under torch.compile on a CPU.
    """

    ours: Callable[..., Any]
    definition: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    plain: Callable[..., Any] | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, float] = field(default_factory=dict)
    grows: tuple[str, ...] = ("input",)
    left_to_compiler: bool = False

    def tensors(self, dtype: torch.dtype = torch.float32, extra: int = 0, seed: int = 0) -> list[Tensor]:
        """`extra` is added to the batch of the tensors that may grow."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for name, shape in self.shapes.items():
            size = (shape[0] + extra, *shape[1:]) if name in self.grows else shape
            x = torch.randn(size, generator=generator, dtype=torch.float64)
            x = x * self.factors.get(name, 1.0) + self.shifts.get(name, 0.0)
            made.append(x.to(self.dtypes.get(name, dtype)))
        return made

    def call(self, function: Callable[..., Any]) -> Callable[..., Sequence[Tensor]]:
        """`function` of the tensors in order, returning a tuple."""

        def positional(*tensors: Tensor) -> Sequence[Tensor]:
            result = function(**dict(zip(self.shapes, tensors)))
            return result if isinstance(result, tuple) else (result,)

        return positional


def check_values(op: Op, backend: str, dtype: torch.dtype) -> None:
    """Outputs and every gradient are within a factor of plain PyTorch's error, and have the right dtypes; inputs stay as they are."""
    tensors = op.tensors(dtype)
    before = [t.clone() for t in tensors]
    with fastattn.backend.use(backend):
        outputs, grads = _differentiated(op, op.ours, tensors)
    assert all(map(torch.equal, tensors, before)), "an input was written over"
    assert [g.dtype for g in grads] == [x.dtype for x in tensors]
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient of {name}" for name in op.shapes]
    for i, (name, got, truth, plain) in enumerate(zip(names, outputs + grads, *_truth_and_plain(op, tensors))):
        assert_close(name, got, truth, plain, others=lambda i=i: _plain_errors(op, dtype, i))


def _truth_and_plain(op: Op, tensors: list[Tensor]) -> list[list[Tensor]]:
    """Outputs and gradients of the definition in fp64, and of plain PyTorch."""
    both = (op.definition, [t.double() for t in tensors]), (op.plain or op.definition, tensors)
    return [outputs + grads for outputs, grads in (_differentiated(op, f, given) for f, given in both)]


def _plain_errors(op: Op, dtype: torch.dtype, result: int) -> Iterator[float]:
    """Of one of the results, in other draws of the tensors."""
    for seed in range(1, 1 + OTHER_DRAWS):
        truth, plain = _truth_and_plain(op, op.tensors(dtype, seed=seed))
        yield max_error(plain[result], truth[result])


def check_strides(op: Op, backend: str) -> None:
    """Inputs and incoming gradients that are not contiguous, or stored as their negatives, give what plain ones do."""
    tensors = op.tensors()
    with fastattn.backend.use(backend):
        expected = _differentiated(op, op.ours, tensors)
        for stored in (_scattered, _negated):
            got = _differentiated(op, op.ours, [stored(t) for t in tensors], stored)
            for a, b in zip(got[0] + got[1], expected[0] + expected[1]):
                assert max_error(a, b) <= 1e-5 * max(1.0, b.abs().max().item() if b.numel() else 0.0)


def check_determinism(op: Op, backend: str) -> None:
    """Two runs agree bit for bit."""
    with fastattn.backend.use(backend):
        (a, da), (b, db) = (_differentiated(op, op.ours, op.tensors()) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a + da, b + db))


def check_double_backward(op: Op, backend: str) -> None:
    """Gradients of a random combination of all the first gradients, with respect to inputs and incoming gradients."""
    tensors = op.tensors()
    with fastattn.backend.use(backend):
        got = _twice_differentiated(op, op.ours, tensors)
    truth = _twice_differentiated(op, op.definition, [t.double() for t in tensors])
    plain = _twice_differentiated(op, op.plain or op.definition, tensors)
    for i, triple in enumerate(zip(got, truth, plain)):
        assert_close(f"second gradient {i}", *triple, relative=torch.finfo(torch.float32).eps)


def check_registration(op: Op, backend: str) -> None:
    """torch.library.opcheck of every custom op that the call and its backward run."""
    with fastattn.backend.use(backend):
        with recording() as calls:
            _differentiated(op, op.ours, op.tensors())
        assert len(calls) >= 2, "no custom op, or no custom backward op, was called"
        for func, arguments in calls:
            backward = "backward" in str(func)
            for a in arguments:
                if isinstance(a, Tensor) and a.is_floating_point() and not backward:
                    a.requires_grad_()
            torch.library.opcheck(func, tuple(arguments))


def check_compiles(op: Op, backend: str, dynamic: bool) -> None:
    """torch.compile keeps one graph, for one shape and for a batch that varies, and every number, or where the op is left to it as its
    definition, all but their rounding."""
    torch._dynamo.reset()
    compiled = torch.compile(op.call(op.ours), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with fastattn.backend.use(backend):
        for extra in (0, 3) if dynamic else (0,):
            tensors = op.tensors(extra=extra)
            expected = _differentiated(op, op.ours, tensors)
            got = value_and_gradients(compiled, tensors, [_draw(y, i) for i, y in enumerate(expected[0])])
            if op.left_to_compiler and backend == "eager":
                for i, triple in enumerate(zip(got[0] + got[1], *_truth_and_plain(op, tensors))):
                    assert_close(f"result {i}", *triple)
            else:
                assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], expected[0] + expected[1]))


def check_transforms(op: Op, backend: str) -> None:
    """func.grad, vmap, vmap of grad, jvp and forward-mode AD match fp64, and none is silently zero."""
    first, *rest = op.tensors()
    tangent = _draw(first, 7)

    def results(function: Callable[..., Any], x: Tensor, others: list[Tensor], t: Tensor) -> Iterator[Tensor]:
        def f(x: Tensor) -> Tensor:
            return op.call(function)(x, *others)[0]

        def scalar(x: Tensor) -> Tensor:
            return f(x).sin().sum()

        yield torch.func.grad(scalar)(x)
        yield torch.vmap(f)(torch.stack([x, 2 * x]))
        yield torch.vmap(torch.func.grad(scalar))(torch.stack([x, 2 * x]))
        yield torch.func.jvp(f, (x,), (t,))[1]
        with torch.autograd.forward_ad.dual_level():
            yield torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, t))).tangent

    with fastattn.backend.use(backend):
        got = list(results(op.ours, first, rest, tangent))
    truth = results(op.definition, first.double(), [t.double() for t in rest], tangent.double())
    for a, b in zip(got, truth):
        assert b.abs().max() > 1e-3
        assert max_error(a, b) <= 1e-5 * max(1.0, b.abs().max().item())


@contextmanager
def recording(namespace: str = "fastattn") -> Iterator[list[tuple[Any, list[Any]]]]:
    """The ops of ours, or of another namespace, that run inside, each with copies of its arguments."""
    calls: list[tuple[Any, list[Any]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == namespace:
                calls.append((func, [a.detach().clone() if isinstance(a, Tensor) else a for a in args]))
            return func(*args, **(kwargs or {}))

    with Record():
        yield calls


@contextmanager
def no_launch() -> Iterator[None]:
    """Fails if an op runs inside: errors are raised before anything is launched."""
    with recording() as calls:
        yield
    assert not calls, f"{calls[0][0]} ran"


def _draw(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def _differentiated(
    op: Op, function: Callable[..., Any], tensors: list[Tensor], change: Callable[[Tensor], Tensor] = lambda g: g
) -> tuple[list[Tensor], list[Tensor]]:
    with torch.no_grad():
        outputs = op.call(function)(*tensors)
    grads = [change(_draw(y, i)) for i, y in enumerate(outputs)]
    return value_and_gradients(op.call(function), tensors, grads)


def _twice_differentiated(op: Op, function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op.call(function)(*leaves)
    draws = [_draw(y, i).requires_grad_() for i, y in enumerate(outputs)]
    first = torch.autograd.grad(outputs, leaves, draws, create_graph=True)
    weights = [_draw(g, 50 + i) for i, g in enumerate(first)]
    inputs = [*leaves, *draws]
    second = torch.autograd.grad(first, inputs, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(second, inputs)]


def _scattered(tensor: Tensor) -> Tensor:
    """The same numbers with a gap after each and the dimensions laid out in reverse order."""
    reversed_sizes = tuple(reversed(tensor.shape))
    memory = tensor.new_full((*reversed_sizes, 2), float("nan"))
    view = memory[..., 0].permute(tuple(reversed(range(tensor.dim()))))
    return view.copy_(tensor)


def _negated(tensor: Tensor) -> Tensor:
    """The same numbers, whose memory holds their negatives, as that of `z.conj().imag` does."""
    return torch._neg_view(-tensor)
