"""Calls csrc/cpu/modulate.cpp; the contract is ops/modulate.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..memory import empty, empty_like
from ..native import DTYPES
from ..strides import address, conditions, contiguous, rows

_FORWARD, _BACKWARD = native.cpu_call("modulate"), native.cpu_call("modulate_backward")


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
    """y, and what the backward pass needs: 1/std of each row and, if centred, its mean."""
    x, stride = rows(x)
    batch, tokens, width = x.shape
    y = empty_like(x)
    saved = x.new_empty((1 + centred) * batch * tokens if saving else 0, dtype=torch.float32)
    scale, scale_stride = conditions(scale)
    shift, shift_stride = (None, 0) if shift is None else conditions(shift)
    weight = contiguous(weight)
    bias = contiguous(bias)
    _FORWARD(
        y.data_ptr(),
        saved.data_ptr() if saving else 0,
        x.data_ptr(),
        scale.data_ptr(),
        address(shift),
        address(weight),
        address(bias),
        batch,
        tokens,
        width,
        stride,
        scale_stride,
        shift_stride,
        eps,
        centred,
        DTYPES[x.dtype],
        DTYPES[scale.dtype],
    )
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
    dweight, dbias = (scale.new_empty(0 if p is None else width) for p in (weight, bias))
    gradients = (dx, dscale, dshift, dweight, dbias)
    if not x.numel():
        for gradient in gradients:
            gradient.zero_()
        return gradients
    scale, scale_stride = conditions(scale)
    weight = contiguous(weight)
    bias = contiguous(bias)
    # Sums over samples are cut by shape alone, so that threads do not change a bit.
    blocks = min(batch, 64, 1 + x.numel() // 16384)
    workspace = empty((blocks * 5 * width,), torch.float32)
    _BACKWARD(
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
    return gradients
