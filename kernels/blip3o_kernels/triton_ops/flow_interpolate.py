"""The straight path and its velocity in Triton; the contract is ops/flow_interpolate.py.

One program does one block of one sample. Noise that is drawn stays in its registers. The gradient of sigma is a partial
sum of each block, added up in order by a second kernel: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .numbers import rounded, wide
from .sums import add_up_rows

BLOCK = 2048
LEAST = 64  # elements of the smallest block


@triton.jit
def _block(elements, blocks, BLOCK: tl.constexpr):
    """This program's sample, its elements counted within the sample and over all, and which of them there are."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    return sample, first, sample * elements + element, element < elements


@triton.jit(do_not_specialize=["seed", "draw"])
def _forward_kernel(
    x_sigma_ptr,
    velocity_ptr,
    x_ptr,
    noise_ptr,
    sigma_ptr,
    positions_ptr,
    elements,
    blocks,
    seed,
    draw,
    DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, first, offsets, inside = _block(elements, blocks, BLOCK)
    sigma = tl.load(sigma_ptr + sample)
    x = wide(x_ptr + offsets, inside)
    if DRAWN:
        noise = philox.noise(first, tl.load(positions_ptr + sample), seed, draw, BLOCK)
    else:
        noise = wide(noise_ptr + offsets, inside)
    x_sigma = (1.0 - sigma) * x + sigma * noise
    tl.store(x_sigma_ptr + offsets, rounded(x_sigma, x_sigma_ptr), mask=inside)
    tl.store(velocity_ptr + offsets, rounded(noise - x, velocity_ptr), mask=inside)


@triton.jit(do_not_specialize=["seed", "draw"])
def _backward_kernel(
    dx_ptr,
    dnoise_ptr,
    partial_ptr,
    dx_sigma_ptr,
    dvelocity_ptr,
    x_ptr,
    noise_ptr,
    sigma_ptr,
    positions_ptr,
    elements,
    blocks,
    seed,
    draw,
    DRAWN: tl.constexpr,
    NOISE_WANTED: tl.constexpr,
    SIGMA_WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, first, offsets, inside = _block(elements, blocks, BLOCK)
    sigma = tl.load(sigma_ptr + sample)
    dx_sigma = wide(dx_sigma_ptr + offsets, inside)
    dvelocity = wide(dvelocity_ptr + offsets, inside)
    tl.store(dx_ptr + offsets, rounded((1.0 - sigma) * dx_sigma - dvelocity, dx_ptr), mask=inside)
    if NOISE_WANTED:
        tl.store(dnoise_ptr + offsets, rounded(sigma * dx_sigma + dvelocity, dnoise_ptr), mask=inside)
    if SIGMA_WANTED:
        if DRAWN:
            noise = philox.noise(first, tl.load(positions_ptr + sample), seed, draw, BLOCK)
        else:
            noise = wide(noise_ptr + offsets, inside)
        x = wide(x_ptr + offsets, inside)
        terms = tl.reshape(dx_sigma * (noise - x), [BLOCK // 32, 32])  # 0 outside, where dx_sigma is
        tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(terms, axis=1), axis=0))


def tile(elements: int) -> tuple[int, int, int]:
    """BLOCK, how many blocks a sample has, and the number of warps."""
    block = max(LEAST, min(triton.next_power_of_2(elements), BLOCK))
    return block, triton.cdiv(elements, block), max(1, block // 512)


def forward(
    x: Tensor, noise: Tensor | None, sigma: Tensor, positions: Tensor | None, seed: int, draw: int
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    x_sigma, velocity = x.new_empty(x.shape), x.new_empty(x.shape)
    if not x.numel():
        return x_sigma, velocity
    elements = x.shape[1:].numel()
    block, blocks, warps = tile(elements)
    with torch.cuda.device_of(x):
        _forward_kernel[(x.shape[0] * blocks,)](
            x_sigma,
            velocity,
            x,
            x if noise is None else noise.contiguous(),
            sigma.contiguous(),
            sigma if positions is None else positions.contiguous(),
            elements,
            blocks,
            seed,
            draw,
            DRAWN=noise is None,
            BLOCK=block,
            num_warps=warps,
        )
    return x_sigma, velocity


def backward(
    dx_sigma: Tensor,
    dvelocity: Tensor,
    x: Tensor,
    noise: Tensor | None,
    sigma: Tensor,
    positions: Tensor | None,
    seed: int,
    draw: int,
    noise_wanted: bool,
    sigma_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dnoise and dsigma if they are wanted (otherwise empty tensors)."""
    dx = x.new_empty(x.shape)
    dnoise = x.new_empty(x.shape if noise_wanted else (0,))
    dsigma = sigma.new_zeros(sigma.shape if sigma_wanted else (0,))
    if not x.numel():
        return dx, dnoise, dsigma
    samples, elements = x.shape[0], x.shape[1:].numel()
    block, blocks, warps = tile(elements)
    partial = torch.empty(samples if sigma_wanted else 0, blocks, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(samples * blocks,)](
            dx,
            dnoise,
            partial,
            dx_sigma.contiguous(),
            dvelocity.contiguous(),
            x.contiguous(),
            x if noise is None else noise.contiguous(),
            sigma.contiguous(),
            sigma if positions is None else positions.contiguous(),
            elements,
            blocks,
            seed,
            draw,
            DRAWN=noise is None,
            NOISE_WANTED=noise_wanted,
            SIGMA_WANTED=sigma_wanted,
            BLOCK=block,
            num_warps=warps,
        )
    if sigma_wanted:
        add_up_rows(partial, dsigma)
    return dx, dnoise, dsigma
