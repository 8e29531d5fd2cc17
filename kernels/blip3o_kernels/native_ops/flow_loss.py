"""Calls csrc/cpu/flow_loss.cpp and csrc/cuda/flow_loss.cu; the contract is ops/flow_loss.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..memory import empty_like
from ..native import CHUNK, DTYPES
from ..strides import address, contiguous

_CPU, _CUDA = native.cpu_call("flow_loss"), native.cuda_call("flow_loss")
_CPU_BACKWARD, _CUDA_BACKWARD = native.cpu_call("flow_loss_backward"), native.cuda_call("flow_loss_backward")


def forward(prediction: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    prediction, target = prediction.contiguous(), target.contiguous()
    weight = contiguous(weight)
    samples, elements = prediction.shape[0], prediction.shape[1:].numel()
    loss = prediction.new_empty((), dtype=torch.float32)
    means = prediction.new_empty(samples, dtype=torch.float32)
    sums = prediction.new_empty(samples * -(-elements // CHUNK), dtype=torch.float64)
    arguments = (
        loss.data_ptr(),
        means.data_ptr(),
        sums.data_ptr(),
        prediction.data_ptr(),
        target.data_ptr(),
        address(weight),
        samples,
        elements,
        DTYPES[prediction.dtype],
    )
    _CPU(*arguments) if prediction.is_cpu else _CUDA(prediction, *arguments)
    return loss, means


def backward(
    dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, to_target: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of prediction and, if it is wanted, of target (otherwise an empty tensor)."""
    prediction, target = prediction.contiguous(), target.contiguous()
    weight = contiguous(weight)
    dprediction = empty_like(prediction)
    dtarget = empty_like(prediction) if to_target else prediction.new_empty(0)
    arguments = (
        dprediction.data_ptr(),
        dtarget.data_ptr() if to_target else 0,
        dloss.data_ptr(),
        prediction.data_ptr(),
        target.data_ptr(),
        address(weight),
        prediction.shape[0],
        prediction.shape[1:].numel(),
        DTYPES[prediction.dtype],
    )
    _CPU_BACKWARD(*arguments) if prediction.is_cpu else _CUDA_BACKWARD(prediction, *arguments)
    return dprediction, dtarget
