"""What the kernels of attention share: which tile a program has, what that sees, and its scores.

Scores are in units of log 2, so that a probability is one exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import wide

LOG2E = tl.constexpr(1.4426950408889634)
SEQUENCES = tl.constexpr(128)  # boundaries of packed sequences read at a time


@triton.jit
def place(program, tiles, heads, FOLD: tl.constexpr, LAST_FIRST: tl.constexpr):
    """A program's tile, the first of its FOLD heads, and its batch. LAST_FIRST: short tiles are for the gaps at the
    end, where the last ones see most.
    """
    tile = program % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    head = (program // tiles % (heads // FOLD) * FOLD).to(tl.int64)
    return tile, head, (program // tiles // (heads // FOLD)).to(tl.int64)


@triton.jit
def sequence(tile, rows_ptr, columns_ptr, sequences, rows, columns, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence of a tile: its first row and how many rows, its first column and how many, the tile's row in it.

    If PACKED, rows_ptr holds the boundaries of the sequences along the tiled side, columns_ptr along the other. The
    tiles of sequence i start at rows_ptr[i] // BLOCK + i: that leaves each enough of them whatever the lengths are, so
    that a grid of rows // BLOCK + sequences + 1 tiles is known without reading the lengths on the host; at most
    sequences + 1 tiles are empty. Rows after the last sequence are one more sequence, of no columns.
    """
    if PACKED:
        index = -1
        for first in range(0, sequences + 1, SEQUENCES):
            i = first + tl.arange(0, SEQUENCES)
            start = tl.load(rows_ptr + i, mask=i <= sequences, other=0)
            index += tl.sum(((start // BLOCK + i <= tile) & (i <= sequences)).to(tl.int32), axis=0)
        row = tl.load(rows_ptr + index)
        row_stop = tl.load(rows_ptr + index + 1, mask=index < sequences, other=rows)
        column = tl.load(columns_ptr + index)
        column_stop = tl.load(columns_ptr + index + 1, mask=index < sequences, other=column)
        first = (tile - row // BLOCK - index) * BLOCK
        return row.to(tl.int64), row_stop - row, column.to(tl.int64), column_stop - column, first
    else:
        return tl.cast(0, tl.int64), rows, tl.cast(0, tl.int64), columns, tile * BLOCK


@triton.jit
def span(first, count, rows, columns, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """Of `count` rows from `first` on: the columns that some row sees, and within those the ones that all rows see.

    Row r sees column c if r + columns - rows - before <= c <= r + columns - rows + after. [start, stop) and
    [all_start, all_stop); all but `stop` are multiples of BLOCK, or equal to it. The loop over the edges leaves the
    middle out as a gap: a loop for each edge would cost registers in all of them.
    """
    start = 0
    stop = columns
    all_start = 0
    all_stop = columns
    first_sees = first + columns - rows
    last_sees = tl.minimum(first + count, rows) - 1 + columns - rows
    if BEFORE:
        start = tl.maximum(first_sees - before, 0) // BLOCK * BLOCK
        all_start = tl.maximum(last_sees - before, 0)
    if AFTER:
        stop = tl.minimum(last_sees + after + 1, columns)
        all_stop = tl.minimum(first_sees + after + 1, columns)
    stop = tl.where(first < rows, tl.maximum(stop, start), start)
    all_start = tl.minimum((all_start + BLOCK - 1) // BLOCK * BLOCK, stop)
    all_stop = tl.minimum(tl.maximum(all_stop, 0) // BLOCK * BLOCK, stop)
    return start, stop, all_start, tl.maximum(all_stop, all_start)


@triton.jit
def tile(pointer, first, rows, stride, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows first + rows [R] of a matrix, [R, BLOCK] in its dtype; 0 from column WIDTH and, if BOUNDED, row limit."""
    columns = tl.arange(0, BLOCK)
    pointers = pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if BOUNDED and WIDTH < BLOCK:
        return tl.load(pointers, mask=(first + rows < limit)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=(first + rows < limit)[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def tanh(x):
    """By exp, and near 0, where that cancels, by a polynomial."""
    z = x * x
    series = (((-0.00589395 * z + 0.02079462) * z - 0.05378329) * z + 0.13331915) * z - 0.33333298
    return tl.where(z < 0.36, x + x * z * series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def scored(
    products,
    t,
    s,
    tokens,
    keys,
    scale,
    cap,
    left,
    right,
    mask_ptr,
    mask_token,
    mask_key,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Scores of query . key, and by what the cap bends them. t and s are the positions, broadcast to the products.

    Without a cap or an additive mask the scores still lack their factor `scale`, which the caller folds into the
    subtraction that follows. MASK: 0 none, 1 boolean, 2 additive. BOUNDED: whether the tile has masked edges.
    """
    bend = 1.0
    if CAPPED:
        bent = tanh(products * scale)
        bend = 1.0 - bent * bent
        products = bent * cap
    elif MASK == 2:
        products *= scale
    if MASK:
        pointers = mask_ptr + tl.cast(t, tl.int64) * mask_token + tl.cast(s, tl.int64) * mask_key
        mask = wide(pointers, (t < tokens) & (s < keys))
        if MASK == 1:
            products = tl.where(mask != 0.0, products, -float("inf"))
        else:  # scores as low as the lowest number of a dtype have no room for a log-sum-exp: they count as masked
            products = tl.where(mask <= -1.0e30, -float("inf"), products + mask * LOG2E)
    if BOUNDED:
        seen = s < keys
        if LEFT:
            seen = seen & (s >= t + keys - tokens - left)
        if RIGHT:
            seen = seen & (s <= t + keys - tokens + right)
        products = tl.where(seen, products, -float("inf"))
    return products, bend


@triton.jit
def log_sums(pointer, t, tokens):
    """Of rows t, in units of log 2; inf where there is nothing, so that exp2(score - it) is 0."""
    log_sum = tl.load(pointer + t, mask=t < tokens, other=-float("inf"))
    return tl.where(log_sum == -float("inf"), float("inf"), log_sum * LOG2E)
