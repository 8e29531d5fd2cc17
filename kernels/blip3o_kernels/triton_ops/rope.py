"""Rotary position embedding in Triton; the contract is ops/rope.py.

One program turns all heads of a few tokens, so that their angles are loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rotation import load_pairs, pairs, store_pairs, table, tile, tokens_at, turned

ELEMENTS = 4096  # of a tile: 4 warps with 32 floats a thread


@triton.jit
def _kernel(
    y_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    tokens,
    table_stride,
    y_batch,
    y_head,
    y_token,
    x_batch,
    x_head,
    x_token,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIAL: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    sample, token, cos, sin = tokens_at(
        tl.program_id(0), tokens, HALF, table_stride, cos_ptr, sin_ptr, INVERSE, TOKENS, PAIRS
    )
    y_ptr += sample * y_batch
    x_ptr += sample * x_batch
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        inside = (token < tokens) & (head < heads)
        rows = head * x_head + token * x_token
        first, second = load_pairs(x_ptr, rows, inside, HALF, REST, HEAD_DIM, INTERLEAVED, PARTIAL, PAIRS)
        first, second = turned(first, second, cos, sin, HALF, PARTIAL, PAIRS)
        rows = head * y_head + token * y_token
        store_pairs(y_ptr, rows, inside, first, second, HALF, REST, HEAD_DIM, INTERLEAVED, PARTIAL, PAIRS)


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(x, cos, sin, interleaved, False)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate(dy, cos, sin, interleaved, True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    y = torch.empty_like(x)  # dense, in x's order
    if not x.numel():
        return y
    batch, heads, tokens, head_dim = x.shape
    cos, sin, table_stride = table(cos, sin, tokens)
    half = cos.shape[-1]
    rest, width = pairs(head_dim, half)
    block_tokens, block_heads = tile(heads, tokens, width, ELEMENTS)
    with torch.cuda.device_of(x):
        _kernel[(batch * triton.cdiv(tokens, block_tokens),)](
            y,
            x,
            cos,
            sin,
            heads,
            tokens,
            table_stride,
            *y.stride()[:3],
            *x.stride()[:3],
            HEAD_DIM=head_dim,
            HALF=half,  # a constant: the compiler sees that 40 pairs too are whole vectors of 16 bytes
            REST=rest,
            INVERSE=inverse,
            INTERLEAVED=interleaved,
            PARTIAL=2 * half < head_dim,
            TOKENS=block_tokens,
            HEADS=block_heads,
            PAIRS=width,
            num_warps=min(max(block_tokens * block_heads * width // 512, 1), 4),
        )
    return y
