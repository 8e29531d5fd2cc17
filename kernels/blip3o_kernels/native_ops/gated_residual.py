"""Calls csrc/cpu/gated_residual.cpp; the contract is ops/gated_residual.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..memory import empty, empty_like
from ..native import DTYPES
from ..strides import address, conditions, contiguous, rows

_FORWARD, _BACKWARD = native.cpu_call("gated_residual"), native.cpu_call("gated_residual_backward")


def forward(residual: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: tanh(gate), and with a weight 1/rms of each row."""
    x, stride = rows(x)
    residual, residual_stride = rows(residual)
    gate, gate_stride = conditions(gate)
    weight = contiguous(weight)
    batch, tokens, width = x.shape
    y = empty_like(x)
    saved = x.new_empty(batch * (width if weight is None else width + tokens), dtype=torch.float32)
    _FORWARD(
        y.data_ptr(),
        saved.data_ptr(),
        residual.data_ptr(),
        x.data_ptr(),
        gate.data_ptr(),
        address(weight),
        batch,
        tokens,
        width,
        residual_stride,
        stride,
        gate_stride,
        eps,
        DTYPES[x.dtype],
        DTYPES[gate.dtype],
    )
    return y, saved


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight (without one an empty tensor)."""
    x, stride = rows(x)
    dy = dy.contiguous()
    batch, tokens, width = x.shape
    dx, dgate = empty_like(x), gate.new_empty(gate.shape)
    dweight = gate.new_empty(0 if weight is None else width)
    gradients = (dx, dgate, dweight)
    if not x.numel():
        for gradient in gradients:
            gradient.zero_()
        return gradients
    weight = contiguous(weight)
    # Sums over samples are cut by shape alone, so that threads do not change a bit.
    blocks = min(batch, 64, 1 + x.numel() // 16384)
    workspace = empty((blocks * 3 * width,), torch.float32)
    _BACKWARD(
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
    return gradients
