"""How every op is registered: one schema, one implementation for all devices, one fake, one gradient.

A `fastattn::` op is opaque to `torch.compile` and differentiable through the dispatcher, so one graph is kept. Its
gradient op is registered in the same way and has a gradient of its own, written in plain PyTorch, which is what makes
double backward work. Functorch transforms and forward-mode AD never reach an op: `needs_composite` routes them to the
op's plain PyTorch definition before (an op would refuse them).

The dispatcher's way through Python costs more than a small op itself takes on a CPU. `call` therefore
goes straight to the implementation unless somebody listens: a compiler, a tracer, a mode, the profiler, a tensor subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import backend
from fastattn.checks import without_autocast
from fastattn.interpreting import interpreting
from fastattn.tracing import compiling, constant_to_compilers, listening

LIBRARY = torch.library.Library("fastattn", "DEF")
_DIRECT: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
_INTERPRETING = interpreting()
_PLAIN = {Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, list}
Gradient = Callable[[Sequence[bool], Sequence[Tensor | None], Sequence[Any], Sequence[Tensor]], Sequence[Tensor | None]]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register `fastattn::<schema>`; `implementation` chooses the backend from its tensors' device, and runs without autocast."""
    name, implementation = schema.partition("(")[0], without_autocast(implementation)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fastattn, name).default
    _DIRECT[op] = implementation
    return op


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`op(*arguments)`, with all its arguments, by the shortest way."""
    return op(*arguments) if observed(arguments) else _DIRECT[op](*arguments)


def observed(arguments: Sequence[Any]) -> bool:
    """True where an op has to be seen as an op, or where its implementation cannot run on these tensors.

    Kernels cannot where memory holds a tensor's negatives, as that of `z.conj().imag` does: the dispatcher resolves it.
    """
    first = arguments[0]
    if listening() or not _PLAIN.issuperset(map(type, arguments)) or first.is_meta:
        return True
    kernels = _INTERPRETING or not first.is_cpu
    return kernels and any(argument.is_neg() for argument in arguments if isinstance(argument, Tensor))


def tensors_only(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """What an op returns: it cannot return None, and a tensor without numbers stands for it."""
    return tuple([like.new_empty(0) if result is None else result for result in results])


def differentiate(
    op: torch._ops.OpOverload, gradient: Gradient, keep_outputs: Sequence[int] = (), drop_arguments: Sequence[int] = ()
) -> None:
    """Register the gradient of `op`.

    `gradient(needs, grad_outputs, arguments, outputs)` gets which arguments need a gradient, one gradient or None per
    output, the op's arguments (None where a tensor's index is in `drop_arguments`) and its outputs (None where the index
    is not in `keep_outputs`): what is not kept is not held in memory. It returns one gradient or None per argument, where
    Nones at the end may be left out, and may itself be differentiated.
    """
    defaults = [argument.default_value for argument in op._schema.arguments]
    implementation = _DIRECT[op]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)
            result = implementation(*arguments) if keyset is None else below_autograd(keyset, *arguments)
            if isinstance(result, tuple):  # of several outputs, autograd lets no view be changed in place
                result = tuple([output.detach() if output._is_view() else output for output in result])
            outputs = result if isinstance(result, tuple) else (result,)
            kept = [output if i in keep_outputs else None for i, output in enumerate(outputs)]
            tensors = [
                argument if isinstance(argument, Tensor) and i not in drop_arguments else None
                for i, argument in enumerate(arguments)
            ]
            ctx.save_for_backward(*tensors, *kept)
            ctx.constants = [None if isinstance(argument, Tensor) else argument for argument in arguments]
            return result

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
            saved, n = ctx.saved_tensors, len(ctx.constants)
            arguments = [c if t is None else t for t, c in zip(saved[:n], ctx.constants)]

            def gradients_of(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
                return gradient(ctx.needs_input_grad[1:], grads, arguments, saved[n:])

            found = one_by_one(gradients_of, grad_outputs) if in_batch() else gradients_of(grad_outputs)
            return None, *found, *[None] * (n - len(found))

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            result = Function.apply(keyset, *arguments, *defaults[len(arguments) :])
        else:
            result = below_autograd(keyset, *arguments)
        return result if torch.autograd.forward_ad._current_level < 0 else keeps_tangents(op, arguments, result)

    def below_autograd(keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def direct(*arguments: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        result = Function.apply(None, *arguments) if recorded else implementation(*arguments)
        return result if torch.autograd.forward_ad._current_level < 0 else keeps_tangents(op, arguments, result)

    _DIRECT[op] = direct
    LIBRARY.impl(op._schema.name.split("::")[1], autograd, "Autograd", with_keyset=True)


@constant_to_compilers  # compiled autograd would trace the increment and leave it to what runs next
def in_batch() -> int:
    """How many batches of gradients autograd takes through the graph at once: `is_grads_batched`, `vectorize=True`."""
    torch._C._vmapmode_increment_nesting()  # there is no getter
    return int(torch._C._vmapmode_decrement_nesting())


def one_by_one(
    gradient: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]], grad_outputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """`gradient` of each of a batch: a kernel cannot read autograd's batched tensors."""
    level = in_batch()
    batched = {
        i: torch._remove_batch_dim(g, level, 1, 0)
        for i, g in enumerate(grad_outputs)
        if g is not None and _is_batched(g)
    }
    if not batched:
        return gradient(grad_outputs)
    size = len(next(iter(batched.values())))
    samples = [
        gradient([batched[i][sample] if i in batched else g for i, g in enumerate(grad_outputs)])
        for sample in range(size)
    ]
    return [None if of[0] is None else torch._add_batch_dim(torch.stack(of), 0, level) for of in zip(*samples)]


def _is_batched(tensor: Tensor) -> bool:
    return torch._C._dispatch_keys(tensor).has(torch._C._dispatch_key_parse("Batched"))


def has_tangent(*tensors: Any) -> bool:
    """Whether one of them carries a tangent of forward-mode AD."""
    if torch.autograd.forward_ad._current_level < 0:
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(isinstance(t, Tensor) and unpack(t).tangent is not None for t in tensors)


def keeps_tangents(op: torch._ops.OpOverload, arguments: Sequence[Any], result: Any) -> Any:
    """`result`, unless tangents went into the op and none came out: an op has none, but PyTorch's inside it may have."""
    if has_tangent(*arguments) and not has_tangent(*(result if isinstance(result, tuple) else (result,))):
        raise NotImplementedError(
            f"{op._schema.name} has no forward-mode derivative here: take torch.func.jvp of the function itself"
        )
    return result


def needs_composite(*tensors: Tensor | None) -> bool:
    """True inside functorch transforms (grad, vmap, jvp, ...), for forward-mode dual tensors and for distributed ones."""
    if not _PLAIN.issuperset(map(type, tensors)) and any(hasattr(t, "device_mesh") for t in tensors):
        return True  # PyTorch knows how to share its own operations among processes
    if torch.compiler.is_compiling():
        return in_transform()
    if torch._C._are_functorch_transforms_active():
        return True
    return has_tangent(*tensors)


def left_to_compiler(*tensors: Tensor | None) -> bool:
    """Whether `torch.compile` gets an op that only passes over memory as its definition: on a CPU, where what it generates is faster."""
    return compiling() and all(t is None or t.is_cpu for t in tensors) and backend.eager_on_cpu()


@constant_to_compilers
def in_transform() -> bool:
    """Whether a transform is active, also while a compiler traces: it guards on them."""
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0
