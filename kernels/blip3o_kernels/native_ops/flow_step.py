"""Calls csrc/cpu/flow_step.cpp and csrc/cuda/flow_step.cu; the contract is ops/flow_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads

from .. import native
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like
from ..native import CHUNK, DTYPES
from ..strides import address, contiguous

_PACK, _CPU = native.packer("flow_step"), native.function("cpu", "flow_step")
_CUDA = native.cuda_call("flow_step")
_CPU_BACKWARD, _CUDA_BACKWARD = native.cpu_call("flow_step_backward"), native.cuda_call("flow_step_backward")


def forward(
    x: Tensor,
    velocity: Tensor,
    steps: Tensor | None,
    step: float,
    unconditional: Tensor | None,
    guidance: float,
    previous: Tensor | None,
) -> Tensor:
    x, velocity = x.contiguous(), velocity.contiguous()
    base = before = lengths = 0
    if unconditional is not None:
        unconditional = unconditional.contiguous()
        base = unconditional.data_ptr()
    if previous is not None:
        previous = previous.contiguous()
        before = previous.data_ptr()
    samples, elements = 1, x.numel()
    if steps is not None:
        steps = steps.contiguous()
        lengths, samples = steps.data_ptr(), x.shape[0]
        elements //= max(samples, 1)
    y = torch.empty_like(x) if x.nbytes < LARGE else empty_like(x)
    addresses = (y.data_ptr(), x.data_ptr(), velocity.data_ptr(), base, before, lengths)
    options = (samples, elements, step, guidance, DTYPES[x.dtype])
    if not x.is_cpu:
        _CUDA(x, *addresses, *options)
        return y
    status = _CPU(_PACK(*addresses, *options, instruction_set(), get_num_threads(), 0))
    if status:
        raise native.failed("flow_step", status)
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
    sums = dy.new_empty(samples * -(-elements // CHUNK) if wanted[1] else 0, dtype=torch.float64)
    arguments = (
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
    _CPU_BACKWARD(*arguments) if dy.is_cpu else _CUDA_BACKWARD(dy, *arguments)
    return dvelocity, dsteps, dunconditional, dprevious


def _contiguous(x: Tensor, velocity: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    return (x.contiguous(), velocity.contiguous(), *(contiguous(other) for other in others))
