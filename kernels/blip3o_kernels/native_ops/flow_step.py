"""Calls csrc/cpu/flow_step.cpp; the contract is ops/flow_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..memory import empty_like
from ..native import CHUNK, DTYPES
from ..strides import address, contiguous

_FORWARD, _BACKWARD = native.cpu_call("flow_step"), native.cpu_call("flow_step_backward")


def forward(
    x: Tensor,
    velocity: Tensor,
    steps: Tensor | None,
    step: float,
    unconditional: Tensor | None,
    guidance: float,
    previous: Tensor | None,
) -> Tensor:
    x, velocity, steps, unconditional, previous = _contiguous(x, velocity, steps, unconditional, previous)
    y = empty_like(x)
    samples = 1 if steps is None else x.shape[0]
    _FORWARD(
        y.data_ptr(),
        x.data_ptr(),
        velocity.data_ptr(),
        address(unconditional),
        address(previous),
        address(steps),
        samples,
        x.numel() // max(samples, 1),
        step,
        guidance,
        DTYPES[x.dtype],
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
    """The gradients of velocity, steps, unconditional and previous; an empty tensor where it is not wanted."""
    dy, velocity, steps, unconditional, previous = _contiguous(dy, velocity, steps, unconditional, previous)
    samples = 1 if steps is None else dy.shape[0]
    elements = dy.numel() // max(samples, 1)
    dvelocity, dunconditional, dprevious = (empty_like(dy) if wanted[i] else dy.new_empty(0) for i in (0, 2, 3))
    dsteps = dy.new_empty(samples if wanted[1] else 0, dtype=torch.float32)
    sums = torch.empty(samples * -(-elements // CHUNK) if wanted[1] else 0, dtype=torch.float64)
    _BACKWARD(
        dvelocity.data_ptr() if wanted[0] else 0,
        dunconditional.data_ptr() if wanted[2] else 0,
        dprevious.data_ptr() if wanted[3] else 0,
        dsteps.data_ptr() if wanted[1] else 0,
        sums.data_ptr(),
        dy.data_ptr(),
        velocity.data_ptr(),
        address(unconditional),
        address(previous),
        address(steps),
        samples,
        elements,
        step,
        guidance,
        DTYPES[dy.dtype],
    )
    return dvelocity, dsteps, dunconditional, dprevious


def _contiguous(x: Tensor, velocity: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    return (x.contiguous(), velocity.contiguous(), *(contiguous(other) for other in others))
