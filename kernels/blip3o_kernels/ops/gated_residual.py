"""A residual branch behind a tanh gate, with the sandwich norm if a weight is given.

    branch = rms_norm(x, weight, eps) if weight is given else x     [B, T, D]  float32, not rounded
    y      = round(residual + tanh(gate) * branch)                  [B, T, D]

residual and x [B, T, D] float, same dtype; gate [B, D] float; weight [D] float or None. y has the dtype of residual.
Computed in float32 (float64 for float64), rounded once. The native and Triton bodies cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape or device.
Source: Lumina-Next, Zhuo et al. 2024, arXiv:2406.18583.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def reference(residual: Tensor, x: Tensor, gate: Tensor, *, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    dtype = checks.wide(x.dtype)
    branch = x.to(dtype)
    if weight is not None:
        branch = branch * torch.rsqrt(branch.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return torch.addcmul(residual.to(dtype), torch.tanh(gate.to(dtype)).unsqueeze(1), branch).to(x.dtype)


_shortcut = shortcut("gated_residual")


def gated_residual(
    residual: Tensor, x: Tensor, gate: Tensor, *, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """residual + tanh(gate)[:, None] * norm(x), the norm only if a weight is given; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, residual, x, gate, weight, eps)
        if y is False:
            y = _apply(residual, x, gate, weight, eps, "native")
        if y is not None:
            return y
    checks.floating("x", x)
    dtype, shape = x.dtype, x.shape
    if len(shape) != 3 or not shape[2]:
        checks.fail("x", "shape [B, T, D] with D > 0", list(shape))
    batch, _, width = shape
    checks.like("residual", residual, "x", x)
    checks.parameter("gate", gate, (batch, width), "x", x)
    if weight is not None:
        checks.parameter("weight", weight, (width,), "x", x)
    if type(eps) is not float or not 0.0 <= eps <= LARGEST:
        eps = checks.eps(eps)
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(residual, x, gate, weight=weight, eps=eps)
    if gate.dtype is not dtype or (weight is not None and weight.dtype is not dtype):  # one dtype for both
        gate, weight = gate.to(torch.float32), None if weight is None else weight.to(torch.float32)
    if compiling or not (direct(residual, x, gate) and plain(weight)):
        y = _forward_op(residual, x, gate, weight, eps, backend)[0]
        return y
    if torch.is_grad_enabled() and wanted(residual, x, gate, weight):
        y = _apply(residual, x, gate, weight, eps, backend)
        return y
    y, _ = body("gated_residual", backend).forward(residual, x, gate, weight, eps, False)
    return y


# As torch knows it: torch.ops.blip3o.gated_residual, which returns what the backward pass needs too: tanh(gate), and
# with a weight 1/rms of each row.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    _, x, gate, weight, _, context.backend = inputs
    context.save_for_backward(x, gate, weight, results[1])


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of residual, x, gate and weight that autograd asks for. The residual's is dy itself."""
    needs = context.needs_input_grad
    gradients = (dy, *backward(dy, *context.saved_tensors, context.backend))
    return *(gradient if needs[i] else None for i, gradient in enumerate(gradients)), None, None


def _fake(residual: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, width = x.shape
    saved = batch * (width if weight is None else width + tokens)
    return x.new_empty(x.shape), x.new_empty(saved, dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, saved: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = gate.new_empty(0 if weight is None else weight.shape[0])
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


_forward_op, _apply = differentiable(
    "gated_residual(Tensor residual, Tensor x, Tensor gate, Tensor? weight, float eps, str backend)"
    " -> (Tensor, Tensor)",
    "gated_residual_backward(Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor saved, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    flops=lambda residual, *_, **__: 6 * torch.Size(residual).numel(),
    backward_flops=lambda dy, *_, **__: 12 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
    hidden=True,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1, 8), (2, 5, 64), (3, 7, 129), (18, 5, 200), (1, 3, 1152), (2, 1, 1792)):
        batch, _, width = shape
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), draw(batch, width)))
        yield Sample(f"{shape} norm", (draw(*shape), draw(*shape), draw(batch, width)), {"weight": draw(width)})
    yield Sample("widest", (draw(1, 2, 9001), draw(1, 2, 9001), draw(1, 9001)), {"weight": draw(9001)})
    gates = torch.linspace(-12, 12, 4000, device=device).to(dtype).view(1, -1)
    yield Sample("any gate", (draw(1, 1, 4000), draw(1, 1, 4000), gates))
    # Enough elements of every gradient that a few large errors do not decide about the root mean square.
    yield Sample("small gates", (draw(2, 3, 200), draw(2, 3, 200), draw(2, 200, scale=1e-4)), {"weight": draw(200)})
    yield Sample("chunked", (draw(2, 3, 200), draw(2, 3, 200), draw(2, 800).chunk(4, dim=-1)[1]), {"weight": draw(200)})
    parts = draw(2, 6, 400).chunk(2, dim=-1)
    yield Sample("strided rows", (*parts, draw(2, 200)), {"weight": draw(200)})
    yield Sample("transposed", (draw(5, 2, 32).transpose(0, 1), draw(5, 2, 32).transpose(0, 1), draw(32, 2).t()))
    wide = torch.promote_types(dtype, torch.float32)
    yield Sample("float32 gate", (draw(2, 3, 200), draw(2, 3, 200), draw(2, 200, dtype=wide)), {"weight": draw(200)})
    yield Sample("many tokens", (draw(2, 70, 200), draw(2, 70, 200), draw(2, 200)), {"weight": draw(200), "eps": 0.1})
    last = (draw(2, 3, 400)[..., ::2], draw(2, 3, 400)[..., ::2], draw(2, 400)[:, ::2])
    yield Sample("strided last", last, {"weight": draw(400)[::2]})
    yield Sample("no samples", (draw(0, 3, 8), draw(0, 3, 8), draw(0, 8)), {"weight": draw(8)})
    yield Sample("no tokens", (draw(2, 0, 8), draw(2, 0, 8), draw(2, 8)), {"weight": draw(8)})
    for width in (8000, 16400):  # whole vectors, for each way in which a GPU's threads share a wide row
        shape = (1, 2, width)
        yield Sample(f"wide {width}", (draw(*shape), draw(*shape), draw(1, width)), {"weight": draw(width)})


OP = Op(
    "gated_residual",
    gated_residual,
    reference,
    samples,
    differentiable=("residual", "x", "gate", "weight"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
