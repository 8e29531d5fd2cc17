"""Calls csrc/cpu/flow_timesteps.cpp; the contract is ops/flow_timesteps.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

_CPU = native.cpu_call("flow_timesteps")


def forward(
    positions: Tensor, seed: int, logit_normal: bool, mean: float, std: float, shift: float, draw: int
) -> Tensor:
    positions = positions.contiguous()
    sigma = torch.empty_like(positions, dtype=torch.float32)
    _CPU(sigma.data_ptr(), positions.data_ptr(), positions.numel(), seed, mean, std, shift, logit_normal, draw)
    return sigma
