"""Noise levels in Triton; the contract is ops/flow_timesteps.py. One lane draws for one sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox

BLOCK = 128


@triton.jit(do_not_specialize=["seed", "draw"])
def _kernel(
    sigma_ptr,
    positions_ptr,
    samples,
    seed,
    mean,
    std,
    shift,
    draw,
    LOGIT_NORMAL: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < samples
    position = tl.load(positions_ptr + sample, mask=inside, other=0)
    word0, word1, _, _ = philox.words(sample * 0, position, seed, draw, philox.TIMESTEPS)
    if LOGIT_NORMAL:
        normal, _ = philox.normals(word0, word1)
        sigma = tl.div_rn(1.0, 1.0 + tl.exp(-(mean + std * normal)))
    else:
        sigma = philox.uniform(word0)
    if SHIFTED:
        sigma = tl.div_rn(shift * sigma, 1.0 + (shift - 1.0) * sigma)
    tl.store(sigma_ptr + sample, sigma, mask=inside)


def forward(
    positions: Tensor, seed: int, logit_normal: bool, mean: float, std: float, shift: float, draw: int
) -> Tensor:
    sigma = positions.new_empty(positions.shape, dtype=torch.float32)
    samples = len(positions)
    if not samples:
        return sigma
    with torch.cuda.device_of(positions):
        _kernel[(triton.cdiv(samples, BLOCK),)](
            sigma,
            positions.contiguous(),
            samples,
            seed,
            mean,
            std,
            shift,
            draw,
            LOGIT_NORMAL=logit_normal,
            SHIFTED=shift != 1.0,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return sigma
