"""Sinusoids of the diffusion time.

    angle[b, i] = timestep[b] * exp(-ln(max_period) * i / (dim/2))      i < dim/2
    y[b] = [cos(angle[b]), sin(angle[b])]                               [B, dim]       float32

timestep [B] float or integer, in float32 (float64 for float64, which gives a float64 y). The native and Triton bodies
compute angles in float64: at 1000 rad those of float32 are wrong by up to 1e-4. They are good up to 1e8 rad, and cannot
be differentiated twice. Errors: TypeError for a dtype, ValueError for a shape, an odd dim or a max_period not above 0.
Source: GLIDE's embedding as used by DiT, Peebles and Xie 2022, arXiv:2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import LARGEST, TINY
from ..dispatch import Op, choose, direct, transformed
from ..registered import differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut

_DTYPES = checks.FLOATING | checks.INTEGERS


def reference(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    dtype = checks.wide(timestep.dtype)
    index = torch.arange(dim // 2, dtype=dtype, device=timestep.device)
    angle = timestep.to(dtype).unsqueeze(-1) * torch.exp(index * (-math.log(max_period) / (dim // 2)))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


_shortcut = shortcut("timestep_embedding")


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos | sin] of the timestep at dim/2 frequencies, float32 [B, dim]; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, timestep, dim, max_period)
        if y is not None:
            return y
    if not isinstance(timestep, Tensor) or timestep.dtype not in _DTYPES or timestep.layout is not torch.strided:
        checks.mistyped("timestep", "a floating-point, int64 or int32 tensor", timestep)
    if timestep.dim() != 1:
        checks.fail("timestep", "shape [B]", list(timestep.shape))
    if type(dim) is not int:
        checks.whole("dim", dim)
    if dim < 2 or dim % 2:
        checks.fail("dim", "an even number of at least 2", dim)
    if type(max_period) is not float or not TINY <= max_period <= LARGEST:
        max_period = checks.number("max_period", max_period, TINY, "a positive, finite number")
    if timestep.dtype is not torch.float64 and timestep.dtype is not torch.float32:
        timestep = timestep.to(torch.float32)  # integers have no body of their own, short floats need none
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, timestep)
    if backend == "reference":
        return reference(timestep, dim, max_period)
    if compiling or not direct(timestep):
        y = _forward_op(timestep, dim, max_period, backend)
        return y
    if timestep.requires_grad and torch.is_grad_enabled():
        y = _apply(timestep, dim, max_period, backend)
        return y
    y = body("timestep_embedding", backend).forward(timestep, dim, max_period)
    return y


# As torch knows it: torch.ops.blip3o.timestep_embedding.
def _setup(context: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    timestep, _, *context.options = inputs
    context.save_for_backward(timestep)


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return backward(dy, *context.saved_tensors, *context.options), None, None, None


_forward_op, _apply = differentiable(
    "timestep_embedding(Tensor timestep, int dim, float max_period, str backend) -> Tensor",
    "timestep_embedding_backward(Tensor dy, Tensor timestep, float max_period, str backend) -> Tensor",
    fake=lambda timestep, dim, *_: timestep.new_empty(timestep.shape[0], dim),
    fake_backward=lambda dy, timestep, *_: timestep.new_empty(timestep.shape),
    flops=lambda timestep, dim, *_, **__: torch.Size(timestep).numel() * dim,
    backward_flops=lambda dy, *_, **__: 3 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for batch, dim in ((1, 2), (3, 64), (5, 64), (9, 130), (2, 1152)):
        yield Sample(f"B{batch} dim{dim}", (draw.uniform(batch), dim))
    yield Sample("max_period", (draw.uniform(4), 32), {"max_period": 100.0})
    yield Sample("max_period below 1", (draw.uniform(4), 32), {"max_period": 0.3})
    yield Sample("thousandths", (draw.uniform(7) * 1000, 256))
    yield Sample("extreme", (draw.uniform(5) * 6e4, 62))
    yield Sample("backwards", (draw(7, scale=30.0)[::2], 34))
    yield Sample("none", (draw(0), 8))


OP = Op(
    "timestep_embedding",
    timestep_embedding,
    reference,
    samples,
    differentiable=("timestep",),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
