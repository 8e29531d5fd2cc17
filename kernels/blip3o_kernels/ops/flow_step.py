"""Guidance and one step of the ODE solver in one pass.

    v = unconditional + guidance * (velocity - unconditional)      if unconditional is given
    v = (v + previous) / 2                                         if previous is given: the second half of Heun's
    method
    y = round(x + step * v)                                        [B, ...]

x, velocity, unconditional and previous [B, ...] float, same dtype; step a float or [B] float; guidance a float. y has
the dtype of x. Computed in
float32 (float64 for float64 x), rounded once. Errors: TypeError for a dtype, ValueError for a shape or device.
Source: Ho and Salimans 2022, arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(
    x: Tensor,
    velocity: Tensor,
    step: float | Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    previous: Tensor | None = None,
) -> Tensor:
    dtype = checks.wide(x.dtype)
    v = velocity.to(dtype)
    if unconditional is not None:
        base = unconditional.to(dtype)
        v = base + guidance * (v - base)
    if previous is not None:
        v = (v + previous.to(dtype)) * 0.5
    length = step.to(dtype).view(-1, *[1] * (x.dim() - 1)) if isinstance(step, Tensor) else step
    return (x.to(dtype) + length * v).to(x.dtype)


def flow_step(
    x: Tensor,
    velocity: Tensor,
    step: float | Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    previous: Tensor | None = None,
) -> Tensor:
    """x + step * v, with classifier-free guidance and Heun's average; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() == 0:
        checks.fail("x", "shape [B, ...]", list(x.shape))
    checks.like("velocity", velocity, "x", x)
    if unconditional is not None:
        checks.like("unconditional", unconditional, "x", x)
    if previous is not None:
        checks.like("previous", previous, "x", x)
    if isinstance(step, Tensor):
        checks.floating("step", step)
        checks.shape("step", step, x.shape[:1])
        checks.same_device("step", step, "x", x)
    choose(OP, x)
    return reference(x, velocity, step, unconditional=unconditional, guidance=guidance, previous=previous)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), -0.05))
        guided: dict[str, object] = {"unconditional": draw(*shape), "guidance": 3.0}
        yield Sample(f"{shape} guided", (draw(*shape), draw(*shape), draw.uniform(shape[0])), guided)
        yield Sample(f"{shape} heun", (draw(*shape), draw(*shape), 0.1), {**guided, "previous": draw(*shape)})


OP = Op(
    "flow_step", flow_step, reference, samples, differentiable=("x", "velocity", "step", "unconditional", "previous")
)
