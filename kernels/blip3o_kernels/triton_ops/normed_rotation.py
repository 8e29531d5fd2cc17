"""One side of qk_norm_rope, queries or keys: a tile of rows is normalised and rotated, and the other way round.

A tile is [TOKENS, HEADS, PAIRS] twice, as in rotation.py. Across the WIDTH it holds all heads of its tokens.
"""

import triton
import triton.language as tl

from .rotation import load_angles, load_pairs, pair_columns, store_pairs, turned


@triton.jit
def _total(x, WIDTH: tl.constexpr):
    """The sum over what a norm runs over: [TOKENS, HEADS, 1], across the width [TOKENS, 1, 1]."""
    total = tl.sum(x, axis=2, keep_dims=True)
    if WIDTH:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def _moments(first, second, has_first, has_second, count, eps, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    mean = 0.0
    if CENTRED:
        mean = _total(first + second, WIDTH) / count
        first = tl.where(has_first, first - mean, 0.0)
        second = tl.where(has_second, second - mean, 0.0)
    rstd = 1.0 / tl.sqrt(_total(first * first + second * second, WIDTH) / count + eps)
    return mean, rstd


@triton.jit
def forward_side(
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
    tiles = tl.cdiv(tokens, TOKENS)
    sample = (tile_number // tiles).to(tl.int64)
    token = (tile_number % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    angles = sample * table_stride + token * half
    cos, sin = load_angles(cos_ptr, sin_ptr, angles, token < tokens, half, False, PAIRS)
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
        mean, rstd = _moments(first, second, inside & has_first, inside & has_second, count, eps, CENTRED, WIDTH)
        if CENTRED:
            first -= mean
            second -= mean
        parameters = head * head_dim if WIDTH else tl.zeros([1, 1, 1], dtype=tl.int64)
        given = head < heads if WIDTH else tl.full([1, 1, 1], True, dtype=tl.int1)
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
def backward_side(
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
        sample = (i // tiles).to(tl.int64)
        token = (i % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
        angles = sample * table_stride + token * half
        cos, sin = load_angles(cos_ptr, sin_ptr, angles, token < tokens, half, True, PAIRS)
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
            parameters = head * head_dim if WIDTH else tl.zeros([1, 1, 1], dtype=tl.int64)
            given = head < heads if WIDTH else tl.full([1, 1, 1], True, dtype=tl.int1)
            gain_first, gain_second = load_pairs(
                weight_ptr, parameters, given, half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS
            )
            mean, rstd = _moments(first, second, inside & has_first, inside & has_second, count, eps, CENTRED, WIDTH)
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
            dot = _total(left * first + right * second, WIDTH)
            if CENTRED:
                total = _total(left + right, WIDTH)
                left -= total / count
                right -= total / count
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
        parameters = head * head_dim if WIDTH else tl.zeros([1, 1, 1], dtype=tl.int64)
        given = head < heads if WIDTH else tl.full([1, 1, 1], True, dtype=tl.int1)
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
