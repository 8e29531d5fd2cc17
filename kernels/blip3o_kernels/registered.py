"""The ops as torch knows them: `torch.ops.blip3o.*`, for torch.compile, fake and meta tensors, functorch and modes.

In eager mode a plain tensor does not come this way: a call through here costs several times as much as the C function
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

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


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give `blip3o::name` a gradient, and its own backward op `blip3o::name_backward` an error instead of one."""

    def twice(context: Any, *gradients: torch.Tensor) -> Sequence[None]:
        raise RuntimeError(f"{name}: its gradient cannot be differentiated; use the reference backend for that")

    torch.library.register_autograd(f"blip3o::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"blip3o::{name}_backward", twice, lib=LIBRARY)


def differentiable_once(backward: Callable[..., tuple[torch.Tensor | None, ...]]) -> Callable[..., Any]:
    """For the backward method of an autograd.Function: its results raise when they are differentiated again.

    torch's own once_differentiable only notices that where the incoming gradient depends on something. Under a sum it
    does not, and the second derivative by way of the saved inputs would silently be missing.
    """

    @wraps(backward)
    def guarded(context: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():  # no create_graph: nobody can differentiate the results
            return backward(context, *gradients)
        with torch.no_grad():
            results = backward(context, *gradients)
        sources = [x for x in (*gradients, *context.saved_tensors) if x is not None]
        return tuple(None if result is None else _Once.apply(result, *sources) for result in results)

    return guarded


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> None:
        raise RuntimeError("this gradient cannot be differentiated; use the reference backend for that")
