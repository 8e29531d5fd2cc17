"""The ops as torch knows them: `torch.ops.blip3o.*`, for torch.compile, fake and meta tensors, functorch and modes.

In eager mode a plain tensor does not come this way: a call through here costs several times as much as the C function
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .bodies import body
from .dispatch import direct

LIBRARY = torch.library.Library("blip3o", "DEF")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]
) -> torch._ops.OpOverload:
    """Define one op: its schema, its body on CPU and CUDA, its result's shape, its FLOPs (from shapes)."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"blip3o::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.blip3o, name)
    register_flop_formula(packet)(flops)
    overload: torch._ops.OpOverload = packet.default
    return overload


def differentiable(
    schema: str,
    backward_schema: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    flops: Callable[..., int],
    backward_flops: Callable[..., int],
    setup: Callable[..., None],
    gradients: Callable[..., tuple[torch.Tensor | None, ...]],
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    hidden: bool = False,
    shortcuts: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> tuple[torch._ops.OpOverload, Callable[..., Any]]:
    """An op and its backward op as torch knows them, and the same in eager mode: the `apply` of an autograd.Function.

    forward, backward: take what the schemas say, and if not given call the bodies with all but the last, the backend.
    setup(context, inputs, results): keeps what the gradient needs.
    gradients(context, backward, *dys): those of all inputs; `backward` is the backward op, or if it may be, the plain
    function.  hidden: all results but the first are for the backward pass alone; `apply` returns the first.
    shortcuts: shortcut.py's, of the forward pass with all results and of the backward pass.
    """
    name = schema[: schema.index("(")]
    run_forward = forward or (lambda *inputs: body(name, inputs[-1]).forward(*inputs[:-1]))
    run_backward = backward or (lambda *inputs: body(name, inputs[-1]).backward(*inputs[:-1]))
    op = register(schema, run_forward, fake, flops)
    backward_op = register(backward_schema, run_backward, fake_backward, backward_flops)

    def setup_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup(ctx, inputs, output)
        if hidden:
            ctx.mark_non_differentiable(*output[1:])

    def op_gradients(context: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return gradients(context, backward_op, *(dys[:1] if hidden else dys))

    def twice(context: Any, *dys: torch.Tensor) -> Sequence[None]:
        raise RuntimeError(f"{name}: its gradient cannot be differentiated; use the reference backend for that")

    torch.library.register_autograd(f"blip3o::{name}", op_gradients, setup_context=setup_op, lib=LIBRARY)
    torch.library.register_autograd(f"blip3o::{name}_backward", twice, lib=LIBRARY)

    def shortened(way: Callable[..., Any], run: Callable[..., Any], *more: object) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            if dispatch.shortcut >= 0 and inputs[-1] == "native":
                results = way(dispatch.shortcut, *inputs[:-1], *more)
                if results is not None:
                    return results
            return run(*inputs)

        return call

    eager_run, eager_run_backward = run_forward, run_backward
    if shortcuts is not None:
        eager_run = shortened(shortcuts[0], run_forward, True)
        eager_run_backward = shortened(shortcuts[1], run_backward)

    def eager_forward(context: Any, *inputs: Any) -> Any:
        results = eager_run(*inputs)
        setup(context, inputs, results)
        return results[0] if hidden else results

    def eager_backward(context: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run = eager_run_backward if direct(*dys) else backward_op  # type: ignore[arg-type]
        if not torch.is_grad_enabled():  # no create_graph: nobody can differentiate the results
            return gradients(context, run, *dys)
        with torch.no_grad():
            results = gradients(context, run, *dys)
        return _once(results, (*dys, *context.saved_tensors))

    methods = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)  # a class of its own: grad_fn says which op it is
    # Function.apply itself only adds what functorch needs, 1.8 us; where that is active nobody comes here (`direct`).
    return op, super(torch.autograd.Function, function).apply


def _once(
    results: tuple[torch.Tensor | None, ...], sources: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients, which raise when they are differentiated again.

    torch's own once_differentiable only notices that where the incoming gradient depends on something. Under a sum it
    does not, and the second derivative by way of the saved inputs would silently be missing.
    """
    given = [x for x in sources if x is not None]
    return tuple(None if result is None else _Once.apply(result, *given) for result in results)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> None:
        raise RuntimeError("this gradient cannot be differentiated; use the reference backend for that")
