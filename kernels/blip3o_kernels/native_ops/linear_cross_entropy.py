"""Calls csrc/cpu/linear_cross_entropy.cpp between the products of logits.py; the contract is
ops/linear_cross_entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import logits, native
from ..dispatch import instruction_set
from ..native import DTYPES

_PACK, _CPU = native.packer("linear_cross_entropy"), native.function("cpu", "linear_cross_entropy")


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    autocast: torch.dtype | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of x [N, D] and the gradients that are wanted, all float32; target [N] int64."""
    rows = x.shape[0]
    loss, losses = torch.empty((), dtype=torch.float32), torch.empty(rows, dtype=torch.float64)
    if rows == 0:
        loss.zero_()

    def kernel(chunk: Tensor, dlogits: Tensor | None, start: int) -> None:
        status = _CPU(
            _PACK(
                chunk.data_ptr(),
                losses.data_ptr(),
                loss.data_ptr(),
                target.data_ptr(),
                rows,
                start,
                *chunk.shape,
                ignore_index,
                label_smoothing,
                z_loss,
                softcap,
                DTYPES[chunk.dtype],
                dlogits is not None,
                instruction_set(),
                torch.get_num_threads(),
                0,
            )
        )
        if status:
            logits.check_target(target, chunk.shape[1], ignore_index)  # the most likely reason
            raise native.failed("linear_cross_entropy", status)

    return loss, *logits.gradients(kernel, x, weight, autocast, want_x, want_weight, split=False)
