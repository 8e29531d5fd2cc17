"""Calls csrc/cpu/modulate.cpp and csrc/cuda/modulate.cu; the contract is ops/modulate.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native, strides
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like, scratch
from ..native import DTYPES
from ..strides import address, conditions, contiguous, rows

_PACK, _CPU = native.packer("modulate"), native.function("cpu", "modulate")
_CUDA = native.cuda_call("modulate")
_BACKWARD, _CUDA_BACKWARD = native.cpu_call("modulate_backward"), native.cuda_call("modulate_backward")


def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    saving: bool = True,
) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: 1/std of each row and, if centred, its mean; y again unless it is wanted."""
    # Written out where that is cheaper than a call: for one token the calls are the cost.
    batch, tokens, width = x.shape
    stride = width
    if not x.is_contiguous():
        x, stride = rows(x)
    saved = y = torch.empty_like(x) if x.nbytes < LARGE else empty_like(x)
    statistics = 0
    if saving:
        saved = torch.empty((1 + centred) * batch * tokens, dtype=torch.float32, device=x.device)
        statistics = saved.data_ptr()
    scale_stride, adjacent = scale.stride()
    if adjacent != 1:
        scale, scale_stride = conditions(scale)
    moved = moved_stride = gain = offset = 0
    if shift is not None:
        shift, moved_stride = conditions(shift)
        moved = shift.data_ptr()
    if weight is not None:
        weight = weight.contiguous()
        gain = weight.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        offset = bias.data_ptr()
    if not x.is_cpu:
        pointers = (y.data_ptr(), statistics, x.data_ptr(), scale.data_ptr(), moved, gain, offset)
        sizes = (batch, tokens, width, stride, scale_stride, moved_stride)
        _CUDA(x, *pointers, *sizes, eps, centred, DTYPES[x.dtype], DTYPES[scale.dtype])
        return y, saved
    # fmt: off
    status = _CPU(
        _PACK(
            y.data_ptr(), statistics, x.data_ptr(), scale.data_ptr(), moved, gain, offset, batch, tokens, width, stride,
            scale_stride, moved_stride, eps, centred, DTYPES[x.dtype], DTYPES[scale.dtype],
            instruction_set(), get_num_threads(), 0,
        )
    )
    # fmt: on
    if status:
        raise native.failed("modulate", status)
    return y, saved


def backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    shifted: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, scale, shift, weight and bias; empty tensors for those that were not given."""
    x, stride = rows(x)
    dy = dy.contiguous()
    batch, tokens, width = x.shape
    dx, dscale = empty_like(x), scale.new_empty(batch, width)
    dshift = scale.new_empty((batch, width) if shifted else 0)
    dweight = scale.new_empty(0) if weight is None else torch.empty_like(weight)
    dbias = scale.new_empty(0) if bias is None else torch.empty_like(bias)
    gradients = (dx, dscale, dshift, dweight, dbias)
    if not x.numel():
        for gradient in gradients:
            gradient.zero_()
        return gradients
    scale, scale_stride = conditions(scale)
    weight = contiguous(weight)
    bias = contiguous(bias)
    # Sums over samples are cut by shape alone, so that threads do not change a bit.
    gpu = native.on_gpu(x)
    if gpu:
        blocks = strides.runs(x, batch, tokens)
        workspace = torch.empty(batch * blocks * 2 * width, dtype=torch.float32, device=x.device)
    else:
        blocks = min(batch, 64, 1 + x.numel() // 16384)
        workspace = scratch(blocks * 5 * width)
    arguments = (
        dx.data_ptr(),
        dscale.data_ptr(),
        dshift.data_ptr() if shifted else 0,
        0 if weight is None else dweight.data_ptr(),
        0 if bias is None else dbias.data_ptr(),
        workspace.data_ptr(),
        dy.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        address(weight),
        address(bias),
        saved.data_ptr(),
        batch,
        tokens,
        width,
        stride,
        scale_stride,
        blocks,
        centred,
        DTYPES[x.dtype],
        DTYPES[scale.dtype],
    )
    _CUDA_BACKWARD(x, *arguments) if gpu else _BACKWARD(*arguments)
    return gradients
