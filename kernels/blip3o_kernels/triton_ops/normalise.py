"""What layer_norm, modulate and gated_residual share in Triton: a row's moments, and one backward pass for the three.

    n      = (x - mean) * rstd           mean is 0 if not CENTRED; n = x if not NORMED
    y      = n * gain + ...              gain [width] of the sample, see `gain`
    dx     = rstd * (u - mean(u) - n * mean(u * n)),  u = dy * gain     without mean(u) if not CENTRED
    scaled = sum of dy * n,  plain = sum of dy                          over a sample's rows

A program holds ROWS rows of up to WHOLE columns in registers; longer rows (IS_WHOLE=False, ROWS=1) it reads again. Both
are one piece of code: `span` is where the columns of a row end, and with whole rows the loops over it have one turn, so
that the compiler removes them and loads x and dy once. The sums: each program leaves those of a run of rows, which
others add up in an order given by the shape: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import rounded, wide

WHOLE = 8192  # columns a row may have to be held in registers: 16 warps with 16 floats a thread
PART = 4096  # columns of a longer row at a time
PROGRAMS = 512  # of the backward pass, at most, if it adds up: some four on each multiprocessor


@triton.jit
def moments(
    x_rows,
    exists,
    width,
    eps,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """rstd and mean [ROWS, 1] of the rows that begin at x_rows."""
    column = tl.arange(0, BLOCK)[None, :]
    span = BLOCK if IS_WHOLE else width
    mean = tl.zeros([ROWS, 1], dtype=tl.float32)
    if CENTRED:
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, span, BLOCK):
            total += wide(x_rows + start + column, exists & (start + column < width))
        mean = tl.sum(total, axis=1, keep_dims=True) / width
    left = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, span, BLOCK):
        inside = exists & (start + column < width)
        x = tl.where(inside, wide(x_rows + start + column, inside) - mean, 0.0)
        left += x
        squares += x * x
    if CENTRED:
        mean += tl.sum(left, axis=1, keep_dims=True) / width  # what rounding left
    # A whole row shares the error of this one number: divisions and roots here are exact to the last bit.
    square = tl.div_rn(tl.sum(squares, axis=1, keep_dims=True), width * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(square + eps)), mean


@triton.jit
def gain(condition_ptr, weight_ptr, column, inside, CONDITION: tl.constexpr, WEIGHTED: tl.constexpr):
    """The sample's condition, 1 + it for CONDITION="scale", it alone for "gate", 1 for "none"; times the weight."""
    g = tl.where(inside, 1.0, 0.0)
    if CONDITION != "none":
        g = wide(condition_ptr + column, inside)
    if CONDITION == "scale":
        g += 1.0
    if WEIGHTED:
        g *= wide(weight_ptr + column, inside)
    return g


@triton.jit
def _rows(start, ROWS: tl.constexpr):
    """The rows [ROWS, 1] from `start` on. One row is a scalar, so that its rstd and mean are loaded once a thread."""
    row = start
    if ROWS > 1:
        row = start + tl.arange(0, ROWS)[:, None]
    return row


@triton.jit
def _standard(saved_ptr, row, rows, exists, NORMED: tl.constexpr, CENTRED: tl.constexpr):
    """rstd and mean of the rows, as the forward pass left them: rstd of all rows, then the mean of all rows."""
    rstd = tl.where(exists, 1.0, 0.0)
    mean = tl.where(exists, 0.0, 0.0)
    if NORMED:
        rstd = tl.load(saved_ptr + row, mask=exists, other=0.0)
    if CENTRED:
        mean = tl.load(saved_ptr + rows + row, mask=exists, other=0.0)
    return rstd, mean


