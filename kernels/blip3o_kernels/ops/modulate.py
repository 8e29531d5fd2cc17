"""Normalise, scale and shift by a condition: adaptive layer normalisation (AdaLN).

    n = rms_norm(x) or layer_norm(x), times weight, plus bias     [B, T, D]  float32, not rounded
    y = round(n * (1 + scale) + shift)                            [B, T, D]

x [B, T, D] float; scale and shift [B, D] float, shift may be None; weight and bias [D] or None (bias only with
norm="layer"); norm in {"rms", "layer"}. y has the dtype of x. Computed in float32 (float64 for float64 x), rounded
once. The native and Triton bodies cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape, device or norm. Source: Peebles and Xie 2022, arXiv:2212.09748.
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
from ..checks import LARGEST
from ..dispatch import Op, choose, direct, plain, transformed, wanted
from ..registered import differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut


def reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
) -> Tensor:
    dtype = checks.wide(x.dtype)
    wide = x.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    if norm == "rms":
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = normed if weight is None else normed * weight
    else:
        normed = F.layer_norm(wide, x.shape[-1:], weight, None if bias is None else bias.to(dtype), eps)
    gain = (1 + scale.to(dtype)).unsqueeze(1)
    if shift is None:
        return (normed * gain).to(x.dtype)
    return torch.addcmul(shift.to(dtype).unsqueeze(1), normed, gain).to(x.dtype)


_shortcut = shortcut("modulate")


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
) -> Tensor:
    """norm(x) * (1 + scale) + shift, scale and shift per sample; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, x, scale, shift, weight, bias, eps, norm)
        if y is False:
            y = _apply(x, scale, shift, weight, bias, eps, norm == "layer", "native")
        if y is not None:
            return y
    checks.floating("x", x)
    dtype, shape = x.dtype, x.shape
    if len(shape) != 3 or not shape[2]:
        checks.fail("x", "shape [B, T, D] with D > 0", list(shape))
    batch, _, width = shape
    checks.parameter("scale", scale, (batch, width), "x", x)
    if shift is not None:
        checks.parameter("shift", shift, (batch, width), "x", x)
    if weight is not None:
        checks.parameter("weight", weight, (width,), "x", x)
    if bias is not None:
        checks.parameter("bias", bias, (width,), "x", x)
    if norm not in ("rms", "layer"):
        checks.fail("norm", '"rms" or "layer"', repr(norm))
    if norm == "rms" and bias is not None:
        checks.fail("bias", 'None with norm="rms"', "a tensor")
    if type(eps) is not float or not 0.0 <= eps <= LARGEST:
        eps = checks.eps(eps)
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, scale, shift, weight=weight, bias=bias, eps=eps, norm=norm)
    # One dtype for all four.
    if (
        scale.dtype is not dtype
        or (shift is not None and shift.dtype is not dtype)
        or (weight is not None and weight.dtype is not dtype)
        or (bias is not None and bias.dtype is not dtype)
    ):
        scale = scale.to(torch.float32)
        shift, weight, bias = (None if p is None else p.to(torch.float32) for p in (shift, weight, bias))
    if compiling or not (direct(x, scale, weight) and plain(shift, bias)):
        y = _forward_op(x, scale, shift, weight, bias, eps, norm == "layer", backend)[0]
        return y
    if torch.is_grad_enabled() and wanted(x, scale, shift, weight, bias):
        y = _apply(x, scale, shift, weight, bias, eps, norm == "layer", backend)
        return y
    y, _ = body("modulate", backend).forward(x, scale, shift, weight, bias, eps, norm == "layer", False)
    return y


