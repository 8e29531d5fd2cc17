"""Calls csrc/cpu/timestep_embedding.cpp; the contract is ops/timestep_embedding.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

_FORWARD, _BACKWARD = native.cpu_call("timestep_embedding"), native.cpu_call("timestep_embedding_backward")
_PADDING = 15  # of the workspace, in elements


def forward(timestep: Tensor, dim: int, max_period: float) -> Tensor:
    timestep = timestep.contiguous()
    y = timestep.new_empty(len(timestep), dim)
    frequencies = torch.empty(dim // 2 + _PADDING, dtype=torch.float64)
    _FORWARD(y.data_ptr(), frequencies.data_ptr(), timestep.data_ptr(), len(timestep), dim // 2, max_period)
    return y


def backward(dy: Tensor, timestep: Tensor, max_period: float) -> Tensor:
    dy, timestep = dy.contiguous(), timestep.contiguous()
    dtimestep = torch.empty_like(timestep)
    half = dy.shape[1] // 2
    frequencies = torch.empty(half + _PADDING, dtype=torch.float64)
    _BACKWARD(
        dtimestep.data_ptr(),
        frequencies.data_ptr(),
        dy.data_ptr(),
        timestep.data_ptr(),
        len(timestep),
        half,
        max_period,
    )
    return dtimestep
