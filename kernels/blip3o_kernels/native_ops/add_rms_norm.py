"""Calls csrc/cpu/add_rms_norm.cpp and csrc/cuda/add_rms_norm.cu; the contract is ops/add_rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native, strides
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like, scratch
from ..native import DTYPES
from ..strides import address, contiguous, rows

_PACK, _CPU = native.packer("add_rms_norm"), native.function("cpu", "add_rms_norm")
_CUDA = native.cuda_call("add_rms_norm")
_BACKWARD, _CUDA_BACKWARD = native.cpu_call("add_rms_norm_backward"), native.cuda_call("add_rms_norm_backward")


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    # Written out where that is cheaper than a call: for one token the calls are the cost.
    if x.is_contiguous():
        width = stride = x.shape[-1]
    else:
        x, stride = rows(x)
        width = x.shape[-1]
    residual_stride = width
    if not residual.is_contiguous():
        residual, residual_stride = rows(residual)
    if x.nbytes < LARGE:
        y, added = torch.empty_like(x), torch.empty_like(x)
    else:
        y, added = empty_like(x), empty_like(x)
    gain, dtype = 0, DTYPES[x.dtype]
    weight_dtype = dtype
    if weight is not None:
        if not weight.is_contiguous():
            weight = weight.contiguous()
        gain, weight_dtype = weight.data_ptr(), DTYPES[weight.dtype]
    addresses = (y.data_ptr(), added.data_ptr(), x.data_ptr(), residual.data_ptr(), gain)
    sizes = (x.numel() // width, width, stride, residual_stride)
    options = (eps, weight_offset, dtype, weight_dtype, round_before_weight)
    if not x.is_cpu:
        _CUDA(x, *addresses, *sizes, *options)
        return y, added
    status = _CPU(_PACK(*addresses, *sizes, *options, instruction_set(), get_num_threads(), 0))
    if status:
        raise native.failed("add_rms_norm", status)
    return y, added


def backward(
    dy: Tensor,
    dadded: Tensor | None,
    added: Tensor,
    weight: Tensor | None,
    wanted: bool,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x and residual, and dweight if it is wanted (otherwise an empty tensor)."""
    dy, added = dy.contiguous(), added.contiguous()
    dadded = contiguous(dadded)
    dx = empty_like(added)
    width = added.shape[-1]
    rows = added.numel() // width
    # Sums over rows are cut by shape alone, so that neither threads nor the GPU's size change a bit.
    blocks = max(1, min(64, rows // 32)) if added.is_cpu else strides.runs(added, 1, rows)
    weight = contiguous(weight)
    dweight = torch.empty_like(weight) if weight is not None and wanted else added.new_empty(0)
    if added.is_cpu:
        partial = scratch(blocks * width)
    else:
        partial = torch.empty(blocks, width, dtype=torch.float32, device=added.device)
    dtype = DTYPES[added.dtype]
    sums = (dweight.data_ptr(), partial.data_ptr()) if dweight.numel() else (0, 0)
    addresses = (dx.data_ptr(), *sums, dy.data_ptr(), address(dadded), added.data_ptr(), address(weight))
    weight_dtype = dtype if weight is None else DTYPES[weight.dtype]
    arguments = (*addresses, rows, width, blocks, eps, weight_offset, dtype, weight_dtype)
    _BACKWARD(*arguments) if added.is_cpu else _CUDA_BACKWARD(added, *arguments)
    return dx, dweight
