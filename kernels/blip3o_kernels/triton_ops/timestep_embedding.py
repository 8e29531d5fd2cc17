"""Sinusoids of the diffusion time in Triton; the contract is ops/timestep_embedding.py.

Angles are float64: at 1000 rad the last place of float32 is 6e-5, which is what the sinusoids would be wrong by. The
rate of the frequencies is a constant of the kernel, because an argument would arrive as float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def _sine_cosine(v):
    """Of float64 v, to 1e-10 for |v| up to 1e8; tl.sin would bring the library's branch for 1e300 along."""
    quarter = tl.floor(v * 0.63661977236758134308 + 0.5)
    r = v - quarter * 1.57079632679489661923
    z = r * r
    s = ((((z * (-1 / 39916800) + 1 / 362880) * z - 1 / 5040) * z + 1 / 120) * z - 1 / 6) * (z * r) + r
    c = ((((z * (-1 / 3628800) + 1 / 40320) * z - 1 / 720) * z + 1 / 24) * z - 0.5) * z + 1.0
    turn = quarter.to(tl.int64) & 3
    odd = (turn & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where(turn >= 2, -sine, sine), tl.where((turn == 1) | (turn == 2), -cosine, cosine)


@triton.jit
def _frequency(columns, RATE: tl.constexpr):
    return tl.exp(columns.to(tl.float64) * RATE)


@triton.jit
def _forward_kernel(y_ptr, timestep_ptr, half, RATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < half
    angle = tl.load(timestep_ptr + row).to(tl.float64) * _frequency(columns, RATE)
    sine, cosine = _sine_cosine(angle)
    y_ptr += row * half * 2 + columns
    tl.store(y_ptr, cosine.to(tl.float32), mask=inside)
    tl.store(y_ptr + half, sine.to(tl.float32), mask=inside)


@triton.jit
def _backward_kernel(dtimestep_ptr, dy_ptr, timestep_ptr, half, RATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    timestep = tl.load(timestep_ptr + row).to(tl.float64)
    dy_ptr += row * half * 2
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, half, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < half
        frequency = _frequency(columns, RATE)
        sine, cosine = _sine_cosine(timestep * frequency)
        dcosine = tl.load(dy_ptr + columns, mask=inside, other=0.0)
        dsine = tl.load(dy_ptr + half + columns, mask=inside, other=0.0)
        sums += (dsine * cosine - dcosine * sine) * frequency
    tl.store(dtimestep_ptr + row, tl.sum(sums, axis=0).to(tl.float32))


def launch(half: int, max_period: float) -> tuple[int, dict[str, float | int]]:
    """Blocks of columns, and the constants of both kernels."""
    block = min(triton.next_power_of_2(half), BLOCK)
    rate = -math.log(max_period) / half
    return triton.cdiv(half, block), {"RATE": rate, "BLOCK": block, "num_warps": max(block // 128, 1)}


def forward(timestep: Tensor, dim: int, max_period: float) -> Tensor:
    y = timestep.new_empty(len(timestep), dim)
    blocks, constants = launch(dim // 2, max_period)
    if len(timestep):
        with torch.cuda.device_of(timestep):
            _forward_kernel[(len(timestep), blocks)](y, timestep.contiguous(), dim // 2, **constants)
    return y


def backward(dy: Tensor, timestep: Tensor, max_period: float) -> Tensor:
    dtimestep = timestep.new_empty(timestep.shape)
    half = dy.shape[1] // 2
    _, constants = launch(half, max_period)
    if len(timestep):
        with torch.cuda.device_of(dy):
            _backward_kernel[(len(timestep),)](dtimestep, dy.contiguous(), timestep.contiguous(), half, **constants)
    return dtimestep
