"""The gated activation of Llama's and Lumina's feed-forward networks.

    y = round(gate * sigmoid(gate) * up)        [..., M]

gate and up [..., M] float, same shape and dtype; y likewise. Without up, gate [..., 2M] holds both, gate first: what
one matrix product gives. That form trains faster, because its gradient is one tensor and autograd has nothing to join.
Computed in float32 (float64 for float64), rounded once. The native and Triton bodies cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape or device. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import FLOATING, STRIDED
from ..dispatch import Op, choose, direct, transformed
from ..registered import LIBRARY, differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut


def reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    dtype = checks.wide(gate.dtype)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


_shortcut = shortcut("swiglu")


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, rounded once; without up, gate [..., 2M] holds both. See the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, gate, up)
        if y is False:
            y = _apply(gate, up, "native")
        if y is not None:
            return y
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(gate, Tensor) or gate.dtype not in FLOATING or gate.layout is not STRIDED:
        checks.floating("gate", gate)
    shape = gate.shape
    if not shape or (up is None and shape[-1] % 2):
        checks.fail("gate", "shape [..., M], or [..., 2M] without up", list(shape))
    if up is not None:
        checks.like("up", up, "gate", gate)
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, gate)
    if backend == "reference":
        return reference(gate, up)
    if compiling or not direct(gate, up):
        y = _forward_op(gate, up, backend)
        return y
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        y = _apply(gate, up, backend)
        return y
    y = body("swiglu", backend).forward(gate, up)
    return y


# As torch knows it: torch.ops.blip3o.swiglu. Its backward op gives dgate and dup; without up the gradient of both and
# an empty tensor.
def _setup(context: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    gate, up, context.backend = inputs
    context.save_for_backward(gate, up)


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = context.saved_tensors
    dgate, dup = backward(dy, gate, up, context.backend)
    return dgate, None if up is None else dup, None


def _batched(info: Any, dims: tuple[int | None, ...], gate: Tensor, up: Tensor | None, backend: str) -> Any:
    """vmap: the batch is more rows."""
    moved = [
        x if x is None else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip((gate, up), dims[:2], strict=True)
    ]
    return _forward_op(*moved, backend), 0


_forward_op, _apply = differentiable(
    "swiglu(Tensor gate, Tensor? up, str backend) -> Tensor",
    "swiglu_backward(Tensor dy, Tensor gate, Tensor? up, str backend) -> (Tensor, Tensor)",
    fake=lambda gate, up, *_: gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)),
    fake_backward=lambda dy, gate, up, *_: (gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)),
    flops=lambda gate, up, *_, **__: 5 * torch.Size(gate).numel() // (1 if up is not None else 2),
    backward_flops=lambda dy, *_, **__: 11 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
)
torch.library.register_vmap("blip3o::swiglu", _batched, lib=LIBRARY)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1,), (3, 7), (2, 5, 64), (33, 129), (3, 1152), (1, 2, 1792)):
        yield Sample(f"{shape}", (draw(*shape, scale=3.0), draw(*shape)))
    yield Sample("chunked", tuple(draw(5, 96).chunk(2, dim=-1)))
    yield Sample("chunked 3-D", tuple(draw(3, 5, 42).chunk(2, dim=-1)))
    yield Sample("packed", (draw(2, 5, 96),))
    yield Sample("packed, odd", (draw(9, 74, scale=3.0),))
    yield Sample("packed, wide", (draw(2, 2304),))
    yield Sample("packed, strided rows", (draw(6, 3, 40)[:, 1],))
    yield Sample("transposed", (draw(2, 3, 5, 32).transpose(1, 2), draw(2, 5, 3, 32)))
    yield Sample("strided last", (draw(6, 40)[:, ::2], draw(6, 20)))
    yield Sample("extreme", (draw(4, 32, scale=60.0), draw(4, 32)))
    yield Sample("no rows", (draw(0, 8), draw(0, 8)))
    yield Sample("packed, no rows", (draw(2, 0, 8),))
    yield Sample("no columns", (draw(3, 0),))


OP = Op(
    "swiglu",
    swiglu,
    reference,
    samples,
    differentiable=("gate", "up"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
