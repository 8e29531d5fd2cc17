"""The gradient of the queries of attention, and delta; called by attention.py, the contract is ops/attention.py.

    p = exp(scores - log_sum), dp = dy . value, delta = dy . y
    ds = p (dp - delta), dquery = scale ds @ key

One program makes that of BLOCK_T queries of one head. Source: Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import log_sums, place, scored, sequence, span, tile
from .numbers import product, rounded, wide


@triton.jit
def delta_kernel(
    delta_ptr,
    dy_ptr,
    y_ptr,
    tokens,
    heads,
    tiles,
    dy_batch,
    dy_head,
    dy_token,
    y_batch,
    y_head,
    y_token,
    VALUE_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """delta [B, H, T] = dy . y."""
    number, head, batch = place(tl.program_id(0), tiles, heads, 1, False)
    t = number * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_V)
    mask = (t < tokens)[:, None] & (columns < VALUE_DIM)[None, :]
    dy_ptr += (batch * dy_batch + head * dy_head) * ALIGNED
    y_ptr += (batch * y_batch + head * y_head) * ALIGNED
    dy = wide(dy_ptr + (t.to(tl.int64) * dy_token * ALIGNED)[:, None] + columns[None, :], mask)
    y = wide(y_ptr + (t.to(tl.int64) * y_token * ALIGNED)[:, None] + columns[None, :], mask)
    tl.store(delta_ptr + (batch * heads + head) * tokens + t, tl.sum(dy * y, axis=1), mask=t < tokens)


@triton.jit
def _from_keys(
    dquery,
    query,
    dy,
    log_sum,
    delta,
    t,
    start,
    stop,
    all_start,
    all_stop,
    gap,
    key_ptr,
    value_ptr,
    mask_ptr,
    tokens,
    keys,
    key_token,
    value_token,
    mask_token,
    mask_key,
    scale,
    cap,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add what keys give to dquery [T, K]. BOUNDED: those that only some rows see, otherwise those that all do."""
    rows = tl.arange(0, BLOCK_S)
    factor = 1.0 if CAPPED or MASK == 2 else scale
    for step in range(start if BOUNDED else all_start, stop - gap if BOUNDED else all_stop, BLOCK_S):
        first = step + tl.where(step < all_start, 0, gap) if BOUNDED else step
        key = tile(key_ptr, first, rows, key_token, keys, HEAD_DIM, BLOCK_K, BOUNDED)
        products = product(query, tl.trans(key), tl.zeros([query.shape[0], BLOCK_S], tl.float32))
        scores, bend = scored(
            products, t[:, None], (first + rows)[None, :], tokens, keys, scale, cap, left, right,
            mask_ptr, mask_token, mask_key, MASK, CAPPED, LEFT, RIGHT, BOUNDED,
        )  # fmt: skip
        probabilities = tl.exp2(scores * factor - log_sum[:, None])
        value = tile(value_ptr, first, rows, value_token, keys, VALUE_DIM, BLOCK_V, BOUNDED)
        dprobabilities = product(dy, tl.trans(value), tl.zeros([query.shape[0], BLOCK_S], tl.float32))
        dscores = probabilities * (dprobabilities - delta[:, None])
        if CAPPED:
            dscores *= bend
        dquery = product(rounded(dscores, key_ptr), key, dquery)
    return dquery


@triton.jit
def query_kernel(
    dquery_ptr,
    dy_ptr,
    log_sum_ptr,
    delta_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    queries_ptr,
    keys_ptr,
    sequences,
    tokens,
    keys,
    heads,
    share,
    tiles,
    dquery_batch,
    dquery_head,
    dquery_token,
    dy_batch,
    dy_head,
    dy_token,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    mask_batch,
    mask_head,
    mask_token,
    mask_key,
    scale,
    cap,
    slope,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dquery of BLOCK_T queries of one head. Strides are in units of ALIGNED elements."""
    number, head, batch = place(tl.program_id(0), tiles, heads, 1, RIGHT)
    all_tokens = tokens
    row, tokens, column, keys, first = sequence(number, queries_ptr, keys_ptr, sequences, tokens, keys, PACKED, BLOCK_T)
    lane = tl.arange(0, BLOCK_T)
    t = first + lane
    query_ptr += (batch * query_batch + head * query_head + row * query_token) * ALIGNED
    dy_ptr += (batch * dy_batch + head * dy_head + row * dy_token) * ALIGNED
    query = tile(query_ptr, first, lane, query_token * ALIGNED, tokens, HEAD_DIM, BLOCK_K, True)
    dy = tile(dy_ptr, first, lane, dy_token * ALIGNED, tokens, VALUE_DIM, BLOCK_V, True)
    rows = (batch * heads + head) * all_tokens + row
    log_sum = log_sums(log_sum_ptr + rows, t, tokens)
    delta = tl.load(delta_ptr + rows + t, mask=t < tokens, other=0.0)
    key_ptr += (batch * key_batch + head // share * key_head + column * key_token) * ALIGNED
    value_ptr += (batch * value_batch + head // share * value_head + column * value_token) * ALIGNED
    mask_ptr += batch * mask_batch + head * mask_head
    start, stop, all_start, all_stop = span(first, BLOCK_T, tokens, keys, left, right, LEFT, RIGHT, BLOCK_S)
    gap = all_stop - all_start
    dquery = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for BOUNDED in tl.static_range(2):
        dquery = _from_keys(
            dquery, query, dy, log_sum, delta, t, start, stop, all_start, all_stop, gap, key_ptr, value_ptr, mask_ptr,
            tokens, keys, key_token * ALIGNED, value_token * ALIGNED, mask_token, mask_key, scale, cap, left, right,
            HEAD_DIM, VALUE_DIM, MASK, CAPPED, LEFT, RIGHT, BOUNDED, BLOCK_S, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_K)
    dquery_ptr += (batch * dquery_batch + head * dquery_head) * ALIGNED
    pointers = dquery_ptr + ((row + t) * dquery_token * ALIGNED)[:, None] + columns[None, :]
    tl.store(pointers, rounded(dquery * slope, dquery_ptr), mask=(t < tokens)[:, None] & (columns < HEAD_DIM)[None, :])
