"""Calls csrc/cpu/flow_interpolate.cpp; the contract is ops/flow_interpolate.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import instruction_set
from ..native import CHUNK, DTYPES

_PACK, _PACK_BACKWARD = native.packer("flow_interpolate"), native.packer("flow_interpolate_backward")
_CPU_FORWARD = native.function("cpu", "flow_interpolate")
_CPU_BACKWARD = native.function("cpu", "flow_interpolate_backward")


def forward(
    x: Tensor, noise: Tensor | None, sigma: Tensor, positions: Tensor | None, seed: int, draw: int
) -> tuple[Tensor, Tensor]:
    x, noise, sigma, positions = _contiguous(x, noise, sigma, positions)
    x_sigma, velocity = torch.empty_like(x), torch.empty_like(x)
    status = _CPU_FORWARD(
        _PACK(
            x_sigma.data_ptr(),
            velocity.data_ptr(),
            x.data_ptr(),
            0 if noise is None else noise.data_ptr(),
            sigma.data_ptr(),
            0 if positions is None else positions.data_ptr(),
            x.shape[0],
            x.shape[1:].numel(),
            seed,
            DTYPES[x.dtype],
            draw,
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_interpolate", status)
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
    dx = torch.empty_like(x)
    dnoise = torch.empty_like(x) if noise_wanted else x.new_empty(0)
    dsigma = torch.empty_like(sigma) if sigma_wanted else sigma.new_empty(0)
    samples, elements = x.shape[0], x.shape[1:].numel()
    sums = torch.empty(samples * -(-elements // CHUNK) if sigma_wanted else 0, dtype=torch.float64)
    status = _CPU_BACKWARD(
        _PACK_BACKWARD(
            dx.data_ptr(),
            dnoise.data_ptr(),
            dsigma.data_ptr(),
            sums.data_ptr(),
            dx_sigma.data_ptr(),
            dvelocity.data_ptr(),
            x.data_ptr(),
            0 if noise is None else noise.data_ptr(),
            sigma.data_ptr(),
            0 if positions is None else positions.data_ptr(),
            samples,
            elements,
            seed,
            DTYPES[x.dtype],
            draw,
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_interpolate", status)
    return dx, dnoise, dsigma


def _contiguous(
    x: Tensor, noise: Tensor | None, sigma: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    noise = None if noise is None else noise.contiguous()
    return x.contiguous(), noise, sigma.contiguous(), None if positions is None else positions.contiguous()