@triton.jit
def backward_kernel(
    dx_ptr,
    partial_ptr,
    dy_ptr,
    x_ptr,
    condition_ptr,
    weight_ptr,
    saved_ptr,
    rows,
    tokens,
    runs,
    width,
    stride,
    condition_stride,
    NORMED: tl.constexpr,
    CENTRED: tl.constexpr,
    CONDITION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    PLAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """dx, and in partial [batch, runs, 2, width] what a run adds to `scaled` and `plain`."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // runs
    run = program % runs
    first = tokens * run // runs
    last = tokens * (run + 1) // runs
    condition_ptr += sample * condition_stride
    partial_ptr += program * 2 * width
    column = tl.arange(0, BLOCK)[None, :]
    span = BLOCK if IS_WHOLE else width
    scaled = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    plain = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if IS_WHOLE:
        g = gain(condition_ptr, weight_ptr, column, column < width, CONDITION, WEIGHTED)
    for token in range(first, last, ROWS):
        row = _rows(token, ROWS)
        exists = row < last
        row += sample * tokens
        x_rows = x_ptr + row * stride
        dy_rows = dy_ptr + row * width
        dx_rows = dx_ptr + row * width
        rstd, mean = _standard(saved_ptr, row, rows, exists, NORMED, CENTRED)
        if NORMED:
            dot = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            for start in range(0, span, BLOCK):
                at = start + column
                inside = exists & (at < width)
                if not IS_WHOLE:
                    g = gain(condition_ptr, weight_ptr, at, at < width, CONDITION, WEIGHTED)
                u = wide(dy_rows + at, inside) * g
                dot += u * (wide(x_rows + at, inside) - mean)
                total += u
            mean_dot = tl.sum(dot, axis=1, keep_dims=True) * rstd / width
            if CENTRED:
                mean_u = tl.sum(total, axis=1, keep_dims=True) / width
        for start in range(0, span, BLOCK):
            at = start + column
            inside = exists & (at < width)
            if not IS_WHOLE:
                g = gain(condition_ptr, weight_ptr, at, at < width, CONDITION, WEIGHTED)
            dy = wide(dy_rows + at, inside)
            n = (wide(x_rows + at, inside) - mean) * rstd
            dx = dy * g
            if CENTRED:
                dx -= mean_u
            if NORMED:
                dx = rstd * (dx - n * mean_dot)
            tl.store(dx_rows + at, rounded(dx, dx_ptr), mask=inside)
            if IS_WHOLE:
                scaled += dy * n
                plain += dy
    if SCALED or PLAIN:
        for start in range(0, span, BLOCK):
            at = start + tl.arange(0, BLOCK)
            if not IS_WHOLE:  # the run's rows again, one column after the other
                scaled = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
                plain = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
                for token in range(first, last, ROWS):
                    row = _rows(token, ROWS)
                    exists = row < last
                    row += sample * tokens
                    inside = exists & (at[None, :] < width)
                    rstd, mean = _standard(saved_ptr, row, rows, exists, NORMED, CENTRED)
                    dy = wide(dy_ptr + row * width + at[None, :], inside)
                    scaled += dy * ((wide(x_ptr + row * stride + at[None, :], inside) - mean) * rstd)
                    plain += dy
            if SCALED:
                tl.store(partial_ptr + at, tl.sum(scaled, axis=0), mask=at < width)
            if PLAIN:
                tl.store(partial_ptr + width + at, tl.sum(plain, axis=0), mask=at < width)


def tile(width: int) -> dict[str, int]:
    """The constants of a kernel whose programs hold rows of `width` columns."""
    block = triton.next_power_of_2(width) if width <= WHOLE else PART
    rows = max(1, 1024 // block)
    return {
        "ROWS": rows,
        "BLOCK": block,
        "IS_WHOLE": width <= block,
        "num_warps": min(max(rows * block // 256, 4), 16),
    }


def partials(x: Tensor, batch: int, tokens: int, wanted: bool) -> Tensor:
    """Room for the partial sums [batch, runs, 2, width]: a sample's rows are cut into runs, by shape alone.

    Without sums wanted nothing ties rows together, and every program takes one tile of them.
    """
    width = x.shape[-1]
    rows = tile(width)["ROWS"]
    if not wanted:
        return torch.empty(batch, triton.cdiv(tokens, rows), 2, 0, device=x.device)
    runs = max(1, min(tokens // max(4, rows), PROGRAMS // batch))
    return torch.empty(batch, runs, 2, width, dtype=torch.float32, device=x.device)
