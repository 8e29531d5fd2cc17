"""The gated activation of Llama's and Lumina's feed-forward networks.

    y = round(gate * sigmoid(gate) * up)        [...]

gate and up [...] float, same shape and dtype; y likewise. Computed in float32 (float64 for float64), rounded once.
Errors: TypeError for a dtype, ValueError for a shape or device. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(gate: Tensor, up: Tensor) -> Tensor:
    dtype = checks.wide(gate.dtype)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once; see the module's docstring."""
    checks.floating("gate", gate)
    checks.like("up", up, "gate", gate)
    choose(OP, gate)
    return reference(gate, up)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1,), (3, 7), (2, 5, 64), (33, 129)):
        yield Sample(f"{shape}", (draw(*shape, scale=3.0), draw(*shape)))
    yield Sample("chunked", tuple(draw(5, 96).chunk(2, dim=-1)))
    yield Sample("extreme", (draw(4, 32, scale=60.0), draw(4, 32)))


OP = Op("swiglu", swiglu, reference, samples, differentiable=("gate", "up"))
