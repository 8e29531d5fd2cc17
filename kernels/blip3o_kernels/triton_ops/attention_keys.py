"""The gradients of the keys and values of attention; called by attention.py, the contract is ops/attention.py.

    p = exp(scores - log_sum), dp = dy . value, delta = dy . y
    ds = p (dp - delta), dkey = scale ds^T @ query, dvalue = p^T @ dy

One program makes those of BLOCK_S keys from all their queries, head by head of their group. Scores are computed here
and in attention_queries.py: that costs two of seven products and saves the atomics whose order changes from run to
run. Source: Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import log_sums, place, scored, sequence, span, tile
from .numbers import product, rounded


@triton.jit
def _from_queries(
    dkey,
    dvalue,
    key,
    value,
    s,
    start,
    stop,
    all_start,
    all_stop,
    gap,
    query_ptr,
    dy_ptr,
    log_sum_ptr,
    delta_ptr,
    mask_ptr,
    tokens,
    keys,
    query_token,
    dy_token,
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
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add what queries give to dkey [S, K] and dvalue [S, V]. Scores are held transposed, [S, T].

    BOUNDED: the queries that see some of the keys, otherwise those that see all; see `span`.
    """
    rows = tl.arange(0, BLOCK_T)
    factor = 1.0 if CAPPED or MASK == 2 else scale
    for step in range(start if BOUNDED else all_start, stop - gap if BOUNDED else all_stop, BLOCK_T):
        first = step + tl.where(step < all_start, 0, gap) if BOUNDED else step
        query = tile(query_ptr, first, rows, query_token, tokens, HEAD_DIM, BLOCK_K, BOUNDED)
        products = product(key, tl.trans(query), tl.zeros([key.shape[0], BLOCK_T], tl.float32))
        t = first + rows
        scores, bend = scored(
            products, t[None, :], s[:, None], tokens, keys, scale, cap, left, right, mask_ptr, mask_token, mask_key,
            MASK, CAPPED, LEFT, RIGHT, BOUNDED,
        )  # fmt: skip
        probabilities = tl.exp2(scores * factor - log_sums(log_sum_ptr, t, tokens)[None, :])
        dy = tile(dy_ptr, first, rows, dy_token, tokens, VALUE_DIM, BLOCK_V, BOUNDED)
        dvalue = product(rounded(probabilities, dy_ptr), dy, dvalue)
        dprobabilities = product(value, tl.trans(dy), tl.zeros([key.shape[0], BLOCK_T], tl.float32))
        delta = tl.load(delta_ptr + t, mask=t < tokens, other=0.0)
        dscores = probabilities * (dprobabilities - delta[None, :])
        if CAPPED:
            dscores *= bend
        dkey = product(rounded(dscores, query_ptr), query, dkey)
    return dkey, dvalue


@triton.jit
def key_value_kernel(
    dkey_ptr,
    dvalue_ptr,
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
    dkey_batch,
    dkey_head,
    dkey_token,
    dvalue_batch,
    dvalue_head,
    dvalue_token,
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
    """dkey and dvalue of BLOCK_S keys of one key head. Strides are in units of ALIGNED elements."""
    number, group, batch = place(tl.program_id(0), tiles, heads // share, 1, False)
    all_tokens = tokens
    column, keys, row, tokens, first = sequence(number, keys_ptr, queries_ptr, sequences, keys, tokens, PACKED, BLOCK_S)
    lane = tl.arange(0, BLOCK_S)
    s = first + lane
    key_ptr += (batch * key_batch + group * key_head + column * key_token) * ALIGNED
    value_ptr += (batch * value_batch + group * value_head + column * value_token) * ALIGNED
    key = tile(key_ptr, first, lane, key_token * ALIGNED, keys, HEAD_DIM, BLOCK_K, True)
    value = tile(value_ptr, first, lane, value_token * ALIGNED, keys, VALUE_DIM, BLOCK_V, True)
    start, stop, all_start, all_stop = span(first, BLOCK_S, keys, tokens, right, left, RIGHT, LEFT, BLOCK_T)
    gap = all_stop - all_start
    dkey = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    dvalue = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    query_ptr += (batch * query_batch + row * query_token) * ALIGNED
    dy_ptr += (batch * dy_batch + row * dy_token) * ALIGNED
    for i in range(share):
        head = group * share + i
        query = query_ptr + head * query_head * ALIGNED
        dy = dy_ptr + head * dy_head * ALIGNED
        rows = (batch * heads + head) * all_tokens + row
        mask = mask_ptr + batch * mask_batch + head * mask_head
        for BOUNDED in tl.static_range(2):
            dkey, dvalue = _from_queries(
                dkey, dvalue, key, value, s, start, stop, all_start, all_stop, gap, query, dy, log_sum_ptr + rows,
                delta_ptr + rows, mask, tokens, keys, query_token * ALIGNED, dy_token * ALIGNED, mask_token, mask_key,
                scale, cap, left, right, HEAD_DIM, VALUE_DIM, MASK, CAPPED, LEFT, RIGHT, BOUNDED,
                BLOCK_T, BLOCK_K, BLOCK_V,
            )  # fmt: skip
    column = column + s
    columns = tl.arange(0, BLOCK_K)
    dkey_ptr += (batch * dkey_batch + group * dkey_head) * ALIGNED
    rows = dkey_ptr + (column * dkey_token * ALIGNED)[:, None] + columns[None, :]
    tl.store(rows, rounded(dkey * slope, dkey_ptr), mask=(s < keys)[:, None] & (columns < HEAD_DIM)[None, :])
    columns = tl.arange(0, BLOCK_V)
    dvalue_ptr += (batch * dvalue_batch + group * dvalue_head) * ALIGNED
    rows = dvalue_ptr + (column * dvalue_token * ALIGNED)[:, None] + columns[None, :]
    tl.store(rows, rounded(dvalue, dvalue_ptr), mask=(s < keys)[:, None] & (columns < VALUE_DIM)[None, :])
