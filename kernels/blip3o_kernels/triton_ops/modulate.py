"""Adaptive layer normalisation in Triton; the contract is ops/modulate.py. Most of the backward pass: normalise.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strides
from .normalise import backward_kernel, gain, moments, partials, tile
from .numbers import rounded, wide
from .sums import SUMMED, add_up, column_sums


@triton.jit
def _forward_kernel(
    y_ptr,
    saved_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    tokens,
    width,
    stride,
    scale_stride,
    shift_stride,
    eps,
    SAVING: tl.constexpr,
    CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)  # of a sample
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < tokens
    row += sample * tokens
    x_rows = x_ptr + row * stride
    scale_ptr += sample * scale_stride
    shift_ptr += sample * shift_stride
    rstd, mean = moments(x_rows, exists, width, eps, CENTRED, ROWS, BLOCK, IS_WHOLE)
    span = BLOCK if IS_WHOLE else width
    for start in range(0, span, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        y = (wide(x_rows + column, exists & (column < width)) - mean) * rstd
        y *= gain(scale_ptr, weight_ptr, column, column < width, "scale", WEIGHTED)
        if BIASED:
            y += (1.0 + wide(scale_ptr + column, column < width)) * wide(bias_ptr + column, column < width)
        if SHIFTED:
            y += wide(shift_ptr + column, column < width)
        tl.store(y_ptr + row * width + column, rounded(y, y_ptr), mask=exists & (column < width))
    if SAVING:  # last: a store before it would have x loaded again
        tl.store(saved_ptr + row, rstd, mask=exists)
        if CENTRED:
            tl.store(saved_ptr + rows + row, mean, mask=exists)


@triton.jit
def _sample_kernel(
    dscale_ptr,
    dshift_ptr,
    partial_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    runs,
    width,
    scale_stride,
    SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dscale and dshift of one sample; what it adds to dweight and dbias replaces its first run's partial sums."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    partial_ptr += sample * runs * 2 * width
    one_plus = 1.0 + wide(scale_ptr + sample * scale_stride + column, inside)
    dscale = column_sums(partial_ptr, column, inside, runs, 2 * width, TALL, BLOCK)
    if WEIGHTED:
        tl.store(partial_ptr + column, dscale * one_plus, mask=inside)
        dscale *= wide(weight_ptr + column, inside)
    if SHIFTED or BIASED:
        dshift = column_sums(partial_ptr + width, column, inside, runs, 2 * width, TALL, BLOCK)
        if SHIFTED:
            tl.store(dshift_ptr + sample * width + column, rounded(dshift, dshift_ptr), mask=inside)
        if BIASED:
            tl.store(partial_ptr + width + column, dshift * one_plus, mask=inside)
            dscale += dshift * wide(bias_ptr + column, inside)
    tl.store(dscale_ptr + sample * width + column, rounded(dscale, dscale_ptr), mask=inside)


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
    x, stride = strides.rows(x)
    batch, tokens, width = x.shape
    y = x.new_empty(x.shape)
    saved = torch.empty((1 + centred) * batch * tokens if saving else 0, dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, saved
    scale, scale_stride = strides.conditions(scale)
    shifted, shift_stride = (scale, 0) if shift is None else strides.conditions(shift)
    constants = tile(width)
    with torch.cuda.device_of(x):
        _forward_kernel[(batch * triton.cdiv(tokens, constants["ROWS"]),)](
            y,
            saved,
            x,
            scale,
            shifted,
            scale if weight is None else weight.contiguous(),
            scale if bias is None else bias.contiguous(),
            batch * tokens,
            tokens,
            width,
            stride,
            scale_stride,
            shift_stride,
            eps,
            SAVING=saving,
            CENTRED=centred,
            SHIFTED=shift is not None,
            WEIGHTED=weight is not None,
            BIASED=bias is not None,
            **constants,
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
    x, stride = strides.rows(x)
    batch, tokens, width = x.shape
    dx, dscale = x.new_empty(x.shape), scale.new_zeros(batch, width)
    dshift = scale.new_zeros((batch, width) if shifted else 0)
    dweight, dbias = (scale.new_zeros(0 if p is None else width) for p in (weight, bias))
    if not x.numel():
        return dx, dscale, dshift, dweight, dbias
    scale, scale_stride = strides.conditions(scale)
    weighted, biased = weight is not None, bias is not None
    weight = scale if weight is None else weight.contiguous()
    bias = scale if bias is None else bias.contiguous()
    partial = partials(x, batch, tokens, True)
    runs = partial.shape[1]
    across = triton.cdiv(width, SUMMED["BLOCK"])
    with torch.cuda.device_of(x):
        backward_kernel[(batch * runs,)](
            dx,
            partial,
            dy.contiguous(),
            x,
            scale,
            weight,
            saved,
            batch * tokens,
            tokens,
            runs,
            width,
            stride,
            scale_stride,
            NORMED=True,
            CENTRED=centred,
            CONDITION="scale",
            WEIGHTED=weighted,
            SCALED=True,
            PLAIN=shifted or biased,
            **tile(width),
        )
        _sample_kernel[(batch, across)](
            dscale,
            dshift,
            partial,
            scale,
            weight,
            bias,
            runs,
            width,
            scale_stride,
            SHIFTED=shifted,
            WEIGHTED=weighted,
            BIASED=biased,
            **SUMMED,
        )
    add_up(partial[:, 0], dweight, dbias)
    return dx, dscale, dshift, dweight, dbias
