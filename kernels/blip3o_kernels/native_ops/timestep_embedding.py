"""Calls csrc/cpu/timestep_embedding.cpp and csrc/cuda/timestep_embedding.cu.

The contract is ops/timestep_embedding.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native
from ..dispatch import instruction_set
from ..memory import scratch

_PACK, _CPU = native.packer("timestep_embedding"), native.function("cpu", "timestep_embedding")
_CUDA = native.cuda_call("timestep_embedding")
_CPU_BACKWARD = native.cpu_call("timestep_embedding_backward")
_CUDA_BACKWARD = native.cuda_call("timestep_embedding_backward")
_PADDING = 15  # of the workspace, in elements


def forward(timestep: Tensor, dim: int, max_period: float) -> Tensor:
    timestep = timestep.contiguous()
    batch = timestep.numel()
    y = torch.empty(batch, dim, dtype=torch.float32, device=timestep.device)
    if not timestep.is_cpu:
        _CUDA(timestep, y.data_ptr(), 0, timestep.data_ptr(), batch, dim // 2, max_period)
        return y
    frequencies = scratch(dim + 2 * _PADDING)  # float64: each takes two
    # fmt: off
    status = _CPU(
        _PACK(
            y.data_ptr(), frequencies.data_ptr(), timestep.data_ptr(), batch, dim // 2, max_period,
            instruction_set(), get_num_threads(), 0,
        )
    )
    # fmt: on
    if status:
        raise native.failed("timestep_embedding", status)
    return y


def backward(dy: Tensor, timestep: Tensor, max_period: float) -> Tensor:
    dy, timestep = dy.contiguous(), timestep.contiguous()
    dtimestep = torch.empty_like(timestep)
    half = dy.shape[1] // 2
    addresses, sizes = (dy.data_ptr(), timestep.data_ptr()), (len(timestep), half, max_period)
    if timestep.is_cpu:
        frequencies = torch.empty(half + _PADDING, dtype=torch.float64)
        _CPU_BACKWARD(dtimestep.data_ptr(), frequencies.data_ptr(), *addresses, *sizes)
    else:
        _CUDA_BACKWARD(timestep, dtimestep.data_ptr(), 0, *addresses, *sizes)
    return dtimestep
