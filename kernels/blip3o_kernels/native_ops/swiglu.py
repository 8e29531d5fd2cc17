"""Calls csrc/cpu/swiglu.cpp and csrc/cuda/swiglu.cu; the contract is ops/swiglu.py."""

from __future__ import annotations

from torch import Tensor, get_num_threads

from .. import native
from ..dispatch import instruction_set
from ..memory import LARGE, empty, empty_like
from ..native import DTYPES
from ..strides import rows

_PACK, _CPU = native.packer("swiglu"), native.function("cpu", "swiglu")
_CUDA = native.cuda_call("swiglu")
_BACKWARD, _CUDA_BACKWARD = native.cpu_call("swiglu_backward"), native.cuda_call("swiglu_backward")


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
    dtype = gate.dtype
    if not gate.is_cpu:
        gate, up, width, addresses, strides = _operands(gate, up)
        y = gate.new_empty(*gate.shape[:-1], width)
        _CUDA(gate, y.data_ptr(), *addresses, y.numel() // max(1, width), width, *strides, DTYPES[dtype])
        return y
    if up is None and gate.is_contiguous():  # written out, as for one token the calls are the cost
        *outer, stride = gate.shape
        width, up_stride, first = stride // 2, stride, gate.data_ptr()
        second = first + width * dtype.itemsize
        y = gate.new_empty(*outer, width) if gate.nbytes < 2 * LARGE else empty((*outer, width), dtype)
    else:
        gate, up, width, (first, second), (stride, up_stride) = _operands(gate, up)
        y = empty((*gate.shape[:-1], width), dtype) if up is None else empty_like(gate)
    count = y.numel() // width if width else 0
    code = DTYPES[dtype]
    status = _CPU(
        _PACK(
            y.data_ptr(), first, second, count, width, stride, up_stride, code, instruction_set(), get_num_threads(), 0
        )
    )
    if status:
        raise native.failed("swiglu", status)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """dgate and dup; without up the gradient of both and an empty tensor."""
    dtype = DTYPES[gate.dtype]
    gate, up, width, addresses, strides = _operands(gate, up)
    dy = dy.contiguous()
    dgate = empty_like(gate)
    dup = gate.new_empty(0) if up is None else empty_like(up)
    second = dgate.data_ptr() + width * dgate.element_size() if up is None else dup.data_ptr()
    sizes = (dy.numel() // max(1, width), width, *strides, 2 * width if up is None else width)
    arguments = (dgate.data_ptr(), second, dy.data_ptr(), *addresses, *sizes, dtype)
    _BACKWARD(*arguments) if gate.is_cpu else _CUDA_BACKWARD(gate, *arguments)
    return dgate, dup
