"""Calls csrc/cpu/layer_norm.cpp and csrc/cuda/layer_norm.cu; the contract is ops/layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native, strides
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like, scratch
from ..native import DTYPES
from ..strides import address, contiguous, rows

_PACK, _CPU = native.packer("layer_norm"), native.function("cpu", "layer_norm")
_CUDA = native.cuda_call("layer_norm")
_BACKWARD, _CUDA_BACKWARD = native.cpu_call("layer_norm_backward"), native.cuda_call("layer_norm_backward")


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, saving: bool = True
) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: 1/std of each row, then the mean of each row; y if not wanted."""
    # Written out where that is cheaper than a call: for one token the calls are the cost.
    if x.is_contiguous():
        width = stride = x.shape[-1]
    else:
        x, stride = rows(x)
        width = x.shape[-1]
    number = x.numel() // width
    saved = y = torch.empty_like(x) if x.nbytes < LARGE else empty_like(x)
    statistics = 0
    if saving:
        saved = torch.empty(2 * number, dtype=torch.float32, device=x.device)
        statistics = saved.data_ptr()
    gain, shift, dtype = 0, 0, DTYPES[x.dtype]
    parameter_dtype = dtype
    if weight is not None:
        weight = weight.contiguous()
        gain, parameter_dtype = weight.data_ptr(), DTYPES[weight.dtype]
    if bias is not None:
        bias = bias.contiguous()
        shift, parameter_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    if not x.is_cpu:
        pointers = (y.data_ptr(), statistics, x.data_ptr(), gain, shift)
        _CUDA(x, *pointers, number, width, stride, eps, dtype, parameter_dtype)
        return y, saved
    # fmt: off
    status = _CPU(
        _PACK(
            y.data_ptr(), statistics, x.data_ptr(), gain, shift, number, width, stride, eps, dtype, parameter_dtype,
            instruction_set(), get_num_threads(), 0,
        )
    )
    # fmt: on
    if status:
        raise native.failed("layer_norm", status)
    return y, saved


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; empty tensors for those that were not given."""
    x, stride = rows(x)
    dy = dy.contiguous()
    width = x.shape[-1]
    number = x.numel() // width
    dx = empty_like(x)
    dweight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    # Sums over rows are cut by shape alone, so that threads do not change a bit.
    gpu = native.on_gpu(x)
    if gpu:
        blocks = strides.runs(x, 1, number)
        workspace = torch.empty(blocks * 2 * width, dtype=torch.float32, device=x.device)
    else:
        blocks = max(1, min(64, number // 32))
        workspace = scratch(blocks * 3 * width)
    weight = contiguous(weight)
    parameter = weight if weight is not None else bias if bias is not None else x
    arguments = (
        dx.data_ptr(),
        0 if weight is None else dweight.data_ptr(),
        0 if bias is None else dbias.data_ptr(),
        workspace.data_ptr(),
        dy.data_ptr(),
        x.data_ptr(),
        address(weight),
        saved.data_ptr(),
        number,
        width,
        stride,
        blocks,
        DTYPES[x.dtype],
        DTYPES[parameter.dtype],
    )
    _CUDA_BACKWARD(x, *arguments) if gpu else _BACKWARD(*arguments)
    return dx, dweight, dbias
