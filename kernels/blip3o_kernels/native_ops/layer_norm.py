"""Calls csrc/cpu/layer_norm.cpp; the contract is ops/layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..memory import empty_like
from ..native import DTYPES
from ..strides import address, contiguous, rows

_FORWARD, _BACKWARD = native.cpu_call("layer_norm"), native.cpu_call("layer_norm_backward")


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, saving: bool = True
) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: 1/std of each row, then the mean of each row."""
    x, stride = rows(x)
    width = x.shape[-1]
    number = x.numel() // width
    y = empty_like(x)
    saved = x.new_empty(2 * number if saving else 0, dtype=torch.float32)
    weight = contiguous(weight)
    bias = contiguous(bias)
    parameter = weight if weight is not None else bias if bias is not None else x
    _FORWARD(
        y.data_ptr(),
        saved.data_ptr() if saving else 0,
        x.data_ptr(),
        address(weight),
        address(bias),
        number,
        width,
        stride,
        eps,
        DTYPES[x.dtype],
        DTYPES[parameter.dtype],
    )
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
    dweight, dbias = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    # Sums over rows are cut by shape alone, so that threads do not change a bit.
    blocks = max(1, min(64, number // 32))
    workspace = torch.empty(blocks * 3 * width, dtype=torch.float32)
    weight = contiguous(weight)
    parameter = weight if weight is not None else bias if bias is not None else x
    _BACKWARD(
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
    return dx, dweight, dbias
