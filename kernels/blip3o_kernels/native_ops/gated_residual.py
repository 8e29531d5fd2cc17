"""Calls csrc/cpu/gated_residual.cpp and csrc/cuda/gated_residual.cu; the contract is ops/gated_residual.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native, strides
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like, scratch
from ..native import DTYPES
from ..strides import address, conditions, contiguous, rows

_PACK, _CPU = native.packer("gated_residual"), native.function("cpu", "gated_residual")
_CUDA = native.cuda_call("gated_residual")
_BACKWARD, _CUDA_BACKWARD = native.cpu_call("gated_residual_backward"), native.cuda_call("gated_residual_backward")


def forward(
    residual: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, saving: bool = True
) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: tanh(gate), and with a weight 1/rms of each row; memory that the next call
    uses again unless it is wanted."""
    # Written out where that is cheaper than a call: for one token the calls are the cost.
    batch, tokens, width = x.shape
    stride = width
    if not x.is_contiguous():
        x, stride = rows(x)
    residual_stride = width
    if not residual.is_contiguous():
        residual, residual_stride = rows(residual)
    gate_stride, adjacent = gate.stride()
    if adjacent != 1:
        gate, gate_stride = conditions(gate)
    y = torch.empty_like(x) if x.nbytes < LARGE else empty_like(x)
    gain, floats = 0, batch * width
    if weight is not None:
        weight = weight.contiguous()
        gain, floats = weight.data_ptr(), batch * (width + tokens)
    if not x.is_cpu:
        saved = torch.empty(floats, dtype=torch.float32, device=x.device)
        pointers = (y.data_ptr(), saved.data_ptr(), residual.data_ptr(), x.data_ptr(), gate.data_ptr(), gain)
        sizes = (batch, tokens, width, residual_stride, stride, gate_stride)
        _CUDA(x, *pointers, *sizes, eps, DTYPES[x.dtype], DTYPES[gate.dtype])
        return y, saved
    saved = torch.empty(floats, dtype=torch.float32, device=x.device) if saving else scratch(floats)
    # fmt: off
    status = _CPU(
        _PACK(
            y.data_ptr(), saved.data_ptr(), residual.data_ptr(), x.data_ptr(), gate.data_ptr(), gain, batch, tokens,
            width, residual_stride, stride, gate_stride, eps, DTYPES[x.dtype], DTYPES[gate.dtype],
            instruction_set(), get_num_threads(), 0,
        )
    )
    # fmt: on
    if status:
        raise native.failed("gated_residual", status)
    return y, saved


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight (without one an empty tensor)."""
    x, stride = rows(x)
    dy = dy.contiguous()
    batch, tokens, width = x.shape
    dx, dgate = empty_like(x), gate.new_empty(gate.shape)
    dweight = gate.new_empty(0) if weight is None else torch.empty_like(weight)
    gradients = (dx, dgate, dweight)
    if not x.numel():
        for gradient in gradients:
            gradient.zero_()
        return gradients
    weight = contiguous(weight)
    # Sums over samples are cut by shape alone, so that threads do not change a bit.
    gpu = native.on_gpu(x)
    if gpu:
        blocks = strides.runs(x, batch, tokens)
        workspace = torch.empty(batch * blocks * width, dtype=torch.float32, device=x.device)
    else:
        blocks = min(batch, 64, 1 + x.numel() // 16384)
        workspace = scratch(blocks * 3 * width)
    arguments = (
        dx.data_ptr(),
        dgate.data_ptr(),
        0 if weight is None else dweight.data_ptr(),
        workspace.data_ptr(),
        dy.data_ptr(),
        x.data_ptr(),
        address(weight),
        saved.data_ptr(),
        batch,
        tokens,
        width,
        stride,
        blocks,
        DTYPES[x.dtype],
        DTYPES[gate.dtype],
    )
    _CUDA_BACKWARD(x, *arguments) if gpu else _BACKWARD(*arguments)
    return gradients
