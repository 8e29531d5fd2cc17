"""Calls csrc/cpu/rope.cpp and csrc/cuda/rope.cu; the contract is ops/rope.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import native
from ..dispatch import instruction_set
from ..memory import LARGE, empty_like
from ..native import DTYPES
from ..strides import wide

_PACK, _CPU, _CUDA = native.packer("rope"), native.function("cpu", "rope"), native.cuda_call("rope")


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(x, cos, sin, interleaved, False)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(dy, cos, sin, interleaved, True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    # Written out, each number by its name: for one token calls and tuples are the cost.
    x_batch, x_head, x_token, adjacent = x.stride()
    if adjacent != 1:
        x = x.contiguous()
        x_batch, x_head, x_token, _ = x.stride()
    y = torch.empty_like(x) if x.nbytes < LARGE else empty_like(x)  # dense, in x's order
    y_batch, y_head, y_token, _ = y.stride()
    batch, heads, tokens, head_dim = x.shape
    if cos.dtype is not torch.float32 or not cos.is_contiguous():
        cos = wide(cos)
    if sin.dtype is not torch.float32 or not sin.is_contiguous():
        sin = wide(sin)
    half = cos.shape[-1]
    table = tokens * half if cos.dim() == 3 else 0
    addresses = (y.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    sizes = (batch, heads, tokens, head_dim, half, table, y_batch, y_head, y_token, x_batch, x_head, x_token)
    options = (DTYPES[x.dtype], interleaved, inverse)
    if not x.is_cpu:
        _CUDA(x, *addresses, *sizes, *options)
        return y
    status = _CPU(_PACK(*addresses, *sizes, *options, instruction_set(), get_num_threads(), 0))
    if status:
        raise native.failed("rope", status)
    return y
