"""Adds up the partial sums that the programs of a kernel left, in their order: no atomics, the same bits every time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import rounded


@triton.jit
def _sum_kernel(y_ptr, partial_ptr, blocks, stride, width, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(blocks):
        total += tl.load(partial_ptr + block * stride + columns, mask=inside, other=0.0)
    tl.store(y_ptr + columns, rounded(total, y_ptr), mask=inside)


def add_up(y: Tensor, partial: Tensor) -> None:
    """y [...] = the sum over the first dimension of float32 partial [N, ...], whose other dimensions are adjacent."""
    if y.numel():
        with torch.cuda.device_of(y):
            _sum_kernel[(triton.cdiv(y.numel(), 128),)](
                y, partial, len(partial), partial.stride(0), y.numel(), BLOCK=128, num_warps=4
            )
