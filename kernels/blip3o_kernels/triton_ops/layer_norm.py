"""Layer normalisation in Triton; the contract is ops/layer_norm.py, the backward pass is in normalise.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strides
from .normalise import backward_kernel, moments, partials, tile
from .numbers import rounded, wide
from .sums import add_up


@triton.jit
def _forward_kernel(
    y_ptr,
    saved_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    width,
    stride,
    eps,
    SAVING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    x_rows = x_ptr + row * stride
    rstd, mean = moments(x_rows, exists, width, eps, True, ROWS, BLOCK, IS_WHOLE)
    span = BLOCK if IS_WHOLE else width
    for start in range(0, span, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (column < width)
        y = (wide(x_rows + column, inside) - mean) * rstd
        if WEIGHTED:
            y *= wide(weight_ptr + column, column < width)
        if BIASED:
            y += wide(bias_ptr + column, column < width)
        tl.store(y_ptr + row * width + column, rounded(y, y_ptr), mask=inside)
    if SAVING:  # last: a store before it would have x loaded again
        tl.store(saved_ptr + row, rstd, mask=exists)
        tl.store(saved_ptr + rows + row, mean, mask=exists)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, saving: bool = True
) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: 1/std of each row, then the mean of each row."""
    x, stride = strides.rows(x)
    y = x.new_empty(x.shape)
    width = x.shape[-1]
    rows = x.numel() // width
    saved = torch.empty(2 * rows if saving else 0, dtype=torch.float32, device=x.device)
    if not rows:
        return y, saved
    constants = tile(width)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
            y,
            saved,
            x,
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            rows,
            width,
            stride,
            eps,
            SAVING=saving,
            WEIGHTED=weight is not None,
            BIASED=bias is not None,
            **constants,
        )
    return y, saved


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; empty tensors for those that were not given."""
    x, stride = strides.rows(x)
    dx = x.new_empty(x.shape)
    dweight, dbias = (x.new_empty(0) if p is None else p.new_zeros(p.shape) for p in (weight, bias))
    width = x.shape[-1]
    rows = x.numel() // width
    if not rows:
        return dx, dweight, dbias
    wanted = {"SCALED": weight is not None, "PLAIN": bias is not None}
    partial = partials(x, 1, rows, any(wanted.values()))
    runs = partial.shape[1]
    with torch.cuda.device_of(x):
        backward_kernel[(runs,)](
            dx,
            partial,
            dy.contiguous(),
            x,
            x,
            x if weight is None else weight.contiguous(),
            saved,
            rows,
            rows,
            runs,
            width,
            stride,
            0,
            NORMED=True,
            CENTRED=True,
            CONDITION="none",
            WEIGHTED=weight is not None,
            **wanted,
            **tile(width),
        )
    add_up(partial[0], dweight, dbias)
    return dx, dweight, dbias
