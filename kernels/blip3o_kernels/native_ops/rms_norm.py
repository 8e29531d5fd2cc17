"""Calls csrc/cpu/rms_norm.cpp and csrc/cuda/rms_norm.cu; the contract is ops/rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native, strides
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like, scratch
from ..native import DTYPES

_PACK, _PACK_BACKWARD = native.packer("rms_norm"), native.packer("rms_norm_backward")
_CPU_FORWARD, _CPU_BACKWARD = native.function("cpu", "rms_norm"), native.function("cpu", "rms_norm_backward")
_CUDA_FORWARD, _CUDA_BACKWARD = native.function("cuda", "rms_norm"), native.function("cuda", "rms_norm_backward")


def forward(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool) -> Tensor:
    # Written out where that is cheaper than a call: for one token the calls are the cost.
    if x.is_contiguous():
        width = stride = x.shape[-1]
    else:
        x, stride = strides.rows(x)
        width = x.shape[-1]
    y = torch.empty_like(x) if x.nbytes < LARGE else empty_like(x)
    dtype = DTYPES[x.dtype]
    if weight is None:
        gain, weight_dtype = 0, dtype
    else:
        if not weight.is_contiguous():
            weight = weight.contiguous()
        gain, weight_dtype = weight.data_ptr(), DTYPES[weight.dtype]
    address, place, rows = y.data_ptr(), x.data_ptr(), x.numel() // width
    options = (width, stride, eps, weight_offset, dtype, weight_dtype, round_before_weight)
    if x.is_cpu:
        status = _CPU_FORWARD(_PACK(address, place, gain, rows, *options, instruction_set(), get_num_threads(), 0))
    else:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            status = _CUDA_FORWARD(_PACK(address, place, gain, rows, *options, 0, 0, stream))
    if status:
        raise native.failed("rms_norm", status)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    wanted: bool,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """dx, and dweight if it is wanted (otherwise an empty tensor)."""
    x, stride = strides.rows(x)
    dy = dy.contiguous()
    dx = empty_like(dy)
    width = x.shape[-1]
    rows = x.numel() // width
    # Sums over rows are cut by shape alone, so that neither threads nor the GPU's size change a bit.
    blocks = max(1, min(64, rows // 32)) if x.is_cpu else strides.runs(x, 1, rows)
    if weight is not None and wanted:
        weight = weight.contiguous()
        dweight = torch.empty_like(weight)
        floats = blocks * width
        partial = scratch(floats) if x.is_cpu else torch.empty(floats, dtype=torch.float32, device=x.device)
        sums = (dweight.data_ptr(), partial.data_ptr())
    else:
        dweight = x.new_empty(0)
        sums = (0, 0)
    dtype = DTYPES[x.dtype]
    arguments = (
        dx.data_ptr(),
        *sums,
        dy.data_ptr(),
        x.data_ptr(),
        strides.address(weight),
        rows,
        width,
        stride,
        blocks,
        eps,
        weight_offset,
        dtype,
        dtype if weight is None else DTYPES[weight.dtype],
    )
    if x.is_cpu:
        status = _CPU_BACKWARD(_PACK_BACKWARD(*arguments, instruction_set(), get_num_threads(), 0))
    else:
        with torch.cuda.device(x.device):
            status = _CUDA_BACKWARD(_PACK_BACKWARD(*arguments, 0, 0, torch.cuda.current_stream().cuda_stream))
    if status:
        raise native.failed("rms_norm", status)
    return dx, dweight
