"""The forward kernels of attention; what they are called with is attention.py, the contract ops/attention.py.

One program goes through the keys of BLOCK_T rows and rescales its sums when it meets a larger score. A row is a query
of one head; with FOLD > 1, rows are the FOLD query heads of one key head, token by token, so that few queries still
fill a tile. With SPLIT, a program takes one part of the keys, and a second kernel combines the parts in order.
Source: Dao 2023, arXiv:2307.08691; the split: Dao et al. 2023, Flash-Decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import place, scored, sequence, span, tile
from .numbers import product, rounded

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    sums,
    total,
    top,
    query,
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
    """Add keys to the sums [R, V], the totals of probabilities [R] and the largest scores [R]: see `span`.

    BOUNDED: those that only some rows see, otherwise those that all do.
    """
    rows = tl.arange(0, BLOCK_S)
    factor = 1.0 if CAPPED or MASK == 2 else scale
    for step in range(start if BOUNDED else all_start, stop - gap if BOUNDED else all_stop, BLOCK_S):
        first = step + tl.where(step < all_start, 0, gap) if BOUNDED else step
        key = tile(key_ptr, first, rows, key_token, keys, HEAD_DIM, BLOCK_K, BOUNDED)
        products = product(query, tl.trans(key), tl.zeros([query.shape[0], BLOCK_S], tl.float32))
        s = (first + rows)[None, :]
        scores, _ = scored(
            products, t[:, None], s, tokens, keys, scale, cap, left, right, mask_ptr, mask_token, mask_key,
            MASK, CAPPED, LEFT, RIGHT, BOUNDED,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(scores, axis=1) * factor)
        finite = tl.where(new == -float("inf"), 0.0, new)  # nothing seen so far: exp2(-inf) = 0
        probabilities = tl.exp2(scores * factor - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(probabilities, axis=1)
        value = tile(value_ptr, first, rows, value_token, keys, VALUE_DIM, BLOCK_V, BOUNDED)
        sums = product(rounded(probabilities, value_ptr), value, sums * shrink[:, None])
        top = new
    return sums, total, top


@triton.jit
def forward_kernel(
    y_ptr,
    log_sum_ptr,
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
    splits,
    y_batch,
    y_head,
    y_token,
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
    left,
    right,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    FOLD: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Strides are in units of ALIGNED elements. With SPLIT, y is [B, T, H, splits, V] and log_sum like it: partial."""
    TOKENS: tl.constexpr = BLOCK_T // FOLD
    program = tl.program_id(0)
    split = 0
    if SPLIT:
        split = program % splits
        program = program // splits
    number, head, batch = place(program, tiles, heads, FOLD, RIGHT)
    all_tokens = tokens
    row, tokens, column, keys, first = sequence(number, queries_ptr, keys_ptr, sequences, tokens, keys, PACKED, TOKENS)
    lane = tl.arange(0, BLOCK_T)
    of_fold = (lane % FOLD).to(tl.int64)
    t = first + lane // FOLD
    inside = (lane < TOKENS * FOLD) & (t < tokens)
    row = row + first

    columns = tl.arange(0, BLOCK_K)
    query_ptr += (batch * query_batch + head * query_head + row * query_token) * ALIGNED
    query = tl.load(
        query_ptr + ((lane // FOLD * query_token + of_fold * query_head) * ALIGNED)[:, None] + columns[None, :],
        mask=inside[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    key_ptr += (batch * key_batch + head // share * key_head + column * key_token) * ALIGNED
    value_ptr += (batch * value_batch + head // share * value_head + column * value_token) * ALIGNED
    if MASK:
        mask_ptr += batch * mask_batch + (head + of_fold)[:, None] * mask_head

    start, stop, all_start, all_stop = span(first, TOKENS, tokens, keys, left, right, LEFT, RIGHT, BLOCK_S)
    if SPLIT:
        part = tl.cdiv(tl.cdiv(stop - start, BLOCK_S), splits) * BLOCK_S
        start += split * part
        stop = tl.maximum(tl.minimum(start + part, stop), start)
        all_start = tl.minimum(tl.maximum(all_start, start), stop)
        all_stop = tl.maximum(tl.minimum(all_stop, stop), all_start)
    gap = all_stop - all_start
    sums = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    for BOUNDED in tl.static_range(2):
        sums, total, top = _attend(
            sums, total, top, query, t, start, stop, all_start, all_stop, gap, key_ptr, value_ptr, mask_ptr, tokens,
            keys, key_token * ALIGNED, value_token * ALIGNED, mask_token, mask_key, scale, cap, left, right,
            HEAD_DIM, VALUE_DIM, MASK, CAPPED, LEFT, RIGHT, BOUNDED, BLOCK_S, BLOCK_K, BLOCK_V,
        )  # fmt: skip

    filled = tl.where(total == 0.0, 1.0, total)
    y = sums / filled[:, None]
    log_sum = (top + tl.log2(filled)) * LN2
    columns = tl.arange(0, BLOCK_V)
    head = head + of_fold
    row = row + lane // FOLD
    log_sum_ptr += batch * heads * all_tokens * splits
    if SPLIT:
        tl.store(log_sum_ptr + (row * heads + head) * splits + split, log_sum, mask=inside)
    else:
        tl.store(log_sum_ptr + head * all_tokens + row, log_sum, mask=inside)
    rows = (batch * y_batch + head * y_head + row * y_token) * ALIGNED
    if SPLIT:
        rows += split * VALUE_DIM
    mask = inside[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(y_ptr + rows[:, None] + columns[None, :], rounded(y, y_ptr), mask=mask)


@triton.jit
def combine_kernel(
    y_ptr,
    log_sum_ptr,
    partial_ptr,
    partial_sum_ptr,
    tokens,
    heads,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row [V] of the output, [B, T, H, V], from its parts [splits, V], each weighted by its share of the total."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK_SPLITS)
    columns = tl.arange(0, BLOCK_V)
    partial_sum_ptr += row * splits
    log_sums = tl.load(partial_sum_ptr + parts, mask=parts < splits, other=-float("inf"))
    top = tl.max(log_sums, axis=0)
    finite = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(log_sums - finite), axis=0)
    total = tl.where(total == 0.0, 1.0, total)
    sums = tl.zeros([BLOCK_V], tl.float32)
    for part in range(splits):
        weight = tl.exp(tl.load(partial_sum_ptr + part) - finite)
        partial = partial_ptr + (row * splits + part) * VALUE_DIM + columns
        sums += weight * tl.load(partial, mask=columns < VALUE_DIM, other=0.0)
    tl.store(y_ptr + row * VALUE_DIM + columns, rounded(sums / total, y_ptr), mask=columns < VALUE_DIM)
    token = row // heads % tokens
    place = (row // heads // tokens * heads + row % heads) * tokens + token
    tl.store(log_sum_ptr + place, top + tl.log(total))
