"""The straight path of flow matching, and its velocity.

    x_sigma  = round((1 - sigma) * x + sigma * noise)      [B, ...]      sigma = 0 is data, sigma = 1 is noise
    velocity = round(noise - x)                            [B, ...]      d x_sigma / d sigma

x and noise [B, ...] float, same dtype; sigma [B] float. Both results have the shape and dtype of x. Computed in
float32 (float64 for float64 x), each rounded once. Errors: TypeError for a dtype, ValueError for a shape or device.
Source: Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    dtype = checks.wide(x.dtype)
    data, drawn = x.to(dtype), noise.to(dtype)
    time = sigma.to(dtype).view(-1, *[1] * (x.dim() - 1))
    return ((1 - time) * data + time * drawn).to(x.dtype), (drawn - data).to(x.dtype)


def flow_interpolate(x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - sigma) x + sigma noise, and noise - x; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() == 0:
        checks.fail("x", "shape [B, ...]", list(x.shape))
    checks.like("noise", noise, "x", x)
    checks.floating("sigma", sigma)
    checks.shape("sigma", sigma, x.shape[:1])
    checks.same_device("sigma", sigma, "x", x)
    choose(OP, x)
    return reference(x, noise, sigma)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), draw.uniform(shape[0])))
    ends = torch.tensor([0.0, 1.0], device=device)
    yield Sample("ends", (draw(2, 33), draw(2, 33), ends))


OP = Op("flow_interpolate", flow_interpolate, reference, samples, differentiable=("x", "noise", "sigma"))
