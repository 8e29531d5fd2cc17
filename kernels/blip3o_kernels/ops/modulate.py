"""Normalise, scale and shift by a condition: adaptive layer normalisation (AdaLN).

    n = rms_norm(x) or layer_norm(x), times weight, plus bias     [B, T, D]  float32, not rounded
    y = round(n * (1 + scale) + shift)                            [B, T, D]

x [B, T, D] float; scale and shift [B, D] float, shift may be None; weight and bias [D] or None (bias only with norm="layer");
norm in {"rms", "layer"}. y has the dtype of x. Computed in float32 (float64 for float64 x), rounded once.
Errors: TypeError for a dtype, ValueError for a shape, device or norm. Source: Peebles and Xie 2022, arXiv:2212.09748.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


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
    checks.floating("x", x)
    if x.dim() != 3:
        checks.fail("x", "shape [B, T, D]", list(x.shape))
    batch, _, width = x.shape
    for name, condition in (("scale", scale), ("shift", shift)):
        if condition is not None:
            checks.floating(name, condition)
            checks.shape(name, condition, (batch, width))
            checks.same_device(name, condition, "x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.floating(name, parameter)
            checks.shape(name, parameter, (width,))
            checks.same_device(name, parameter, "x", x)
    if norm not in ("rms", "layer"):
        checks.fail("norm", '"rms" or "layer"', repr(norm))
    if norm == "rms" and bias is not None:
        checks.fail("bias", 'None with norm="rms"', "a tensor")
    choose(OP, x)
    return reference(x, scale, shift, weight=weight, bias=bias, eps=eps, norm=norm)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for norm in ("rms", "layer"):
        for shape in ((1, 1, 8), (2, 5, 64), (3, 7, 129)):
            batch, _, width = shape
            yield Sample(f"{norm} {shape}", (draw(*shape), draw(batch, width), draw(batch, width)), {"norm": norm})
        yield Sample(f"{norm} weight", (draw(2, 3, 48), draw(2, 48)), {"norm": norm, "weight": draw(48)})
    affine: dict[str, object] = {"norm": "layer", "weight": draw(48), "bias": draw(48)}
    yield Sample("layer affine", (draw(2, 3, 48), draw(2, 48), draw(2, 48)), affine)
    yield Sample("chunked", (draw(2, 3, 48), *draw(2, 96).chunk(2, dim=-1)))


OP = Op("modulate", modulate, reference, samples, differentiable=("x", "scale", "shift", "weight", "bias"))
