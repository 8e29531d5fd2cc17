"""Layer normalisation over the last dimension.

    mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps)     [...]      float32
    y    = round((x - mean) * rstd * weight + bias)                [..., D]

x [..., D] float; weight and bias [D] float or None; y has the shape and dtype of x. Computed in float32 (float64 for float64 x),
rounded once. Errors: TypeError for a dtype, ValueError for a shape or device. Source: Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    wide = checks.wide(x.dtype)
    return F.layer_norm(
        x.to(wide),
        x.shape[-1:],
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
        eps,
    ).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; see the module's docstring."""
    checks.floating("x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.floating(name, parameter)
            checks.shape(name, parameter, x.shape[-1:])
            checks.same_device(name, parameter, "x", x)
    choose(OP, x)
    return reference(x, weight, bias, eps)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((3, 7), (2, 5, 64), (33, 129), (4, 3, 1000)):
        yield Sample(f"{shape}", (draw(*shape), draw(shape[-1]), draw(shape[-1])))
    yield Sample("no affine", (draw(5, 48),))
    yield Sample("no bias", (draw(5, 48), draw(48)))
    yield Sample("transposed", (draw(2, 3, 5, 32).transpose(1, 2), draw(32), draw(32)))


OP = Op("layer_norm", layer_norm, reference, samples, differentiable=("x", "weight", "bias"))
