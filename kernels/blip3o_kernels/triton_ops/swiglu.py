"""The gated activation in Triton; the contract is ops/swiglu.py.

Every element is its own: a program takes ROWS rows of BLOCK columns, 1024 elements, 8 of them a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strides
from .numbers import rounded, wide

ELEMENTS = 1024  # per program


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows and columns of this program, and which of them exist."""
    across = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def _forward_kernel(
    y_ptr, gate_ptr, up_ptr, rows, width, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, inside = _tile(rows, width, ROWS, BLOCK)
    gate = wide(gate_ptr + row * gate_stride + column, inside)
    up = wide(up_ptr + row * up_stride + column, inside)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * width + column, rounded(y, y_ptr), mask=inside)


@triton.jit
def _backward_kernel(
    dgate_ptr,
    dup_ptr,
    dy_ptr,
    gate_ptr,
    up_ptr,
    rows,
    width,
    gate_stride,
    up_stride,
    gradient_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _tile(rows, width, ROWS, BLOCK)
    dy = wide(dy_ptr + row * width + column, inside)
    gate = wide(gate_ptr + row * gate_stride + column, inside)
    up = wide(up_ptr + row * up_stride + column, inside)
    e = 1.0 + tl.exp(-gate)
    sigmoid = 1.0 / e
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    to = row * gradient_stride + column
    tl.store(dgate_ptr + to, rounded(dgate, dgate_ptr), mask=inside)
    tl.store(dup_ptr + to, rounded(dy * (gate / e), dup_ptr), mask=inside)


def _operands(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor, int, int, int]:
    """gate and up as rows of adjacent elements, the rows' width, their strides."""
    gate, stride = strides.rows(gate)
    if up is None:
        width = gate.shape[-1] // 2
        return gate, gate[..., width:], width, stride, stride
    up, up_stride = strides.rows(up)
    return gate, up, gate.shape[-1], stride, up_stride


def _launch(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the constants."""
    block = min(triton.next_power_of_2(width), ELEMENTS)
    tall = ELEMENTS // block
    return (triton.cdiv(rows, tall) * triton.cdiv(width, block),), {"ROWS": tall, "BLOCK": block, "num_warps": 4}


def forward(gate: Tensor, up: Tensor | None) -> Tensor:
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    y = gate.new_empty(shape)
    if not y.numel():
        return y
    gate, up, width, gate_stride, up_stride = _operands(gate, up)
    rows = y.numel() // width
    grid, constants = _launch(rows, width)
    with torch.cuda.device_of(gate):
        _forward_kernel[grid](y, gate, up, rows, width, gate_stride, up_stride, **constants)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """dgate and dup; without up the gradient of both and an empty tensor."""
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0 if up is None else up.shape)
    if not dy.numel():
        return dgate, dup
    packed = up is None
    gate, up, width, gate_stride, up_stride = _operands(gate, up)
    rows = dy.numel() // width
    grid, constants = _launch(rows, width)
    with torch.cuda.device_of(gate):
        _backward_kernel[grid](
            dgate,
            dgate[..., width:] if packed else dup,
            dy.contiguous(),
            gate,
            up,
            rows,
            width,
            gate_stride,
            up_stride,
            2 * width if packed else width,
            **constants,
        )
    return dgate, dup
