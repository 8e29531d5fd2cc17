"""Calls csrc/cpu/flow_timesteps.cpp; the contract is ops/flow_timesteps.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import instruction_set

_PACK = native.packer("flow_timesteps")
_CPU = native.function("cpu", "flow_timesteps")


def forward(
    positions: Tensor, seed: int, logit_normal: bool, mean: float, std: float, shift: float, draw: int
) -> Tensor:
    positions = positions.contiguous()
    sigma = positions.new_empty(positions.shape, dtype=torch.float32)
    status = _CPU(
        _PACK(
            sigma.data_ptr(),
            positions.data_ptr(),
            len(positions),
            seed,
            mean,
            std,
            shift,
            logit_normal,
            draw,
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_timesteps", status)
    return sigma
