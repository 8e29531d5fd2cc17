"""Sinusoids of the diffusion time.

    angle[b, i] = timestep[b] * exp(-ln(max_period) * i / (dim/2))      i < dim/2      float32
    y[b] = [cos(angle[b]), sin(angle[b])]                               [B, dim]       float32

timestep [B] float or integer; y is float32 (float64 for float64 timesteps). Errors: TypeError for a dtype, ValueError
for a shape or an odd dim. Source: GLIDE's embedding as used by DiT, Peebles and Xie 2022, arXiv:2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    dtype = checks.wide(timestep.dtype)
    index = torch.arange(dim // 2, dtype=dtype, device=timestep.device)
    angle = timestep.to(dtype).unsqueeze(-1) * torch.exp(index * (-math.log(max_period) / (dim // 2)))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos | sin] of the timestep at dim/2 frequencies, float32 [B, dim]; see the module's docstring."""
    if timestep.dtype not in checks.FLOATING:
        checks.integer("timestep", timestep)
    if timestep.dim() != 1:
        checks.fail("timestep", "shape [B]", list(timestep.shape))
    if dim < 2 or dim % 2:
        checks.fail("dim", "an even number of at least 2", dim)
    choose(OP, timestep)
    return reference(timestep, dim, max_period)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for batch, dim in ((1, 2), (3, 64), (33, 130)):
        yield Sample(f"B{batch} dim{dim}", (draw.uniform(batch), dim))
    yield Sample("max_period", (draw.uniform(4), 32), {"max_period": 100.0})


OP = Op("timestep_embedding", timestep_embedding, reference, samples, differentiable=("timestep",))
