"""Guidance and one step of the ODE solver in one pass.

    v = unconditional + guidance * (velocity - unconditional)      if unconditional is given
    v = (v + previous) / 2                                         if previous is given: Heun's method
    y = round(x + step * v)                                        [B, ...]

x, velocity, unconditional and previous [B, ...] float, same dtype; step a float or [B] float; guidance a float. y has
the dtype of x. Computed in float32 (float64 for float64 x), rounded once. The native and Triton bodies cannot be
differentiated twice. Errors: TypeError for a dtype, ValueError for a shape or device.
Source: Ho and Salimans 2022, arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import LARGEST
from ..dispatch import Op, choose, direct, plain, transformed, wanted
from ..registered import differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut


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


_shortcut = shortcut("flow_step")


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
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, x, velocity, step, unconditional, guidance, previous)
        if y is not None:
            return y
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
    elif type(step) is not float or not -LARGEST <= step <= LARGEST:
        step = checks.number("step", step)
    if type(guidance) is not float or not -LARGEST <= guidance <= LARGEST:
        guidance = checks.number("guidance", guidance)
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, velocity, step, unconditional=unconditional, guidance=guidance, previous=previous)
    steps, length = (step.to(torch.float32), 0.0) if isinstance(step, Tensor) else (None, step)
    arguments = (x, velocity, steps, length, unconditional, guidance, previous)
    if compiling or not (direct(x, velocity, unconditional) and plain(steps, previous)):
        y = _forward_op(*arguments, backend)
        return y
    if torch.is_grad_enabled() and wanted(x, velocity, steps, unconditional, previous):
        y = _apply(*arguments, backend)
        return y
    y = body("flow_step", backend).forward(*arguments)
    return y


# As torch knows it: torch.ops.blip3o.flow_step, with steps [B] float32, or None: `step` for all samples. Its backward
# op gives the gradients of velocity, steps, unconditional and previous, an empty tensor if not wanted; that of x is dy.
def _setup(context: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    _, velocity, steps, step, unconditional, guidance, previous, backend = inputs
    context.save_for_backward(velocity, steps, unconditional, previous)
    context.options = step, guidance, backend


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asks for, in the order of the arguments."""
    velocity, steps, unconditional, previous = context.saved_tensors
    step, guidance, backend = context.options
    needed = context.needs_input_grad
    wanted = [needed[1], needed[2], needed[4], needed[6]]
    found: Sequence[Tensor | None] = [None] * 4
    if any(wanted):
        both = backward(dy, velocity, steps, step, unconditional, guidance, previous, wanted, backend)
        found = [gradient if want else None for gradient, want in zip(both, wanted, strict=True)]
    return dy if needed[0] else None, found[0], found[1], None, found[2], None, found[3], None


def _fake_backward(
    dy: Tensor,
    velocity: Tensor,
    steps: Tensor | None,
    step: float,
    unconditional: Tensor | None,
    guidance: float,
    previous: Tensor | None,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dvelocity, dunconditional, dprevious = (dy.new_empty(dy.shape if wanted[i] else (0,)) for i in (0, 2, 3))
    return dvelocity, dy.new_empty(dy.shape[:1] if wanted[1] else (0,), dtype=torch.float32), dunconditional, dprevious


def _flops(
    x: Any,
    velocity: Any,
    steps: Any,
    step: float,
    unconditional: Any,
    guidance: float,
    previous: Any,
    *_: Any,
    **__: Any,
) -> int:
    return (2 + 3 * (unconditional is not None) + 2 * (previous is not None)) * torch.Size(x).numel()


_velocities = "Tensor velocity, Tensor? steps, float step, Tensor? unconditional, float guidance, Tensor? previous"
_forward_op, _apply = differentiable(
    f"flow_step(Tensor x, {_velocities}, str backend) -> Tensor",
    f"flow_step_backward(Tensor dy, {_velocities}, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, *_: x.new_empty(x.shape),
    fake_backward=_fake_backward,
    flops=_flops,
    backward_flops=lambda dy, *_, **__: 3 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11), (2, 2, 1152), (3, 1792)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), -0.05))
        guided: dict[str, object] = {"unconditional": draw(*shape), "guidance": 3.0}
        yield Sample(f"{shape} guided", (draw(*shape), draw(*shape), draw.uniform(shape[0])), guided)
        yield Sample(f"{shape} heun", (draw(*shape), draw(*shape), 0.1), {**guided, "previous": draw(*shape)})
    previous: dict[str, object] = {"previous": draw(70)}
    yield Sample("(70,) heun, unguided", (draw(70), draw(70), draw.uniform(70)), previous)
    yield Sample("several chunks", (draw(2, 5003), draw(2, 5003), draw.uniform(2)))
    turned: dict[str, object] = {"unconditional": draw(3, 8, 10)[..., ::2], "guidance": 1.5}
    yield Sample("strided", (draw(8, 3, 5).transpose(0, 1), draw(3, 5, 8).mT, draw.uniform(6)[::2]), turned)
    yield Sample("no samples", (draw(0, 33), draw(0, 33), draw.uniform(0)))
    yield Sample("no elements", (draw(2, 0), draw(2, 0), draw.uniform(2)), {"previous": draw(2, 0)})


OP = Op(
    "flow_step",
    flow_step,
    reference,
    samples,
    differentiable=("x", "velocity", "step", "unconditional", "previous"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
