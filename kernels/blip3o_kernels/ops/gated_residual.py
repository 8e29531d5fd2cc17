"""A residual branch behind a tanh gate, with the sandwich norm if a weight is given.

    branch = rms_norm(x, weight, eps) if weight is given else x     [B, T, D]  float32, not rounded
    y      = round(residual + tanh(gate) * branch)                  [B, T, D]

residual and x [B, T, D] float, same dtype; gate [B, D] float; weight [D] float or None. y has the dtype of residual. Computed in float32
(float64 for float64), rounded once. Errors: TypeError for a dtype, ValueError for a shape or device.
Source: Lumina-Next, Zhuo et al. 2024, arXiv:2406.18583.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(residual: Tensor, x: Tensor, gate: Tensor, *, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    dtype = checks.wide(x.dtype)
    branch = x.to(dtype)
    if weight is not None:
        branch = branch * torch.rsqrt(branch.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return torch.addcmul(residual.to(dtype), torch.tanh(gate.to(dtype)).unsqueeze(1), branch).to(x.dtype)


def gated_residual(
    residual: Tensor, x: Tensor, gate: Tensor, *, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """residual + tanh(gate)[:, None] * norm(x), the norm only if a weight is given; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() != 3:
        checks.fail("x", "shape [B, T, D]", list(x.shape))
    checks.like("residual", residual, "x", x)
    checks.floating("gate", gate)
    checks.shape("gate", gate, (x.shape[0], x.shape[2]))
    checks.same_device("gate", gate, "x", x)
    if weight is not None:
        checks.floating("weight", weight)
        checks.shape("weight", weight, (x.shape[2],))
        checks.same_device("weight", weight, "x", x)
    choose(OP, x)
    return reference(residual, x, gate, weight=weight, eps=eps)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1, 8), (2, 5, 64), (3, 7, 129)):
        batch, _, width = shape
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), draw(batch, width)))
        yield Sample(f"{shape} norm", (draw(*shape), draw(*shape), draw(batch, width)), {"weight": draw(width)})


OP = Op("gated_residual", gated_residual, reference, samples, differentiable=("residual", "x", "gate", "weight"))
