"""The forward kernel of qk_norm_rope: a tile of queries, or of keys, is normalised and rotated.

A tile is [TOKENS, HEADS, PAIRS] twice, as in rotation.py. Across the WIDTH it holds all heads of its tokens.
"""

import triton
import triton.language as tl

from .rotation import load_pairs, pair_columns, store_pairs, tokens_at, turned


@triton.jit
def total(x, WIDTH: tl.constexpr):
    """The sum over what a norm runs over: [TOKENS, HEADS, 1], across the width [TOKENS, 1, 1]."""
    sums = tl.sum(x, axis=2, keep_dims=True)
    if WIDTH:
        sums = tl.sum(sums, axis=1, keep_dims=True)
    return sums


@triton.jit
def moments(first, second, has_first, has_second, count, eps, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    mean = 0.0
    if CENTRED:
        mean = total(first + second, WIDTH) / count
        first = tl.where(has_first, first - mean, 0.0)
        second = tl.where(has_second, second - mean, 0.0)
    rstd = 1.0 / tl.sqrt(total(first * first + second * second, WIDTH) / count + eps)
    return mean, rstd


@triton.jit
def parameter_rows(head, heads, head_dim, WIDTH: tl.constexpr):
    """Where the parameters of the heads [1, HEADS, 1] begin, and whether there are any. One row serves all heads, but
    across the width each has its own.
    """
    if WIDTH:
        return head * head_dim, head < heads
    else:
        return tl.zeros([1, 1, 1], dtype=tl.int64), tl.full([1, 1, 1], True, dtype=tl.int1)


@triton.jit
def _forward_side(
    tile_number,
    y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    x_batch,
    x_head,
    x_token,
    tokens,
    head_dim,
    half,
    rest,
    table_stride,
    eps,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    sample, token, cos, sin = tokens_at(tile_number, tokens, half, table_stride, cos_ptr, sin_ptr, False, TOKENS, PAIRS)
    _, _, has_first, has_second = pair_columns(half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS)
    x_rows = sample * x_batch + token * x_token
    y_rows = (sample * tokens + token) * heads * head_dim
    for start in range(0, HEADS if WIDTH else heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        inside = (token < tokens) & (head < heads)
        first, second = load_pairs(
            x_ptr, x_rows + head * x_head, inside, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS
        )
        count = heads * head_dim if WIDTH else head_dim
        mean, rstd = moments(first, second, inside & has_first, inside & has_second, count, eps, CENTRED, WIDTH)
        if CENTRED:
            first -= mean
            second -= mean
        parameters, given = parameter_rows(head, heads, head_dim, WIDTH)
        left, right = load_pairs(weight_ptr, parameters, given, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS)
        first = first * rstd * left
        second = second * rstd * right
        if BIASED:
            left, right = load_pairs(bias_ptr, parameters, given, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS)
            first += left
            second += right
        first, second = turned(first, second, cos, sin, half, PARTIAL, PAIRS)
        store_pairs(
            y_ptr,
            y_rows + head * head_dim,
            inside,
            first,
            second,
            half,
            rest,
            head_dim,
            INTERLEAVED,
            PARTIAL,
            PAIRS,
        )


@triton.jit
def forward_kernel(
    query_y_ptr,
    key_y_ptr,
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    query_bias_ptr,
    key_bias_ptr,
    cos_ptr,
    sin_ptr,
    query_tiles,
    heads,
    query_batch,
    query_head,
    query_token,
    groups,
    key_batch,
    key_head,
    key_token,
    tokens,
    head_dim,
    half,
    rest,
    table_stride,
    eps,
    QUERY_BIASED: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_BIASED: tl.constexpr,
    KEY_TOKENS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < query_tiles:
        _forward_side(
            program, query_y_ptr, query_ptr, query_weight_ptr, query_bias_ptr, cos_ptr, sin_ptr, heads, query_batch,
            query_head, query_token, tokens, head_dim, half, rest, table_stride, eps, QUERY_BIASED, QUERY_TOKENS,
            QUERY_HEADS, CENTRED, WIDTH, INTERLEAVED, PARTIAL, PAIRS,
        )  # fmt: skip
    else:
        _forward_side(
            program - query_tiles, key_y_ptr, key_ptr, key_weight_ptr, key_bias_ptr, cos_ptr, sin_ptr, groups,
            key_batch, key_head, key_token, tokens, head_dim, half, rest, table_stride, eps, KEY_BIASED, KEY_TOKENS,
            KEY_HEADS, CENTRED, WIDTH, INTERLEAVED, PARTIAL, PAIRS,
        )  # fmt: skip
