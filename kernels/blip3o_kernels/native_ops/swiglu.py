"""Calls csrc/cpu/swiglu.cpp; the contract is ops/swiglu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import instruction_set
from ..native import DTYPES
from ..strides import rows

_PACK, _PACK_BACKWARD = native.packer("swiglu"), native.packer("swiglu_backward")
_CPU_FORWARD, _CPU_BACKWARD = native.function("cpu", "swiglu"), native.function("cpu", "swiglu_backward")


def _operands(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None, int, tuple[int, ...], tuple[int, ...]]:
    """gate and up as the library reads them (to be kept alive), their width, their addresses, their strides."""
    gate, gate_stride = rows(gate)
    if up is None:
        width = gate.shape[-1] // 2
        address = gate.data_ptr()
        return gate, None, width, (address, address + width * gate.element_size()), (gate_stride, gate_stride)
    up, up_stride = rows(up)
    return gate, up, gate.shape[-1], (gate.data_ptr(), up.data_ptr()), (gate_stride, up_stride)


def forward(gate: Tensor, up: Tensor | None) -> Tensor:
    dtype = DTYPES[gate.dtype]
    gate, up, width, addresses, strides = _operands(gate, up)
    y = gate.new_empty((*gate.shape[:-1], width) if up is None else gate.shape)
    count = y.numel() // width if width else 0
    status = _CPU_FORWARD(
        _PACK(y.data_ptr(), *addresses, count, width, *strides, dtype, instruction_set(), torch.get_num_threads(), 0)
    )
    if status:
        raise native.failed("swiglu", status)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """dgate and dup; without up the gradient of both and an empty tensor."""
    dtype = DTYPES[gate.dtype]
    gate, up, width, addresses, strides = _operands(gate, up)
    dy = dy.contiguous()
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0 if up is None else up.shape)
    second = dgate.data_ptr() + width * dgate.element_size() if up is None else dup.data_ptr()
    arguments = (
        dgate.data_ptr(),
        second,
        dy.data_ptr(),
        *addresses,
        dy.numel() // width if width else 0,
        width,
        *strides,
        2 * width if up is None else width,
        dtype,
    )
    status = _CPU_BACKWARD(_PACK_BACKWARD(*arguments, instruction_set(), torch.get_num_threads(), 0))
    if status:
        raise native.failed("swiglu", status)
    return dgate, dup
