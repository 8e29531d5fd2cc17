"""Calls csrc/cpu/add_rms_norm.cpp; the contract is ops/add_rms_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, strides
from ..memory import empty_like
from ..native import DTYPES
from ..strides import address, contiguous

_FORWARD, _BACKWARD = native.cpu_call("add_rms_norm"), native.cpu_call("add_rms_norm_backward")


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    x, stride = strides.rows(x)
    residual, residual_stride = strides.rows(residual)
    y, added = empty_like(x), empty_like(x)
    width = x.shape[-1]
    weight = contiguous(weight)
    dtype = DTYPES[x.dtype]
    _FORWARD(
        y.data_ptr(),
        added.data_ptr(),
        x.data_ptr(),
        residual.data_ptr(),
        address(weight),
        x.numel() // width,
        width,
        stride,
        residual_stride,
        eps,
        weight_offset,
        dtype,
        dtype if weight is None else DTYPES[weight.dtype],
        round_before_weight,
    )
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
    # Sums over rows are cut by shape alone, so that threads do not change a bit.
    blocks = max(1, min(64, rows // 32))
    weight = contiguous(weight)
    dweight = weight.new_empty(weight.shape) if weight is not None and wanted else added.new_empty(0)
    partial = torch.empty(blocks if dweight.numel() else 0, width, dtype=torch.float32)
    dtype = DTYPES[added.dtype]
    _BACKWARD(
        dx.data_ptr(),
        dweight.data_ptr() if dweight.numel() else 0,
        partial.data_ptr() if dweight.numel() else 0,
        dy.data_ptr(),
        address(dadded),
        added.data_ptr(),
        address(weight),
        rows,
        width,
        blocks,
        eps,
        weight_offset,
        dtype,
        dtype if weight is None else DTYPES[weight.dtype],
    )
    return dx, dweight
