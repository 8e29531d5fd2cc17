"""Calls csrc/cpu/flow_loss.cpp; the contract is ops/flow_loss.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import instruction_set
from ..native import CHUNK, DTYPES

_PACK, _PACK_BACKWARD = native.packer("flow_loss"), native.packer("flow_loss_backward")
_CPU_FORWARD, _CPU_BACKWARD = native.function("cpu", "flow_loss"), native.function("cpu", "flow_loss_backward")


def forward(prediction: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    prediction, target = prediction.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    samples, elements = prediction.shape[0], prediction.shape[1:].numel()
    loss = prediction.new_empty((), dtype=torch.float32)
    means = prediction.new_empty(samples, dtype=torch.float32)
    sums = torch.empty(samples * -(-elements // CHUNK), dtype=torch.float64)
    status = _CPU_FORWARD(
        _PACK(
            loss.data_ptr(),
            means.data_ptr(),
            sums.data_ptr(),
            prediction.data_ptr(),
            target.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            samples,
            elements,
            DTYPES[prediction.dtype],
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_loss", status)
    return loss, means


def backward(dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    prediction, target = prediction.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    dprediction = torch.empty_like(prediction)
    status = _CPU_BACKWARD(
        _PACK_BACKWARD(
            dprediction.data_ptr(),
            dloss.data_ptr(),
            prediction.data_ptr(),
            target.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            prediction.shape[0],
            prediction.shape[1:].numel(),
            DTYPES[prediction.dtype],
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_loss", status)
    return dprediction
