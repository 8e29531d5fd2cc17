"""The residual stream takes what a part of the network adds, and is RMS-normalised for the next part.

    added = round(residual + x)                                     [..., D]
    y     = rms_norm(added, weight, eps, weight_offset=, round_before_weight=)     as in ops/rms_norm.py

x and residual [..., D] float, of one shape and dtype; weight [D] float or None (no gain). Returns y and added, of x's
shape and dtype. Computed in float32 (float64 for float64 x); y is that of the rounded sum, so that the two ops one
after the other give the same. The gradient of x and of residual is one: dadded + d rms_norm(added).
The native and Triton bodies cannot be differentiated twice.
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
from . import rms_norm


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    wide = checks.wide(x.dtype)
    added = (residual.to(wide) + x.to(wide)).to(x.dtype)
    y = rms_norm.reference(added, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)
    return y, added


_shortcut = shortcut("add_rms_norm")


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """rms_norm(residual + x, weight, eps), and the sum itself; see the module's docstring."""
    result: tuple[Tensor, Tensor]
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        result = _shortcut(dispatch.shortcut, x, residual, weight, eps, weight_offset, round_before_weight)
        if result is False:
            result = _apply(x, residual, weight, eps, weight_offset, round_before_weight, "native")
        if result is not None:
            return result
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not STRIDED:
        checks.floating("x", x)
    dtype, shape = x.dtype, x.shape
    if not shape or not shape[-1]:
        checks.fail("x", "shape [..., D] with D > 0", list(shape))
    on_cpu = x.is_cpu
    if not isinstance(residual, Tensor) or residual.dtype is not dtype or residual.layout is not STRIDED:
        checks.same_dtype("residual", residual, "x", x)
    if residual.shape != shape or not (on_cpu and residual.is_cpu):
        checks.like("residual", residual, "x", x)
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not STRIDED:
            checks.floating("weight", weight)
        if weight.dim() != 1 or weight.numel() != shape[-1]:
            checks.shape("weight", weight, shape[-1:])
        if not (on_cpu and weight.is_cpu):
            checks.same_device("weight", weight, "x", x)
    if type(eps) is not float or not 0.0 <= eps <= LARGEST:
        eps = checks.eps(eps)
    if type(weight_offset) is not float or not -LARGEST <= weight_offset <= LARGEST:
        weight_offset = checks.number("weight_offset", weight_offset)
    if round_before_weight is not True and round_before_weight is not False:
        checks.flag("round_before_weight", round_before_weight)
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, residual, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)
    if weight is not None and weight.dtype is not dtype and weight.dtype is not torch.float32:
        weight = weight.to(torch.float32)
    if compiling or not direct(x, residual, weight):
        result = _forward_op(x, residual, weight, eps, weight_offset, round_before_weight, backend)
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)
    ):
        result = _apply(x, residual, weight, eps, weight_offset, round_before_weight, backend)
        return result
    result = body("add_rms_norm", backend).forward(x, residual, weight, eps, weight_offset, round_before_weight)
    return result


# As torch knows it: torch.ops.blip3o.add_rms_norm.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    _, _, weight, *context.options = inputs
    context.save_for_backward(results[1], weight)
    context.set_materialize_grads(False)


def _gradients(context: Any, backward: Any, dy: Tensor | None, dadded: Tensor | None) -> tuple[Tensor | None, ...]:
    """Either gradient may be absent: what it belongs to was not used."""
    added, weight = context.saved_tensors
    wanted = weight is not None and context.needs_input_grad[2]
    if dy is None:
        return dadded, dadded, torch.zeros_like(weight) if wanted and dadded is not None else None, *[None] * 4
    total, dweight = backward(dy, dadded, added, weight, wanted, *context.options)
    return total, total, dweight if wanted else None, *[None] * 4


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The gradient of x and residual, and dweight if it is wanted (otherwise an empty tensor)."""
    gradients: tuple[Tensor, Tensor]
    gradients = body("add_rms_norm", arguments[-1]).backward(*arguments[:-2])  # rounding passes gradients through
    return gradients


def _fake_backward(
    dy: Tensor, dadded: Tensor | None, added: Tensor, weight: Tensor | None, wanted: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if weight is not None and wanted else added.new_empty(0)
    return added.new_empty(added.shape), dweight


def _batched(
    info: Any, dims: tuple[int | None, ...], x: Tensor, residual: Tensor, weight: Tensor | None, *options: Any
) -> Any:
    """vmap: over x and residual the batch is more rows; over the weight the formula is used, whose gain broadcasts."""
    count = info.batch_size
    x, residual = (
        t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((x, residual), dims[:2], strict=True)
    )
    if weight is None or dims[2] is None:
        return _forward_op(x, residual, weight, *options), (0, 0)
    gains = weight.movedim(dims[2], 0).view(count, *[1] * (x.dim() - 2), -1)
    eps, weight_offset, round_before_weight, _ = options
    result = reference(x, residual, gains, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)
    return result, (0, 0)


_options = "float eps, float weight_offset, bool round_before_weight, str backend"
_forward_op, _apply = differentiable(
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight, {_options}) -> (Tensor, Tensor)",
    f"add_rms_norm_backward(Tensor dy, Tensor? dadded, Tensor added, Tensor? weight, bool wanted, {_options})"
    " -> (Tensor, Tensor)",
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    fake_backward=_fake_backward,
    flops=lambda x, *_, **__: 5 * torch.Size(x).numel(),
    backward_flops=lambda dy, *_, **__: 12 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
    backward=_backward,
)
torch.library.register_vmap("blip3o::add_rms_norm", _batched, lib=LIBRARY)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((3, 7), (2, 5, 64), (1, 1024), (3, 1152), (3, 1792), (66, 129), (7, 9001)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), draw(shape[-1])))
    # One column normalises to about 1: without a large eps its gradient is what rounding leaves of a difference of
    # equals.
    yield Sample("(2, 1)", (draw(2, 1), draw(2, 1), draw(1), 0.5))
    yield Sample("no weight", (draw(5, 48), draw(5, 48)))
    gemma: dict[str, object] = {"weight_offset": 1.0, "round_before_weight": False}
    for width in (48, 51, 9001):
        yield Sample(f"gemma {width}", (draw(6, width), draw(6, width), draw(width, scale=0.1)), gemma)
    yield Sample("offset", (draw(5, 48), draw(5, 48), draw(48, scale=0.1)), {"weight_offset": 1.0})
    weight = draw(48, dtype=torch.promote_types(dtype, torch.float32))
    yield Sample("float32 weight", (draw(5, 48), draw(5, 48), weight))
    yield Sample("strided rows", (draw(6, 3, 40)[:, 1], draw(6, 2, 40)[:, 0], draw(40)))
    yield Sample("transposed", (draw(2, 3, 5, 32).transpose(1, 2), draw(2, 5, 3, 32), draw(32)))
    yield Sample("strided last", (draw(24, 40)[:, ::2], draw(24, 60)[:, ::3], draw(20)))
    yield Sample("large values", (draw(4, 96, scale=1e3), draw(4, 96, scale=1e3), draw(96)))
    yield Sample("no rows", (draw(0, 8), draw(0, 8), draw(8)))


OP = Op(
    "add_rms_norm",
    add_rms_norm,
    reference,
    samples,
    differentiable=("x", "residual", "weight"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
