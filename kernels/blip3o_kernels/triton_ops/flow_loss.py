"""The weighted mean squared error in Triton; the contract is ops/flow_loss.py.

A program sums a run of chunks of one sample; one program then adds the sums up in order: no atomics, no errors stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import cut, sample_sums, sums_each, tile
from .numbers import rounded, wide


@triton.jit
def _forward_kernel(sums_ptr, prediction_ptr, target_ptr, elements, each, CHUNK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) // each
    run = tl.program_id(0).to(tl.int64) % each
    squares = tl.zeros([CHUNK], dtype=tl.float32)
    for first in range(run * CHUNK, elements, each * CHUNK):
        columns = first + tl.arange(0, CHUNK)
        inside = columns < elements
        at = sample * elements + columns
        error = wide(prediction_ptr + at, inside) - wide(target_ptr + at, inside)
        squares += error * error
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def _total_kernel(
    loss_ptr,
    means_ptr,
    sums_ptr,
    weight_ptr,
    samples,
    elements,
    each,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    total = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, samples, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < samples
        means = sample_sums(sums_ptr, samples, each, first, ROWS, COLUMNS) / elements
        tl.store(means_ptr + rows, means, mask=inside)
        if WEIGHTED:
            means *= tl.load(weight_ptr + rows, mask=inside, other=0.0)
        total += means
    tl.store(loss_ptr, tl.sum(total, axis=0) / samples)


@triton.jit
def _backward_kernel(
    dprediction_ptr,
    dloss_ptr,
    prediction_ptr,
    target_ptr,
    weight_ptr,
    samples,
    elements,
    each,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) // each
    columns = (tl.program_id(0).to(tl.int64) % each) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < elements
    at = sample * elements + columns
    slope = tl.load(dloss_ptr) * 2.0 / samples / elements
    if WEIGHTED:
        slope *= tl.load(weight_ptr + sample)
    error = wide(prediction_ptr + at, inside) - wide(target_ptr + at, inside)
    tl.store(dprediction_ptr + at, rounded(slope * error, dprediction_ptr), mask=inside)


def forward(prediction: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    samples, elements = prediction.shape[0], prediction.shape[1:].numel()
    each, chunk, warps = cut(elements)
    each = sums_each(samples, each)
    rows, columns = tile(samples, each)
    loss = prediction.new_empty((), dtype=torch.float32)
    means = prediction.new_empty(samples, dtype=torch.float32)
    sums = prediction.new_empty(samples * each, dtype=torch.float32)
    with torch.cuda.device_of(prediction):
        _forward_kernel[(samples * each,)](
            sums, prediction.contiguous(), target.contiguous(), elements, each, CHUNK=chunk, num_warps=warps
        )
        _total_kernel[(1,)](
            loss,
            means,
            sums,
            sums if weight is None else weight.contiguous(),
            samples,
            elements,
            each,
            WEIGHTED=weight is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return loss, means


def backward(
    dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, to_target: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of prediction and, if it is wanted, of target (otherwise an empty tensor)."""
    dprediction = prediction.new_empty(prediction.shape)
    samples, elements = prediction.shape[0], prediction.shape[1:].numel()
    each, chunk, warps = cut(elements)
    with torch.cuda.device_of(prediction):
        _backward_kernel[(samples * each,)](
            dprediction,
            dloss,
            prediction.contiguous(),
            target.contiguous(),
            dloss if weight is None else weight.contiguous(),
            samples,
            elements,
            each,
            WEIGHTED=weight is not None,
            CHUNK=chunk,
            num_warps=warps,
        )
    return dprediction, -dprediction if to_target else prediction.new_empty(0)
