"""The ops as torch knows them: `torch.ops.blip3o.*`, for torch.compile, fake and meta tensors, functorch and modes.

In eager mode a plain tensor does not come this way: a call through here costs several times as much as the C function
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
