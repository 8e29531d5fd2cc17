"""How the native bodies see memory: rows of adjacent elements, one stride apart; addresses, of nothing 0."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., D] as rows that lie one stride apart, without a copy where that is possible, and the stride in elements.

    A part of a split last dimension, such as the queries in a fused projection's result, needs no copy.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    shape, strides = x.shape, x.stride()
    last = len(shape) - 1
    if last and strides[last] == 1 and strides[last - 1] >= shape[last]:
        if all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(last - 1)):
            return x, strides[last - 1]
    return x.contiguous(), shape[-1]


def conditions(x: Tensor) -> tuple[Tensor, int]:
    """x [B, D] with adjacent elements in a row, without a copy where that is possible, and the stride between rows."""
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def runs(x: Tensor, batch: int, tokens: int) -> int:
    """How many runs a GPU cuts the `tokens` rows of each sample into, to add a run up in one block and then the runs.

    By shape alone, so that the GPU's size does not change a bit: as many blocks as 132 multiprocessors hold at once.
    x: whose rows they are; the longer they are, the more threads a block has (csrc/cuda/rows.cuh).
    """
    length = x.shape[-1] * x.element_size()
    blocks = 264 if length <= 1024 else 528 if length <= 4096 else 264 if length <= 8192 else 132
    return max(1, min(tokens // 4, blocks // max(1, batch)))


def last_adjacent(x: Tensor) -> Tensor:
    """x [..., D] with adjacent elements in the last dimension, without a copy where that is so already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tokens_first(x: Tensor, width: int | None = None) -> Tensor:
    """An empty tensor like x [B, H, T, K], or of another width, that is dense in memory as [B, T, H, K].

    It is no view, such as a transposed one is: autograd lets no view be changed in place that a Function returns.
    """
    batch, heads, tokens, width = *x.shape[:3], x.shape[3] if width is None else width
    return x.new_empty_strided((batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def wide(x: Tensor) -> Tensor:
    """x in float32, contiguous; a call that changes nothing costs torch as much as one token's norm."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    return x.contiguous()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
