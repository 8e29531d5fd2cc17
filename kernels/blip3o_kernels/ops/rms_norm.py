"""RMS normalisation over the last dimension.

    rstd = 1 / sqrt(mean(x^2) + eps)                      [...]      float32
    gain = weight_offset + weight                         [D]        float32
    y    = round(round(x * rstd) * gain)                  [..., D]   round_before_weight=True: Llama, Qwen
    y    = round(x * rstd * gain)                         [..., D]   round_before_weight=False: Gemma

x [..., D] float; weight [D] float or None (no gain); y has the shape and dtype of x. Everything between loading and storing is
float32 (float64 for float64 x); `round` rounds to x's dtype. The gradients are those of the exact expression: rounding
passes gradients through. Errors: TypeError for a dtype, ValueError for a shape, device or eps.
Source: Zhang and Sennrich 2019, arXiv:1910.07467.
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


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dimension; see the module's docstring."""
    checks.floating("x", x)
    if weight is not None:
        checks.floating("weight", weight)
        checks.shape("weight", weight, x.shape[-1:])
        checks.same_device("weight", weight, "x", x)
    choose(OP, x)
    return reference(x, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (1, 1024), (33, 129), (4, 3, 1000), (257, 16)):
        x, weight = draw(*shape), draw(shape[-1])
        yield Sample(f"{shape}", (x, weight))
    yield Sample("no weight", (draw(5, 48),))
    yield Sample("gemma", (draw(5, 48), draw(48, scale=0.1)), {"weight_offset": 1.0, "round_before_weight": False})
    yield Sample("offset", (draw(5, 48), draw(48, scale=0.1)), {"weight_offset": 1.0})
    yield Sample("float32 weight", (draw(5, 48), draw(48, dtype=torch.promote_types(dtype, torch.float32))))
    yield Sample("strided rows", (draw(6, 3, 40)[:, 1], draw(40)))
    yield Sample("transposed", (draw(2, 3, 5, 32).transpose(1, 2), draw(32)))
    yield Sample("strided last", (draw(6, 40)[:, ::2], draw(20)))
    yield Sample("large values", (draw(4, 96, scale=1e3), draw(96)))
    yield Sample("no rows", (draw(0, 8), draw(8)))


OP = Op("rms_norm", rms_norm, reference, samples, differentiable=("x", "weight"))
