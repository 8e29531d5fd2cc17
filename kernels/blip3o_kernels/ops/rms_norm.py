"""RMS normalisation over the last dimension.

    rstd = 1 / sqrt(mean(x^2) + eps)                      [...]      float32
    gain = weight_offset + weight                         [D]        float32
    y    = round(round(x * rstd) * gain)                  [..., D]   round_before_weight=True: Llama, Qwen
    y    = round(x * rstd * gain)                         [..., D]   round_before_weight=False: Gemma

x [..., D] float; weight [D] float or None (no gain); y has the shape and dtype of x. Everything between loading
and storing is float32 (float64 for float64 x); `round` rounds to x's dtype. The gradients are those of the exact
expression: rounding passes gradients through. The native and Triton bodies cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape or device. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import FLOATING, LARGEST, STRIDED
from ..dispatch import Op, choose, direct, transformed
from ..registered import LIBRARY, differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> Tensor:
    wide = x.to(checks.wide(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if round_before_weight:
        normed = normed.to(x.dtype).to(wide.dtype)
    gain = weight.to(wide.dtype)
    if weight_offset:
        gain = gain + weight_offset
    return (normed * gain).to(x.dtype)


_shortcut = shortcut("rms_norm")


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dimension; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, x, weight, eps, weight_offset, round_before_weight)
        if y is False:
            y = _apply(x, weight, eps, weight_offset, round_before_weight, "native")
        if y is not None:
            return y
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not STRIDED:
        checks.floating("x", x)
    dtype, shape = x.dtype, x.shape
    if not shape or not shape[-1]:
        checks.fail("x", "shape [..., D] with D > 0", list(shape))
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not STRIDED:
            checks.floating("weight", weight)
        if weight.dim() != 1 or weight.numel() != shape[-1]:
            checks.shape("weight", weight, shape[-1:])
        if not (weight.is_cpu and x.is_cpu):
            checks.same_device("weight", weight, "x", x)
    if type(eps) is not float or not 0.0 <= eps <= LARGEST:
        eps = checks.eps(eps)
    if type(weight_offset) is not float or not -LARGEST <= weight_offset <= LARGEST:
        weight_offset = checks.number("weight_offset", weight_offset)
    if round_before_weight is not True and round_before_weight is not False:
        checks.flag("round_before_weight", round_before_weight)
    # Compiled, the formula is left for Inductor to fuse with its neighbours; docs/decisions.md has the measurement.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)
    if weight is not None and weight.dtype is not dtype and weight.dtype is not torch.float32:
        weight = weight.to(torch.float32)
    if compiling or not direct(x, weight):
        y = _forward_op(x, weight, eps, weight_offset, round_before_weight, backend)
        return y
    if (x.requires_grad or (weight is not None and weight.requires_grad)) and torch.is_grad_enabled():
        y = _apply(x, weight, eps, weight_offset, round_before_weight, backend)
        return y
    y = body("rms_norm", backend).forward(x, weight, eps, weight_offset, round_before_weight)
    return y


# As torch knows it: torch.ops.blip3o.rms_norm.
def _setup(context: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    x, weight, *context.options = inputs
    context.save_for_backward(x, weight)


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = context.saved_tensors
    wanted = weight is not None and context.needs_input_grad[1]
    dx, dweight = backward(dy, x, weight, wanted, *context.options)
    return dx, dweight if wanted else None, None, None, None, None


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """dx, and dweight if it is wanted (otherwise an empty tensor). Rounding passes gradients through."""
    gradients: tuple[Tensor, Tensor] = body("rms_norm", arguments[-1]).backward(*arguments[:-2])
    return gradients


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, wanted: bool, *options: Any) -> tuple[Tensor, Tensor]:
    dweight = torch.empty_like(weight) if weight is not None and wanted else x.new_empty(0)
    return x.new_empty(x.shape), dweight


def _batched(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor | None, *options: Any) -> Any:
    """vmap: over x the batch is more rows; over the weight the formula is used, whose gain broadcasts."""
    x_dim, weight_dim = dims[:2]
    x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if weight is None or weight_dim is None:
        return _forward_op(x, weight, *options), 0
    gains = weight.movedim(weight_dim, 0).view(info.batch_size, *[1] * (x.dim() - 2), -1)
    eps, weight_offset, round_before_weight, _ = options
    return reference(x, gains, eps, weight_offset=weight_offset, round_before_weight=round_before_weight), 0


_options = "float eps, float weight_offset, bool round_before_weight, str backend"
_forward_op, _apply = differentiable(
    f"rms_norm(Tensor x, Tensor? weight, {_options}) -> Tensor",
    f"rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, bool wanted, {_options}) -> (Tensor, Tensor)",
    fake=lambda x, *_: x.new_empty(x.shape),
    fake_backward=_fake_backward,
    flops=lambda x, *_, **__: 4 * x.numel() if isinstance(x, Tensor) else 4 * torch.Size(x).numel(),
    backward_flops=lambda dy, *_, **__: 11 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
    backward=_backward,
)
torch.library.register_vmap("blip3o::rms_norm", _batched, lib=LIBRARY)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((3, 7), (2, 5, 64), (1, 1024), (33, 129), (4, 3, 1000), (257, 16), (2, 1152), (3, 1792), (2, 9001)):
        x, weight = draw(*shape), draw(shape[-1])
        yield Sample(f"{shape}", (x, weight))
    # One column normalises to about 1: without a large eps its gradient is what rounding leaves of a difference of
    # equals.
    yield Sample("(2, 1)", (draw(2, 1), draw(1), 0.5))
    yield Sample("no weight", (draw(5, 48),))
    for width in (48, 51, 9001):
        gemma: dict[str, object] = {"weight_offset": 1.0, "round_before_weight": False}
        yield Sample(f"gemma {width}", (draw(5, width), draw(width, scale=0.1)), gemma)
    yield Sample("offset", (draw(5, 48), draw(48, scale=0.1)), {"weight_offset": 1.0})
    yield Sample("float32 weight", (draw(5, 48), draw(48, dtype=torch.promote_types(dtype, torch.float32))))
    yield Sample("strided rows", (draw(6, 3, 40)[:, 1], draw(40)))
    yield Sample("transposed", (draw(2, 3, 5, 32).transpose(1, 2), draw(32)))
    yield Sample("strided last", (draw(6, 40)[:, ::2], draw(20)))
    yield Sample("large values", (draw(4, 96, scale=1e3), draw(96)))
    yield Sample("no rows", (draw(0, 8), draw(8)))
    for width in (4000, 8000, 16400):  # whole vectors, for each way in which a GPU's threads share a wide row
        yield Sample(f"wide {width}", (draw(2, width), draw(width)))


OP = Op(
    "rms_norm",
    rms_norm,
    reference,
    samples,
    differentiable=("x", "weight"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
