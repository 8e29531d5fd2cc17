"""Calls csrc/cpu/qk_norm_rope.cpp and csrc/cuda/qk_norm_rope.cu; the contract is ops/qk_norm_rope.py."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import memory, native
from ..dispatch import instruction_set
from ..native import DTYPES
from ..ops.qk_norm_rope import gradients_like, readable
from ..strides import wide

_PACK, _CPU = native.packer("qk_norm_rope"), native.function("cpu", "qk_norm_rope")
_CUDA = native.cuda_call("qk_norm_rope")
_BACKWARD, _CUDA_BACKWARD = native.cpu_call("qk_norm_rope_backward"), native.cuda_call("qk_norm_rope_backward")
_ROWS, _CUDA_ROWS = 7, 2  # of a block's workspace, as csrc/blip3o.h says


def forward(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    centred: bool,
    across_width: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    # Written out where that is cheaper than a call: for a picture of few tokens the calls are the cost.
    batch, heads, tokens, head_dim = query.shape
    query_batch, query_head, query_token, query_adjacent = query.stride()
    key_batch, key_head, key_token, key_adjacent = key.stride()
    together = across_width and query.is_cpu
    if not query_adjacent == key_adjacent == 1 or (together and not query_head == key_head == head_dim):
        query, key = readable(query, together), readable(key, together)
        query_batch, query_head, query_token, _ = query.stride()
        key_batch, key_head, key_token, _ = key.stride()
    groups = key.shape[1]
    query_y, key_y = memory.tokens_first(query), memory.tokens_first(key)
    query_weight, key_weight = query_weight.contiguous(), key_weight.contiguous()
    query_offset = key_offset = 0
    if query_bias is not None:
        query_bias = query_bias.contiguous()
        query_offset = query_bias.data_ptr()
    if key_bias is not None:
        key_bias = key_bias.contiguous()
        key_offset = key_bias.data_ptr()
    if cos.dtype is not torch.float32 or not cos.is_contiguous():
        cos = wide(cos)
    if sin.dtype is not torch.float32 or not sin.is_contiguous():
        sin = wide(sin)
    half = cos.shape[-1]
    table = tokens * half if cos.dim() == 3 else 0
    if not query.is_cpu:
        _CUDA(
            query,
            *(t.data_ptr() for t in (query_y, key_y, query, key, query_weight, key_weight)),
            *(query_offset, key_offset, cos.data_ptr(), sin.data_ptr()),
            *(batch, heads, groups, tokens, head_dim, half, table),
            *(query_batch, query_head, query_token, key_batch, key_head, key_token),
            *(eps, DTYPES[query.dtype], DTYPES[query_weight.dtype], centred, across_width, interleaved),
        )
        return query_y, key_y
    # fmt: off
    status = _CPU(
        _PACK(
            query_y.data_ptr(), key_y.data_ptr(), query.data_ptr(), key.data_ptr(), query_weight.data_ptr(),
            key_weight.data_ptr(), query_offset, key_offset, cos.data_ptr(), sin.data_ptr(),
            batch, heads, groups, tokens, head_dim, half, table, query_batch, query_head, query_token,
            key_batch, key_head, key_token, eps, DTYPES[query.dtype], DTYPES[query_weight.dtype],
            centred, across_width, interleaved, instruction_set(), get_num_threads(), 0,
        )
    )
    # fmt: on
    if status:
        raise native.failed("qk_norm_rope", status)
    return query_y, key_y


def backward(
    query_dy: Tensor,
    key_dy: Tensor,
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    wanted: bool,
    eps: float,
    centred: bool,
    across_width: bool,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    gpu = native.on_gpu(query)
    query, key = readable(query, across_width and not gpu), readable(key, across_width and not gpu)
    query_dy, key_dy = readable(query_dy), readable(key_dy)
    gradients = gradients_like(
        query, key, (query_weight, key_weight, query_bias, key_bias), wanted, memory.tokens_first
    )
    query_weight, key_weight = query_weight.contiguous(), key_weight.contiguous()
    cos, sin = wide(cos), wide(sin)
    batch, heads, tokens, head_dim = query.shape
    # Sums over rows are cut by shape alone, so that threads do not change a bit.
    rows = batch * tokens * (1 if across_width else heads)
    span = head_dim * max(heads, key.shape[1]) if across_width else head_dim
    if gpu:  # as many blocks as 132 multiprocessors hold at once
        most = 528 if across_width and span * query.element_size() <= 4096 else 264
        blocks = max(2, min(rows // (4 if across_width else 64), most))
        workspace = torch.empty(blocks * _CUDA_ROWS * span, dtype=torch.float32, device=query.device)
    else:
        blocks = max(1, min(64, rows // 32))
        workspace = memory.scratch(blocks * _ROWS * span)
    arguments = (
        *(t.data_ptr() for t in gradients[:2]),
        *(t.data_ptr() if t.numel() else 0 for t in gradients[2:]),
        workspace.data_ptr(),
        *(t.data_ptr() for t in (query_dy, key_dy, query, key, query_weight, key_weight, cos, sin)),
        *_sizes(query, key, cos),
        blocks,
        *query.stride()[:3],
        *key.stride()[:3],
        *query_dy.stride()[:3],
        *key_dy.stride()[:3],
        eps,
        DTYPES[query.dtype],
        DTYPES[query_weight.dtype],
        centred,
        across_width,
        interleaved,
    )
    _CUDA_BACKWARD(query, *arguments) if gpu else _BACKWARD(*arguments)
    return tuple(gradients)


def _sizes(query: Tensor, key: Tensor, cos: Tensor) -> tuple[int, ...]:
    batch, heads, tokens, head_dim = query.shape
    half = cos.shape[-1]
    return batch, heads, key.shape[1], tokens, head_dim, half, tokens * half if cos.dim() == 3 else 0
