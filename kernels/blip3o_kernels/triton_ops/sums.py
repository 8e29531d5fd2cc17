"""Adds up the partial sums that the programs of a kernel left, in an order that the shape gives: no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import rounded

SUMMED = {"TALL": 16, "BLOCK": 128, "num_warps": 4}  # 16 rows at a time, 128 columns
EACH = 1024  # numbers at a time, where they lie together


@triton.jit
def column_sums(partial_ptr, column, inside, count, stride, TALL: tl.constexpr, BLOCK: tl.constexpr):
    """The sum [BLOCK] of `count` rows that lie `stride` apart."""
    total = tl.zeros([TALL, BLOCK], dtype=tl.float32)
    for start in range(0, count, TALL):
        row = (start + tl.arange(0, TALL)[:, None]).to(tl.int64)
        total += tl.load(partial_ptr + row * stride + column[None, :], mask=(row < count) & inside[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _column_kernel(
    first_ptr,
    second_ptr,
    partial_ptr,
    count,
    stride,
    width,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if FIRST:
        total = column_sums(partial_ptr, column, inside, count, stride, TALL, BLOCK)
        tl.store(first_ptr + column, rounded(total, first_ptr), mask=inside)
    if SECOND:
        total = column_sums(partial_ptr + width, column, inside, count, stride, TALL, BLOCK)
        tl.store(second_ptr + column, rounded(total, second_ptr), mask=inside)


@triton.jit
def _row_kernel(y_ptr, partial_ptr, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + column < count
        total += tl.load(partial_ptr + row * count + start + column, mask=inside, other=0.0)
    tl.store(y_ptr + row, rounded(tl.sum(total, axis=0), y_ptr))


def add_up(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first = the sum over n of float32 partial [n, 0], and second of partial [n, 1]; an empty one is not wanted."""
    second = first[:0] if second is None else second
    width = max(first.numel(), second.numel())
    if width:
        with torch.cuda.device_of(partial):
            _column_kernel[(triton.cdiv(width, SUMMED["BLOCK"]),)](
                first,
                second,
                partial,
                len(partial),
                partial.stride(0),
                width,
                FIRST=first.numel() > 0,
                SECOND=second.numel() > 0,
                **SUMMED,
            )


def add_up_rows(partial: Tensor, y: Tensor) -> None:
    """y [n] = the sums of the rows of float32 partial [n, ...], which is contiguous."""
    count = partial.shape[1:].numel()
    block = min(triton.next_power_of_2(count), EACH)
    with torch.cuda.device_of(partial):
        _row_kernel[(len(y),)](y, partial, count, BLOCK=block, num_warps=max(block // 256, 1))
