"""Calls csrc/cpu/flow_timesteps.cpp and csrc/cuda/flow_timesteps.cu; the contract is ops/flow_timesteps.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

_CPU, _CUDA = native.cpu_call("flow_timesteps"), native.cuda_call("flow_timesteps")


def forward(
    positions: Tensor, seed: int, logit_normal: bool, mean: float, std: float, shift: float, draw: int
) -> Tensor:
    positions = positions.contiguous()
    sigma = torch.empty_like(positions, dtype=torch.float32)
    addresses = (sigma.data_ptr(), positions.data_ptr())
    arguments = (*addresses, positions.numel(), seed, mean, std, shift, logit_normal, draw)
    _CPU(*arguments) if positions.is_cpu else _CUDA(positions, *arguments)
    return sigma
