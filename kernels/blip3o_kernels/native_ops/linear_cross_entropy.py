"""Calls csrc/cpu/linear_cross_entropy.cpp between the products of logits.py; the contract is
ops/linear_cross_entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import logits, native
from ..dispatch import INSTRUCTION_SETS, instruction_set
from ..memory import empty
from ..native import DTYPES

_PACK, _CPU = native.packer("linear_cross_entropy"), native.function("cpu", "linear_cross_entropy")
_PRODUCT = native.cpu_call("linear_cross_entropy_product")
_AMX = INSTRUCTION_SETS["amx"]
_BEST = INSTRUCTION_SETS[native.instruction_set()]


def _multiply(c: Tensor, a: Tensor, rest: Tensor | None, b: Tensor, add: bool) -> None:
    """c = (a + rest) b, or c += that if `add`: c float32 of contiguous rows, the others bfloat16, rest laid as a."""
    if rest is None and 1 not in a.stride():
        a = a.contiguous()
    if 1 not in b.stride():
        b = b.contiguous()
    (rows, depth), columns = a.shape, b.shape[1]
    a_turned, b_turned = a.stride(1) != 1, b.stride(0) != 1
    lines = -(-min(rows, 128) // 32) * 64 + -(-min(columns, 1024) // 32) * 32
    floats = lines * -(-min(depth, 512) // 32) * 16
    workspace = empty((torch.get_num_threads() * floats,), torch.float32)
    _PRODUCT(
        c.data_ptr(),
        a.data_ptr(),
        0 if rest is None else rest.data_ptr(),
        b.data_ptr(),
        workspace.data_ptr(),
        rows,
        columns,
        depth,
        c.stride(0),
        a.stride(0 if not a_turned else 1),
        b.stride(1 if not b_turned else 0),
        floats,
        a_turned,
        b_turned,
        add,
    )


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
        high, low, step = 0, 0, 0
        if dlogits is not None and dlogits is not chunk:
            step = dlogits.stride(0)
            high, low = dlogits.data_ptr(), dlogits[chunk.shape[0] :].data_ptr()
        status = _CPU(
            _PACK(
                chunk.data_ptr(),
                high,
                low,
                losses.data_ptr(),
                loss.data_ptr(),
                target.data_ptr(),
                rows,
                start,
                *chunk.shape,
                step,
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

    multiply = _multiply if (instruction_set() or _BEST) == _AMX else None
    return loss, *logits.gradients(kernel, x, weight, autocast, want_x, want_weight, split=False, multiply=multiply)
