"""RMS normalisation in Triton, after an addition or not; the contracts are ops/rms_norm.py and ops/add_rms_norm.py.

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
    added_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    width,
    stride,
    residual_stride,
    eps,
    offset,
    ADDING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """y of x; ADDING: of residual + x, which goes to added."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    residual_ptr += row * residual_stride
    y_ptr += row * width
    added_ptr += row * width
    columns = tl.arange(0, BLOCK)
    end = BLOCK if IS_WHOLE else width  # a loop that is known to run once is none
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    x = squares
    for start in range(0, end, BLOCK):
        inside = start + columns < width
        x = wide(x_ptr + start + columns, inside)
        if ADDING:
            added = rounded(wide(residual_ptr + start + columns, inside) + x, added_ptr)
            tl.store(added_ptr + start + columns, added, mask=inside)
            x = added.to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
    normed_ptr = added_ptr if ADDING else x_ptr
    for start in range(0, end, BLOCK):
        inside = start + columns < width
        if not IS_WHOLE:
            x = wide(normed_ptr + start + columns, inside)
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
    dadded_ptr,
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
    TWO_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """The gradient of what was normalised; TWO_GRADIENTS: dadded is added to it."""
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    partial_ptr += block * width
    end = BLOCK if IS_WHOLE else width
    gain = tl.full([BLOCK], 1.0, dtype=tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    if IS_WHOLE and WEIGHTED:
        gain = offset + wide(weight_ptr + columns, columns < width)
    for row in range(rows * block // blocks, rows * (block + 1) // blocks):
        x_row = x_ptr + tl.cast(row, tl.int64) * stride
        row_start = tl.cast(row, tl.int64) * width
        if IS_WHOLE:  # as a loop of one turn it would cost an addition of 0 an element
            x = wide(x_row + columns, columns < width)
            dy = wide(dy_ptr + row_start + columns, columns < width)
            square = tl.sum(x * x, axis=0)
            dot = tl.sum(dy * gain * x, axis=0)
        else:
            squares = tl.zeros([BLOCK], dtype=tl.float32)
            dots = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, width, BLOCK):
                inside = start + columns < width
                x = wide(x_row + start + columns, inside)
                dy = wide(dy_ptr + row_start + start + columns, inside)
                if WEIGHTED:
                    gain = offset + wide(weight_ptr + start + columns, inside)
                squares += x * x
                dots += dy * gain * x
            square = tl.sum(squares, axis=0)
            dot = tl.sum(dots, axis=0)
        rstd = 1.0 / tl.sqrt(square / width + eps)
        c = dot * rstd * rstd * rstd / width
        for start in range(0, end, BLOCK):
            inside = start + columns < width
            if not IS_WHOLE:
                x = wide(x_row + start + columns, inside)
                dy = wide(dy_ptr + row_start + start + columns, inside)
                if WEIGHTED:
                    gain = offset + wide(weight_ptr + start + columns, inside)
            dx = dy * gain * rstd - x * c
            if TWO_GRADIENTS:
                dx += wide(dadded_ptr + row_start + start + columns, inside)
            tl.store(dx_ptr + row_start + start + columns, rounded(dx, dx_ptr), mask=inside)
            if WANTED:
                if IS_WHOLE:
                    sums += dy * (x * rstd)
                else:
                    sums = tl.load(partial_ptr + start + columns, mask=inside, other=0.0) + dy * (x * rstd)
                    tl.store(partial_ptr + start + columns, sums, mask=inside)
    if IS_WHOLE and WANTED:
        tl.store(partial_ptr + columns, sums, mask=columns < width)


def _tile(width: int) -> dict[str, int]:
    """The constants of a kernel for rows of `width`."""
    block = min(triton.next_power_of_2(width), WHOLE)
    warps = min(max(block // 512, 1), 8)  # 16-byte loads also where a warp is 64 threads
    return {"BLOCK": block, "IS_WHOLE": width <= block, "num_warps": warps}


def normed(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    """y, and what was normalised: residual + x, or without a residual x."""
    x, stride = strides.rows(x)
    residual, residual_stride = (None, 0) if residual is None else strides.rows(residual)
    y, added = x.new_empty(x.shape), x if residual is None else x.new_empty(x.shape)
    width = x.shape[-1]
    if not x.numel():
        return y, added
    with torch.cuda.device_of(x):
        _forward_kernel[(x.numel() // width,)](
            y,
            added,
            x,
            x if residual is None else residual,
            x if weight is None else weight.contiguous(),
            width,
            stride,
            residual_stride,
            eps,
            offset,
            ADDING=residual is not None,
            WEIGHTED=weight is not None,
            ROUND_BEFORE_WEIGHT=round_before_weight,
            **_tile(width),
        )
    return y, added


def gradients(
    dy: Tensor,
    dadded: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    wanted: bool,
    eps: float,
    offset: float,
    least: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of what was normalised, x, plus dadded; dweight if it is wanted. A program has `least` rows."""
    x, stride = strides.rows(x)
    dy, dx = dy.contiguous(), x.new_empty(x.shape)
    width = x.shape[-1]
    rows = x.numel() // width
    blocks = max(1, min(MAX_BLOCKS, rows // least))
    wanted = wanted and weight is not None
    partial = torch.zeros(blocks if wanted else 0, width, dtype=torch.float32, device=x.device)
    dweight = weight.new_empty(weight.shape) if weight is not None and wanted else x.new_empty(0)
    with torch.cuda.device_of(x):
        _backward_kernel[(blocks,)](
            dx,
            partial,
            dy,
            dy if dadded is None else dadded.contiguous(),
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
            TWO_GRADIENTS=dadded is not None,
            **_tile(width),
        )
    if wanted:
        add_up(partial, dweight)
    return dx, dweight


def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool) -> Tensor:
    return normed(x, None, weight, eps, offset, round_before_weight)[0]


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, wanted: bool, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    return gradients(dy, None, x, weight, wanted, eps, offset, 8)
