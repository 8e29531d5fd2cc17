"""Residual addition and RMS normalisation in Triton; the contract is ops/add_rms_norm.py.

One program adds and normalises one row: up to rms_norm.WHOLE columns the row stays in registers, above the sum is read
again. The backward pass gives each program a run of rows and a partial sum of dweight: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strides
from .numbers import rounded, wide
from .rms_norm import tile
from .sums import add_up

MAX_BLOCKS = 512


@triton.jit
def _forward_kernel(
    y_ptr,
    added_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    width,
    stride,
    residual_stride,
    eps,
    offset,
    WEIGHTED: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    residual_ptr += row * residual_stride
    y_ptr += row * width
    added_ptr += row * width
    columns = tl.arange(0, BLOCK)
    end = BLOCK if IS_WHOLE else width  # a loop that is known to run once is none
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    added = squares
    for start in range(0, end, BLOCK):
        inside = start + columns < width
        added = wide(residual_ptr + start + columns, inside) + wide(x_ptr + start + columns, inside)
        narrow = rounded(added, added_ptr)
        tl.store(added_ptr + start + columns, narrow, mask=inside)
        added = narrow.to(tl.float32)
        squares += added * added
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
    for start in range(0, end, BLOCK):
        inside = start + columns < width
        if not IS_WHOLE:
            added = wide(added_ptr + start + columns, inside)
        y = added * rstd
        if WEIGHTED:
            weight = wide(weight_ptr + start + columns, inside)
            if ROUND_BEFORE_WEIGHT:
                y = rounded(y, y_ptr).to(tl.float32)
            y *= offset + weight
        tl.store(y_ptr + start + columns, rounded(y, y_ptr), mask=inside)


@triton.jit
def _backward_kernel(
    dx_ptr,
    partial_ptr,
    dy_ptr,
    dadded_ptr,
    added_ptr,
    weight_ptr,
    rows,
    width,
    blocks,
    eps,
    offset,
    WEIGHTED: tl.constexpr,
    WANTED: tl.constexpr,
    TWO_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    partial_ptr += block * width
    end = BLOCK if IS_WHOLE else width
    gain = tl.full([BLOCK], 1.0, dtype=tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    if IS_WHOLE and WEIGHTED:
        gain = offset + wide(weight_ptr + columns, columns < width)
    for row in range(rows * block // blocks, rows * (block + 1) // blocks):
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        dots = tl.zeros([BLOCK], dtype=tl.float32)
        added = squares
        dy = squares
        for start in range(0, end, BLOCK):
            at = row * width + start + columns
            inside = start + columns < width
            added = wide(added_ptr + at, inside)
            dy = wide(dy_ptr + at, inside)
            if WEIGHTED and not IS_WHOLE:
                gain = offset + wide(weight_ptr + start + columns, inside)
            squares += added * added
            dots += dy * gain * added
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
        c = tl.sum(dots, axis=0) * rstd * rstd * rstd / width
        for start in range(0, end, BLOCK):
            at = row * width + start + columns
            inside = start + columns < width
            if not IS_WHOLE:
                added = wide(added_ptr + at, inside)
                dy = wide(dy_ptr + at, inside)
                if WEIGHTED:
                    gain = offset + wide(weight_ptr + start + columns, inside)
            dx = dy * gain * rstd - added * c
            if TWO_GRADIENTS:
                dx += wide(dadded_ptr + at, inside)
            tl.store(dx_ptr + at, rounded(dx, dx_ptr), mask=inside)
            if WANTED:
                if IS_WHOLE:
                    sums += dy * (added * rstd)
                else:
                    sums = tl.load(partial_ptr + start + columns, mask=inside, other=0.0) + dy * (added * rstd)
                    tl.store(partial_ptr + start + columns, sums, mask=inside)
    if IS_WHOLE and WANTED:
        tl.store(partial_ptr + columns, sums, mask=columns < width)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    x, stride = strides.rows(x)
    residual, residual_stride = strides.rows(residual)
    y, added = x.new_empty(x.shape), x.new_empty(x.shape)
    width = x.shape[-1]
    block, whole, warps = tile(width)
    if not x.numel():
        return y, added
    with torch.cuda.device_of(x):
        _forward_kernel[(x.numel() // width,)](
            y,
            added,
            x,
            residual,
            x if weight is None else weight.contiguous(),
            width,
            stride,
            residual_stride,
            eps,
            offset,
            WEIGHTED=weight is not None,
            ROUND_BEFORE_WEIGHT=round_before_weight,
            BLOCK=block,
            IS_WHOLE=whole,
            num_warps=warps,
        )
    return y, added


def backward(
    dy: Tensor,
    dadded: Tensor | None,
    added: Tensor,
    weight: Tensor | None,
    wanted: bool,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    dy, added = dy.contiguous(), added.contiguous()
    dx = added.new_empty(added.shape)
    width = added.shape[-1]
    rows = added.numel() // width
    blocks = max(1, min(MAX_BLOCKS, rows // 4))
    block, whole, warps = tile(width)
    wanted = wanted and weight is not None
    partial = torch.zeros(blocks if wanted else 0, width, dtype=torch.float32, device=added.device)
    dweight = weight.new_empty(weight.shape) if weight is not None and wanted else added.new_empty(0)
    with torch.cuda.device_of(added):
        _backward_kernel[(blocks,)](
            dx,
            partial,
            dy,
            dy if dadded is None else dadded.contiguous(),
            added,
            added if weight is None else weight.contiguous(),
            rows,
            width,
            blocks,
            eps,
            offset,
            WEIGHTED=weight is not None,
            WANTED=wanted,
            TWO_GRADIENTS=dadded is not None,
            BLOCK=block,
            IS_WHOLE=whole,
            num_warps=warps,
        )
    if wanted:
        add_up(partial, dweight)
    return dx, dweight
