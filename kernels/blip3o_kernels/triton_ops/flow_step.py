"""Guidance and one step of the ODE solver in Triton; the contract is ops/flow_step.py.

A program handles a chunk of one sample; without a step of each sample's own, all of x is one sample. Where the steps'
gradient is wanted, a program handles a run of chunks and sums; a second kernel adds up: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import cut, sums_each
from .numbers import rounded, wide
from .sums import add_up_rows


@triton.jit
def _velocity(
    velocity_ptr,
    unconditional_ptr,
    previous_ptr,
    inside,
    guidance,
    GUIDED: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    v = wide(velocity_ptr, inside)
    if GUIDED:
        base = wide(unconditional_ptr, inside)
        v = base + guidance * (v - base)
    if AVERAGED:
        v = (v + wide(previous_ptr, inside)) * 0.5
    return v


@triton.jit
def _forward_kernel(
    y_ptr,
    x_ptr,
    velocity_ptr,
    unconditional_ptr,
    previous_ptr,
    steps_ptr,
    elements,
    each,
    step,
    guidance,
    GUIDED: tl.constexpr,
    AVERAGED: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) // each
    columns = (tl.program_id(0).to(tl.int64) % each) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < elements
    at = sample * elements + columns
    x = wide(x_ptr + at, inside)
    v = _velocity(velocity_ptr + at, unconditional_ptr + at, previous_ptr + at, inside, guidance, GUIDED, AVERAGED)
    if STEPS:
        step = tl.load(steps_ptr + sample)
    tl.store(y_ptr + at, rounded(x + step * v, y_ptr), mask=inside)


@triton.jit
def _backward_kernel(
    dvelocity_ptr,
    dunconditional_ptr,
    dprevious_ptr,
    sums_ptr,
    dy_ptr,
    velocity_ptr,
    unconditional_ptr,
    previous_ptr,
    steps_ptr,
    elements,
    each,
    step,
    guidance,
    GUIDED: tl.constexpr,
    AVERAGED: tl.constexpr,
    STEPS: tl.constexpr,
    TO_VELOCITY: tl.constexpr,
    TO_STEPS: tl.constexpr,
    TO_UNCONDITIONAL: tl.constexpr,
    TO_PREVIOUS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) // each
    run = tl.program_id(0).to(tl.int64) % each
    if STEPS:
        step = tl.load(steps_ptr + sample)
    if AVERAGED:
        step *= 0.5
    sums = tl.zeros([CHUNK], dtype=tl.float32)
    for first in range(run * CHUNK, elements, each * CHUNK):
        columns = first + tl.arange(0, CHUNK)
        inside = columns < elements
        at = sample * elements + columns
        dy = wide(dy_ptr + at, inside)
        if TO_STEPS:
            sums += dy * _velocity(
                velocity_ptr + at, unconditional_ptr + at, previous_ptr + at, inside, guidance, GUIDED, AVERAGED
            )
        dv = dy * step
        if TO_UNCONDITIONAL:
            tl.store(dunconditional_ptr + at, rounded(dv * (1.0 - guidance), dunconditional_ptr), mask=inside)
        if TO_PREVIOUS:
            tl.store(dprevious_ptr + at, rounded(dv, dprevious_ptr), mask=inside)
        if TO_VELOCITY:
            if GUIDED:
                dv *= guidance
            tl.store(dvelocity_ptr + at, rounded(dv, dvelocity_ptr), mask=inside)
    if TO_STEPS:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, axis=0))


def forward(
    x: Tensor,
    velocity: Tensor,
    steps: Tensor | None,
    step: float,
    unconditional: Tensor | None,
    guidance: float,
    previous: Tensor | None,
) -> Tensor:
    y = x.new_empty(x.shape)
    samples = 1 if steps is None else x.shape[0]
    if not x.numel():
        return y
    elements = x.numel() // samples
    each, chunk, warps = cut(elements)
    with torch.cuda.device_of(x):
        _forward_kernel[(samples * each,)](
            y,
            x.contiguous(),
            velocity.contiguous(),
            x if unconditional is None else unconditional.contiguous(),
            x if previous is None else previous.contiguous(),
            x if steps is None else steps.contiguous(),
            elements,
            each,
            step,
            guidance,
            GUIDED=unconditional is not None,
            AVERAGED=previous is not None,
            STEPS=steps is not None,
            CHUNK=chunk,
            num_warps=warps,
        )
    return y


def backward(
    dy: Tensor,
    velocity: Tensor,
    steps: Tensor | None,
    step: float,
    unconditional: Tensor | None,
    guidance: float,
    previous: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dvelocity, dunconditional, dprevious = (dy.new_empty(dy.shape if wanted[i] else 0) for i in (0, 2, 3))
    samples = 1 if steps is None else dy.shape[0]
    dsteps = torch.zeros(samples if wanted[1] else 0, dtype=torch.float32, device=dy.device)
    if not dy.numel():
        return dvelocity, dsteps, dunconditional, dprevious
    elements = dy.numel() // samples
    each, chunk, warps = cut(elements)
    if wanted[1]:
        each = sums_each(samples, each)
    sums = torch.empty(samples if wanted[1] else 0, each, dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        _backward_kernel[(samples * each,)](
            dvelocity,
            dunconditional,
            dprevious,
            sums,
            dy.contiguous(),
            velocity.contiguous(),
            dy if unconditional is None else unconditional.contiguous(),
            dy if previous is None else previous.contiguous(),
            dy if steps is None else steps.contiguous(),
            elements,
            each,
            step,
            guidance,
            GUIDED=unconditional is not None,
            AVERAGED=previous is not None,
            STEPS=steps is not None,
            TO_VELOCITY=wanted[0],
            TO_STEPS=wanted[1],
            TO_UNCONDITIONAL=wanted[2],
            TO_PREVIOUS=wanted[3],
            CHUNK=chunk,
            num_warps=warps,
        )
    if wanted[1]:
        add_up_rows(sums, dsteps)
    return dvelocity, dsteps, dunconditional, dprevious
