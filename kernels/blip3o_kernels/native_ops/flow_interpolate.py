"""Calls csrc/cpu/flow_interpolate.cpp and csrc/cuda/flow_interpolate.cu; the contract is ops/flow_interpolate.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..memory import empty_like
from ..native import CHUNK, DTYPES
from ..strides import address, contiguous

_CPU, _CUDA = native.cpu_call("flow_interpolate"), native.cuda_call("flow_interpolate")
_CPU_BACKWARD = native.cpu_call("flow_interpolate_backward")
_CUDA_BACKWARD = native.cuda_call("flow_interpolate_backward")


def forward(
    x: Tensor, noise: Tensor | None, sigma: Tensor, positions: Tensor | None, seed: int, draw: int
) -> tuple[Tensor, Tensor]:
    x, noise, sigma, positions = _contiguous(x, noise, sigma, positions)
    x_sigma, velocity = empty_like(x), empty_like(x)
    arguments = (
        x_sigma.data_ptr(),
        velocity.data_ptr(),
        x.data_ptr(),
        address(noise),
        sigma.data_ptr(),
        address(positions),
        x.shape[0],
        x.shape[1:].numel(),
        seed,
        DTYPES[x.dtype],
        draw,
    )
    _CPU(*arguments) if x.is_cpu else _CUDA(x, *arguments)
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
    dx_sigma, dvelocity = dx_sigma.contiguous(), dvelocity.contiguous()
    x, noise, sigma, positions = _contiguous(x, noise, sigma, positions)
    dx = empty_like(x)
    dnoise = empty_like(x) if noise_wanted else x.new_empty(0)
    dsigma = torch.empty_like(sigma) if sigma_wanted else sigma.new_empty(0)
    samples, elements = x.shape[0], x.shape[1:].numel()
    sums = torch.empty(samples * -(-elements // CHUNK) if sigma_wanted else 0, dtype=torch.float64, device=x.device)
    arguments = (
        dx.data_ptr(),
        dnoise.data_ptr(),
        dsigma.data_ptr(),
        sums.data_ptr(),
        dx_sigma.data_ptr(),
        dvelocity.data_ptr(),
        x.data_ptr(),
        address(noise),
        sigma.data_ptr(),
        address(positions),
        samples,
        elements,
        seed,
        DTYPES[x.dtype],
        draw,
    )
    _CPU_BACKWARD(*arguments) if x.is_cpu else _CUDA_BACKWARD(x, *arguments)
    return dx, dnoise, dsigma


def _contiguous(
    x: Tensor, noise: Tensor | None, sigma: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    noise = contiguous(noise)
    return x.contiguous(), noise, sigma.contiguous(), contiguous(positions)
