"""The backward kernel of qk_norm_rope: gradients turn back, then go through the norm; see normed_rotation.py."""

import triton
import triton.language as tl

from .normed_rotation import moments, parameter_rows, total
from .rotation import load_pairs, pair_columns, store_pairs, tokens_at, turned


@triton.jit
def _backward_side(
    block,
    blocks,
    dx_ptr,
    partial_ptr,
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    dy_batch,
    dy_head,
    dy_token,
    x_batch,
    x_head,
    x_token,
    batch,
    tokens,
    head_dim,
    half,
    rest,
    table_stride,
    eps,
    WANTED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, TOKENS)
    count = heads * head_dim if WIDTH else head_dim
    block = block.to(tl.int64)
    partial_ptr += block * 2 * count
    _, _, has_first, has_second = pair_columns(half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS)
    # dweight, then dbias; the first dims of the pairs, then the second.
    scaled_first = tl.zeros([TOKENS, HEADS, PAIRS], dtype=tl.float32)
    scaled_second = tl.zeros([TOKENS, HEADS, PAIRS], dtype=tl.float32)
    plain_first = tl.zeros([TOKENS, HEADS, PAIRS], dtype=tl.float32)
    plain_second = tl.zeros([TOKENS, HEADS, PAIRS], dtype=tl.float32)
    for i in range(batch * tiles * block // blocks, batch * tiles * (block + 1) // blocks):
        sample, token, cos, sin = tokens_at(i, tokens, half, table_stride, cos_ptr, sin_ptr, True, TOKENS, PAIRS)
        x_rows = sample * x_batch + token * x_token
        dy_rows = sample * dy_batch + token * dy_token
        dx_rows = (sample * tokens + token) * heads * head_dim
        for start in range(0, HEADS if WIDTH else heads, HEADS):
            head = (start + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
            inside = (token < tokens) & (head < heads)
            first, second = load_pairs(
                x_ptr, x_rows + head * x_head, inside, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS
            )
            left, right = load_pairs(
                dy_ptr, dy_rows + head * dy_head, inside, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS
            )
            left, right = turned(left, right, cos, sin, half, PARTIAL, PAIRS)
            parameters, given = parameter_rows(head, heads, head_dim, WIDTH)
            gain_first, gain_second = load_pairs(
                weight_ptr, parameters, given, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS
            )
            mean, rstd = moments(first, second, inside & has_first, inside & has_second, count, eps, CENTRED, WIDTH)
            kept = tl.where(inside, rstd, 0.0)  # outside, 0 * rstd may be NaN where eps is 0
            if CENTRED:
                first -= mean
                second -= mean
            first *= kept
            second *= kept
            if WANTED:
                scaled_first += left * first
                scaled_second += right * second
                plain_first += left
                plain_second += right
            left *= gain_first
            right *= gain_second
            dot = total(left * first + right * second, WIDTH)
            if CENTRED:
                shared = total(left + right, WIDTH) / count
                left -= shared
                right -= shared
            store_pairs(
                dx_ptr,
                dx_rows + head * head_dim,
                inside,
                rstd * (left - first * (dot / count)),
                rstd * (right - second * (dot / count)),
                half,
                rest,
                head_dim,
                INTERLEAVED,
                PARTIAL,
                PAIRS,
            )
    if WANTED:
        head = tl.arange(0, HEADS)[None, :, None]
        scaled_first = tl.sum(scaled_first, axis=0, keep_dims=True)
        scaled_second = tl.sum(scaled_second, axis=0, keep_dims=True)
        plain_first = tl.sum(plain_first, axis=0, keep_dims=True)
        plain_second = tl.sum(plain_second, axis=0, keep_dims=True)
        if not WIDTH:
            scaled_first = tl.sum(scaled_first, axis=1, keep_dims=True)
            scaled_second = tl.sum(scaled_second, axis=1, keep_dims=True)
            plain_first = tl.sum(plain_first, axis=1, keep_dims=True)
            plain_second = tl.sum(plain_second, axis=1, keep_dims=True)
        parameters, given = parameter_rows(head, heads, head_dim, WIDTH)
        store_pairs(
            partial_ptr,
            parameters,
            given,
            scaled_first,
            scaled_second,
            half,
            rest,
            head_dim,
            INTERLEAVED,
            PARTIAL,
            PAIRS,
        )
        store_pairs(
            partial_ptr + count,
            parameters,
            given,
            plain_first,
            plain_second,
            half,
            rest,
            head_dim,
            INTERLEAVED,
            PARTIAL,
            PAIRS,
        )


@triton.jit
def backward_kernel(
    dquery_ptr,
    dkey_ptr,
    query_partial_ptr,
    key_partial_ptr,
    query_dy_ptr,
    key_dy_ptr,
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    query_blocks,
    key_blocks,
    heads,
    query_dy_batch,
    query_dy_head,
    query_dy_token,
    query_batch,
    query_head,
    query_token,
    groups,
    key_dy_batch,
    key_dy_head,
    key_dy_token,
    key_batch,
    key_head,
    key_token,
    batch,
    tokens,
    head_dim,
    half,
    rest,
    table_stride,
    eps,
    WANTED: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_TOKENS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < query_blocks:
        _backward_side(
            program, query_blocks, dquery_ptr, query_partial_ptr, query_dy_ptr, query_ptr, query_weight_ptr, cos_ptr,
            sin_ptr, heads, query_dy_batch, query_dy_head, query_dy_token, query_batch, query_head, query_token,
            batch, tokens, head_dim, half, rest, table_stride, eps, WANTED, QUERY_TOKENS, QUERY_HEADS, CENTRED, WIDTH,
            INTERLEAVED, PARTIAL, PAIRS,
        )  # fmt: skip
    else:
        _backward_side(
            program - query_blocks, key_blocks, dkey_ptr, key_partial_ptr, key_dy_ptr, key_ptr, key_weight_ptr,
            cos_ptr, sin_ptr, groups, key_dy_batch, key_dy_head, key_dy_token, key_batch, key_head, key_token, batch,
            tokens, head_dim, half, rest, table_stride, eps, WANTED, KEY_TOKENS, KEY_HEADS, CENTRED, WIDTH,
            INTERLEAVED, PARTIAL, PAIRS,
        )  # fmt: skip
