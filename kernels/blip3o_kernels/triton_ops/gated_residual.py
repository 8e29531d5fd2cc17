"""The gated residual branch in Triton; the contract is ops/gated_residual.py.

The forward pass leaves tanh(gate) and 1/rms for the backward one, most of which is in normalise.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strides
from .normalise import backward_kernel, moments, partials, tile
from .numbers import rounded, wide
from .sums import SUMMED, add_up, column_sums


@triton.jit
def _hyperbolic_tangent(x):
    """Near 0: x + x^3 q(x^2), as in csrc/cpu/gated_residual.cpp, for 1 - 2 / (e^2|x| + 1) would cancel there."""
    square = x * x
    q = -6.044799e-3 * square + 2.096098e-2
    q = q * square - 5.384315e-2
    q = q * square + 1.3332717e-1
    q = q * square - 3.3333328e-1
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, x * square * q + x, tl.where(x < 0, -far, far))


@triton.jit
def _forward_kernel(
    y_ptr,
    opened_ptr,
    rstd_ptr,
    residual_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    tokens,
    width,
    residual_stride,
    stride,
    gate_stride,
    eps,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)  # of a sample
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < tokens
    row += sample * tokens
    x_rows = x_ptr + row * stride
    gate_ptr += sample * gate_stride
    if NORMED:
        rstd, _ = moments(x_rows, exists, width, eps, False, ROWS, BLOCK, IS_WHOLE)
    span = BLOCK if IS_WHOLE else width
    for start in range(0, span, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (column < width)
        opened = _hyperbolic_tangent(wide(gate_ptr + column, column < width))
        branch = wide(x_rows + column, inside)
        if NORMED:
            branch *= rstd * wide(weight_ptr + column, column < width)
        y = wide(residual_ptr + row * residual_stride + column, inside) + opened * branch
        tl.store(y_ptr + row * width + column, rounded(y, y_ptr), mask=inside)
        tl.store(opened_ptr + sample * width + column, opened, mask=(column < width) & (tile == 0))
    if NORMED:  # last: a store before it would have x loaded again
        tl.store(rstd_ptr + row, rstd, mask=exists)


@triton.jit
def _sample_kernel(
    dgate_ptr,
    partial_ptr,
    saved_ptr,
    weight_ptr,
    runs,
    width,
    NORMED: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate of one sample; what it adds to dweight replaces its first run's partial sums."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    partial_ptr += sample * runs * 2 * width
    opened = tl.load(saved_ptr + sample * width + column, mask=inside, other=0.0)
    scaled = column_sums(partial_ptr, column, inside, runs, 2 * width, TALL, BLOCK)
    slope = 1.0 - opened * opened
    if NORMED:
        tl.store(partial_ptr + column, scaled * opened, mask=inside)
        scaled *= wide(weight_ptr + column, inside)
    tl.store(dgate_ptr + sample * width + column, rounded(slope * scaled, dgate_ptr), mask=inside)


def forward(
    residual: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, saving: bool = True
) -> tuple[Tensor, Tensor]:
    """y, and what the backward pass needs: tanh(gate), and with a weight 1/rms of each row; wanted or not."""
    x, stride = strides.rows(x)
    residual, residual_stride = strides.rows(residual)
    gate, gate_stride = strides.conditions(gate)
    batch, tokens, width = x.shape
    y = x.new_empty(x.shape)
    saved = x.new_empty(batch * (width if weight is None else width + tokens), dtype=torch.float32)
    if not x.numel():
        return y, saved
    constants = tile(width)
    with torch.cuda.device_of(x):
        _forward_kernel[(batch * triton.cdiv(tokens, constants["ROWS"]),)](
            y,
            saved,
            saved[batch * width :],
            residual,
            x,
            gate,
            gate if weight is None else weight.contiguous(),
            tokens,
            width,
            residual_stride,
            stride,
            gate_stride,
            eps,
            NORMED=weight is not None,
            **constants,
        )
    return y, saved


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight (without one an empty tensor)."""
    x, stride = strides.rows(x)
    batch, tokens, width = x.shape
    normed = weight is not None
    dx, dgate, dweight = x.new_empty(x.shape), gate.new_zeros(gate.shape), gate.new_zeros(width if normed else 0)
    if not x.numel():
        return dx, dgate, dweight
    weight = gate if weight is None else weight.contiguous()
    partial = partials(x, batch, tokens, True)
    runs = partial.shape[1]
    across = triton.cdiv(width, SUMMED["BLOCK"])
    with torch.cuda.device_of(x):
        backward_kernel[(batch * runs,)](
            dx,
            partial,
            dy.contiguous(),
            x,
            saved,
            weight,
            saved[batch * width :],
            batch * tokens,
            tokens,
            runs,
            width,
            stride,
            width,
            NORMED=normed,
            CENTRED=False,
            CONDITION="gate",
            WEIGHTED=normed,
            SCALED=True,
            PLAIN=False,
            **tile(width),
        )
        _sample_kernel[(batch, across)](dgate, partial, saved, weight, runs, width, NORMED=normed, **SUMMED)
    add_up(partial[:, 0], dweight)
    return dx, dgate, dweight