# As torch knows it: torch.ops.blip3o.modulate, which returns what the backward pass needs too: 1/std of each row and,
# if centred, its mean. Its backward op gives the gradients of x, scale, shift, weight and bias; empty tensors for those
# that were not given.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, weight, bias, _, centred, backend = inputs
    context.save_for_backward(x, scale, weight, bias, results[1])
    context.options = (shift is not None, centred, backend)


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, scale, shift, weight and bias that autograd asks for; the options have none."""
    needs = context.needs_input_grad
    gradients = backward(dy, *context.saved_tensors, *context.options)
    return *(gradient if needs[i] else None for i, gradient in enumerate(gradients)), None, None, None


def _fake(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    centred: bool = inputs[-2]
    saved = x.new_empty((1 + centred) * x.shape[0] * x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), saved


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    shifted: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    def empty(given: bool, *shape: int) -> Tensor:
        return scale.new_empty(shape if given else 0)

    batch, _, width = x.shape
    dscale, dshift = empty(True, batch, width), empty(shifted, batch, width)
    return x.new_empty(x.shape), dscale, dshift, empty(weight is not None, width), empty(bias is not None, width)


_forward_op, _apply = differentiable(
    "modulate(Tensor x, Tensor scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, bool centred,"
    " str backend) -> (Tensor, Tensor)",
    "modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor? weight, Tensor? bias, Tensor saved, bool shifted,"
    " bool centred, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    flops=lambda x, *_, **__: 8 * torch.Size(x).numel(),
    backward_flops=lambda dy, *_, **__: 16 * torch.Size(dy).numel(),
    setup=_setup,
    gradients=_gradients,
    hidden=True,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for norm in ("rms", "layer"):
        for shape in ((1, 1, 8), (2, 5, 64), (3, 7, 129), (20, 2, 33)):
            batch, _, width = shape
            yield Sample(f"{norm} {shape}", (draw(*shape), draw(batch, width), draw(batch, width)), {"norm": norm})
        yield Sample(f"{norm} weight", (draw(2, 3, 48), draw(2, 48)), {"norm": norm, "weight": draw(48)})
        yield Sample(f"{norm} many samples", (draw(18, 5, 200), draw(18, 200)), {"norm": norm, "weight": draw(200)})
        yield Sample(f"{norm} wide", (draw(2, 3, 1152), draw(2, 1152), draw(2, 1152)), {"norm": norm})
        yield Sample(f"{norm} wider", (draw(1, 2, 1792), draw(1, 1792)), {"norm": norm, "weight": draw(1792)})
        yield Sample(f"{norm} one token", (draw(12, 1, 64), draw(12, 64)), {"norm": norm, "eps": 0.1})
    widest: dict[str, object] = {"norm": "layer", "weight": draw(9001), "bias": draw(9001)}
    yield Sample("widest", (draw(2, 2, 9001), draw(2, 9001), draw(2, 9001)), widest)
    yield Sample("far from 0", (draw(2, 3, 48) + 30, draw(2, 48), draw(2, 48)), {"norm": "layer"})
    yield Sample("many tokens", (draw(2, 70, 200), draw(2, 200), draw(2, 200)), {"norm": "layer", "bias": draw(200)})
    affine: dict[str, object] = {"norm": "layer", "weight": draw(48), "bias": draw(48)}
    yield Sample("layer affine", (draw(2, 3, 48), draw(2, 48), draw(2, 48)), affine)
    yield Sample("chunked", (draw(2, 3, 48), *draw(2, 96).chunk(2, dim=-1)))
    yield Sample("strided rows", (draw(2, 6, 96).chunk(2, dim=-1)[1], draw(2, 48), draw(2, 48)), {"norm": "layer"})
    yield Sample("strided last", (draw(2, 3, 96)[..., ::2], draw(2, 96)[:, ::2]), {"weight": draw(96)[::2]})
    yield Sample("transposed", (draw(5, 2, 32).transpose(0, 1), draw(32, 2).t()))
    wide = torch.promote_types(dtype, torch.float32)
    yield Sample("float32 condition", (draw(2, 3, 48), draw(2, 48, dtype=wide)), {"weight": draw(48)})
    yield Sample("no tokens", (draw(2, 0, 8), draw(2, 8), draw(2, 8)))
    yield Sample("no samples", (draw(0, 3, 8), draw(0, 8)), {"weight": draw(8)})


OP = Op(
    "modulate",
    modulate,
    reference,
    samples,
    differentiable=("x", "scale", "shift", "weight", "bias"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
