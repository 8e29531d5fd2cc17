"""Calls csrc/cpu/rope.cpp; the contract is ops/rope.py."""

from __future__ import annotations

from torch import Tensor

from .. import memory, native
from ..native import DTYPES
from ..strides import wide

_CPU = native.cpu_call("rope")


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(x, cos, sin, interleaved, False)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(dy, cos, sin, interleaved, True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    y = memory.empty_like(x)  # dense, in x's order
    batch, heads, tokens, head_dim = x.shape
    cos, sin = wide(cos), wide(sin)
    half = cos.shape[-1]
    _CPU(
        y.data_ptr(),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        batch,
        heads,
        tokens,
        head_dim,
        half,
        tokens * half if cos.dim() == 3 else 0,
        *y.stride()[:3],
        *x.stride()[:3],
        DTYPES[x.dtype],
        interleaved,
        inverse,
    )
    return y
