"""RMS normalisation in Triton; the contract is ops/rms_norm.py. T dtype of x, D width, R rows, N blocks of rows.

One program normalises one row: up to WHOLE columns the row stays in registers, above it is read twice. The backward
pass gives each program a run of rows and a partial sum of dweight, added up in order by a second kernel: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strides
from .numbers import rounded, wide
from .sums import add_up

WHOLE = 8192  # columns a row may have to be held in registers: 8 warps with 32 floats a thread
MAX_BLOCKS = 512


@triton.jit
def _forward_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    width,
    stride,
    eps,
    offset,
    WEIGHTED: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    y_ptr += row * width
    columns = tl.arange(0, BLOCK)
    if IS_WHOLE:
        x = wide(x_ptr + columns, columns < width)
        square = tl.sum(x * x, axis=0)
    else:
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            part = wide(x_ptr + start + columns, start + columns < width)
            squares += part * part
        square = tl.sum(squares, axis=0)
    rstd = 1.0 / tl.sqrt(square / width + eps)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        if not IS_WHOLE:
            x = wide(x_ptr + start + columns, inside)
        y = x * rstd
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
    x_ptr,
    weight_ptr,
    rows,
    width,
    stride,
    blocks,
    eps,
    offset,
    WEIGHTED: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    partial_ptr += block * width
    if IS_WHOLE:
        inside = columns < width
        gain = tl.full([BLOCK], 1.0, dtype=tl.float32)
        if WEIGHTED:
            gain = offset + wide(weight_ptr + columns, inside)
        sums = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(rows * block // blocks, rows * (block + 1) // blocks):
        x_row = x_ptr + tl.cast(row, tl.int64) * stride
        dy_row = dy_ptr + tl.cast(row, tl.int64) * width
        dx_row = dx_ptr + tl.cast(row, tl.int64) * width
        if IS_WHOLE:
            x = wide(x_row + columns, inside)
            dy = wide(dy_row + columns, inside)
            square = tl.sum(x * x, axis=0)
            dot = tl.sum(dy * gain * x, axis=0)
        else:
            squares = tl.zeros([BLOCK], dtype=tl.float32)
            dots = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, width, BLOCK):
                inside = start + columns < width
                x = wide(x_row + start + columns, inside)
                dy = wide(dy_row + start + columns, inside)
                squares += x * x
                if WEIGHTED:
                    dy *= offset + wide(weight_ptr + start + columns, inside)
                dots += dy * x
            square = tl.sum(squares, axis=0)
            dot = tl.sum(dots, axis=0)
        rstd = 1.0 / tl.sqrt(square / width + eps)
        c = dot * rstd * rstd * rstd / width
        if IS_WHOLE:
            tl.store(dx_row + columns, rounded(dy * gain * rstd - x * c, dx_ptr), mask=inside)
            sums += dy * (x * rstd)
        else:
            for start in range(0, width, BLOCK):
                inside = start + columns < width
                x = wide(x_row + start + columns, inside)
                dy = wide(dy_row + start + columns, inside)
                if WANTED:
                    sums = tl.load(partial_ptr + start + columns, mask=inside, other=0.0) + dy * (x * rstd)
                    tl.store(partial_ptr + start + columns, sums, mask=inside)
                if WEIGHTED:
                    dy *= offset + wide(weight_ptr + start + columns, inside)
                tl.store(dx_row + start + columns, rounded(dy * rstd - x * c, dx_ptr), mask=inside)
    if IS_WHOLE and WANTED:
        tl.store(partial_ptr + columns, sums, mask=inside)


def tile(width: int) -> tuple[int, bool, int]:
    """BLOCK, IS_WHOLE and the number of warps for rows of `width`."""
    block = min(triton.next_power_of_2(width), WHOLE)
    return block, width <= block, min(max(block // 512, 1), 8)  # 16-byte loads also where a warp is 64 threads


def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool) -> Tensor:
    x, stride = strides.rows(x)
    y = x.new_empty(x.shape)
    width = x.shape[-1]
    block, whole, warps = tile(width)
    if not x.numel():
        return y
    with torch.cuda.device_of(x):
        _forward_kernel[(x.numel() // width,)](
            y,
            x,
            x if weight is None else weight.contiguous(),
            width,
            stride,
            eps,
            offset,
            WEIGHTED=weight is not None,
            ROUND_BEFORE_WEIGHT=round_before_weight,
            BLOCK=block,
            IS_WHOLE=whole,
            num_warps=warps,
        )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, wanted: bool, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    x, stride = strides.rows(x)
    dx = x.new_empty(x.shape)
    width = x.shape[-1]
    rows = x.numel() // width
    blocks = max(1, min(MAX_BLOCKS, rows // 8))
    block, whole, warps = tile(width)
    wanted = wanted and weight is not None
    partial = torch.zeros(blocks if wanted else 0, width, dtype=torch.float32, device=x.device)
    dweight = weight.new_empty(weight.shape) if weight is not None and wanted else x.new_empty(0)
    with torch.cuda.device_of(x):
        _backward_kernel[(blocks,)](
            dx,
            partial,
            dy.contiguous(),
            x,
            x if weight is None else weight.contiguous(),
            rows,
            width,
            stride,
            blocks,
            eps,
            offset,
            WEIGHTED=weight is not None,
            WANTED=wanted,
            BLOCK=block,
            IS_WHOLE=whole,
            num_warps=warps,
        )
    if wanted:
        add_up(partial, dweight)
    return dx, dweight
