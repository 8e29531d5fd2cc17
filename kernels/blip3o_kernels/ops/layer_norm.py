"""Layer normalisation over the last dimension.

    mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps)     [...]      float32
    y    = round((x - mean) * rstd * weight + bias)                [..., D]

x [..., D] float; weight and bias [D] float or None; y has the shape and dtype of x. Computed in float32 (float64 for
float64 x), rounded once. The native and Triton bodies cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape or device. Source: Ba et al. 2016, arXiv:1607.06450.
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
from ..checks import FLOATING, LARGEST, STRIDED
from ..dispatch import Op, choose, direct, transformed, wanted
from ..registered import differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    wide = checks.wide(x.dtype)
    return F.layer_norm(
        x.to(wide),
        x.shape[-1:],
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
        eps,
    ).to(x.dtype)


_shortcut, _backward_shortcut = shortcut("layer_norm"), shortcut("layer_norm_backward")


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, x, weight, bias, eps)
        if y is False:
            y = _apply(x, weight, bias, eps, "native")
        if y is not None:
            return y
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not STRIDED:
        checks.floating("x", x)
    dtype, shape = x.dtype, x.shape
    if not shape or not shape[-1]:
        checks.fail("x", "shape [..., D] with D > 0", list(shape))
    if weight is not None and (
        not isinstance(weight, Tensor)
        or weight.dtype not in FLOATING
        or weight.layout is not STRIDED
        or weight.dim() != 1
        or weight.numel() != shape[-1]
        or not (weight.is_cpu and x.is_cpu)
    ):
        checks.parameter("weight", weight, (shape[-1],), "x", x)
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.dtype not in FLOATING
        or bias.layout is not STRIDED
        or bias.dim() != 1
        or bias.numel() != shape[-1]
        or not (bias.is_cpu and x.is_cpu)
    ):
        checks.parameter("bias", bias, (shape[-1],), "x", x)
    if type(eps) is not float or not 0.0 <= eps <= LARGEST:
        eps = checks.eps(eps)
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, weight, bias, eps)
    # One dtype for both.
    if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
        weight, bias = (None if p is None else p.to(torch.float32) for p in (weight, bias))
    if compiling or not direct(x, weight, bias):
        y = _forward_op(x, weight, bias, eps, backend)[0]
        return y
    if torch.is_grad_enabled() and wanted(x, weight, bias):
        y = _apply(x, weight, bias, eps, backend)
        return y
    y, _ = body("layer_norm", backend).forward(x, weight, bias, eps, False)
    return y


# As torch knows it: torch.ops.blip3o.layer_norm, which returns what the backward pass needs too: 1/std of each row,
# then the mean of each row. Its backward op gives empty tensors for parameters that were not given.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, context.backend = inputs
    context.save_for_backward(x, weight, bias, results[1])


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias that autograd asks for."""
    needs = context.needs_input_grad
    gradients = backward(dy, *context.saved_tensors, context.backend)
    return *(gradient if needs[i] else None for i, gradient in enumerate(gradients)), None, None


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2 * (x.numel() // x.shape[-1]), dtype=torch.float32)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), dweight, dbias


_forward_op, _apply = differentiable(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor)",
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor saved, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    flops=lambda x, *_, **__: 7 * torch.Size(x).numel(),
    backward_flops=lambda dy, *_, **__: 14 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
    hidden=True,
    shortcuts=(_shortcut, _backward_shortcut),
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((3, 7), (2, 5, 64), (33, 129), (4, 3, 1000), (257, 16), (1030, 40), (5, 1152), (1, 1792), (2, 9001)):
        yield Sample(f"{shape}", (draw(*shape), draw(shape[-1]), draw(shape[-1])))
    yield Sample("no affine", (draw(5, 48),))
    yield Sample("no bias", (draw(5, 48), draw(48)))
    yield Sample("no weight", (draw(5, 48), None, draw(48)))
    yield Sample("far from 0", (draw(5, 48) + 30, draw(48), draw(48)))
    # One column normalises to 0; what is left of a difference of equals is its gradient.
    yield Sample("one column", (draw(5, 1), draw(1), draw(1), 0.5))
    yield Sample("eps", (draw(5, 48, scale=0.1), draw(48), draw(48), 0.1))
    yield Sample("bias, wide", (draw(9, 1152), None, draw(1152)))
    yield Sample("strided last", (draw(6, 40)[:, ::2], draw(40)[::2], draw(40)[::2]))
    yield Sample("transposed", (draw(2, 3, 5, 32).transpose(1, 2), draw(32), draw(32)))
    yield Sample("split", (draw(2, 6, 96).split([40, 48, 8], dim=-1)[1], draw(48), draw(48)))
    wide = torch.promote_types(dtype, torch.float32)
    yield Sample("float32 weight", (draw(5, 48), draw(48, dtype=wide), draw(48, dtype=wide)))
    yield Sample("no rows", (draw(0, 8), draw(8), draw(8)))
    for width in (4000, 8000, 16400):  # whole vectors, for each way in which a GPU's threads share a wide row
        yield Sample(f"wide {width}", (draw(2, width), draw(width), draw(width)))


OP = Op(
    "layer_norm",
    layer_norm,
    reference,
    samples,
    differentiable=("x", "weight", "bias"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
