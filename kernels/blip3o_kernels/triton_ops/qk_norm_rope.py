"""Normalised and rotated queries and keys in Triton; the contract is ops/qk_norm_rope.py.

One launch does queries and keys: the first programs a few tokens' queries each, the others keys. The kernels are in
normed_rotation.py and normed_rotation_backward.py. The backward pass gives each program a run of tiles and partial
sums of its own: no atomics.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..ops.qk_norm_rope import gradients_like, readable
from ..strides import tokens_first
from .normed_rotation import forward_kernel
from .normed_rotation_backward import backward_kernel
from .rotation import pairs, table, tile
from .sums import add_up

ELEMENTS = 4096  # of a tile; backwards half as many, which share the registers with the sums
MAX_BLOCKS = 512


def _tile(x: Tensor, width: int, across_width: bool, elements: int) -> tuple[int, int, int]:
    """TOKENS and HEADS, and the number of such tiles in x [B, H, T, K]. Across the width a tile holds all heads."""
    batch, heads, tokens, _ = x.shape
    if across_width:
        block_tokens, block_heads = 1, triton.next_power_of_2(max(heads, 1))
    else:
        block_tokens, block_heads = tile(max(heads, 1), max(tokens, 1), width, elements)
    return block_tokens, block_heads, batch * triton.cdiv(tokens, block_tokens) if heads else 0


def _common(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    centred: bool,
    across_width: bool,
    interleaved: bool,
    elements: int,
    pairs_of_thread: int,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int], tuple[float, ...], dict[str, int]]:
    """What both kernels are called with: the tables, the numbers of tiles, the last scalars, the constants."""
    _, _, tokens, head_dim = query.shape
    cos, sin, table_stride = table(cos, sin, tokens)
    half = cos.shape[-1]
    rest, width = pairs(head_dim, half)
    query_tokens, query_heads, query_tiles = _tile(query, width, across_width, elements)
    key_tokens, key_heads, key_tiles = _tile(key, width, across_width, elements)
    most = width * max(query_tokens * query_heads, key_tokens * key_heads)
    constants = {
        "QUERY_TOKENS": query_tokens,
        "QUERY_HEADS": query_heads,
        "KEY_TOKENS": key_tokens,
        "KEY_HEADS": key_heads,
        "CENTRED": centred,
        "WIDTH": across_width,
        "INTERLEAVED": interleaved,
        "PARTIAL": 2 * half < head_dim,
        "PAIRS": width,
        "num_warps": min(max(most // (32 * pairs_of_thread), 1), 16),
    }
    return (cos, sin), (query_tiles, key_tiles), (tokens, head_dim, half, rest, table_stride, eps), constants


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
    query, key = readable(query), readable(key)
    query_y, key_y = tokens_first(query), tokens_first(key)
    # 16 pairs a thread, so that a warp of 64 threads too loads 16 bytes of bfloat16 at a time.
    tables, (query_tiles, key_tiles), scalars, constants = _common(
        query, key, cos, sin, eps, centred, across_width, interleaved, ELEMENTS, 16
    )
    if not query_tiles + key_tiles:
        return query_y, key_y
    with torch.cuda.device_of(query):
        forward_kernel[(query_tiles + key_tiles,)](
            query_y,
            key_y,
            query,
            key,
            query_weight.contiguous(),
            key_weight.contiguous(),
            query_weight if query_bias is None else query_bias.contiguous(),
            key_weight if key_bias is None else key_bias.contiguous(),
            *tables,
            query_tiles,
            query.shape[1],
            *query.stride()[:3],
            key.shape[1],
            *key.stride()[:3],
            *scalars,
            QUERY_BIASED=query_bias is not None,
            KEY_BIASED=key_bias is not None,
            **constants,
        )
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
    query_dy, key_dy, query, key = (readable(x) for x in (query_dy, key_dy, query, key))
    gradients = gradients_like(query, key, (query_weight, key_weight, query_bias, key_bias), wanted)
    # The sums take registers, and a tile with all heads is large: fewer pairs a thread.
    tables, tiles, scalars, constants = _common(
        query, key, cos, sin, eps, centred, across_width, interleaved, ELEMENTS // 2, 4 if across_width else 8
    )
    query_blocks, key_blocks = (min(MAX_BLOCKS, (count + 3) // 4) for count in tiles)
    query_partial, key_partial = (  # sums of the weight's gradient, then of the bias's
        torch.empty(blocks, 2, len(weight), dtype=torch.float32, device=query.device)
        for blocks, weight in ((query_blocks, query_weight), (key_blocks, key_weight))
    )
    if query_blocks + key_blocks:
        with torch.cuda.device_of(query):
            backward_kernel[(query_blocks + key_blocks,)](
                gradients[0],
                gradients[1],
                query_partial,
                key_partial,
                query_dy,
                key_dy,
                query,
                key,
                query_weight.contiguous(),
                key_weight.contiguous(),
                *tables,
                query_blocks,
                key_blocks,
                query.shape[1],
                *query_dy.stride()[:3],
                *query.stride()[:3],
                key.shape[1],
                *key_dy.stride()[:3],
                *key.stride()[:3],
                query.shape[0],
                *scalars,
                WANTED=wanted,
                **constants,
            )
    dquery_weight, dkey_weight, dquery_bias, dkey_bias = gradients[2:]
    add_up(query_partial, dquery_weight, dquery_bias)
    add_up(key_partial, dkey_weight, dkey_bias)
    return tuple(gradients)
