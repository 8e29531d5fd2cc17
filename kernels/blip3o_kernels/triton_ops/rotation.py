"""What the kernels that rotate have in common: a tile of pairs of dims, [TOKENS, HEADS, PAIRS] twice.

Pair i is (i, i + half), or interleaved (2i, 2i + 1). Dims that are not rotated (PARTIAL) make `rest` more pairs, which
stay as they are. So one tile covers a head: half + rest pairs, padded to a power of two.
Interleaved pairs are loaded and stored as they lie, in whole vectors, and taken apart in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from .numbers import rounded, wide


@triton.jit
def pair_columns(half, rest, head_dim, INTERLEAVED: tl.constexpr, PARTIAL: tl.constexpr, PAIRS: tl.constexpr):
    """Which dims the pairs are made of, and which of them exist: four tensors [1, 1, PAIRS]."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    elif PARTIAL:
        first = tl.where(pair < half, pair, pair + half)
        second = first + tl.where(pair < half, half, rest)
    else:
        first = pair
        second = pair + half
    exists = pair < half + rest
    return first, second, exists, exists & (second < head_dim)


@triton.jit
def load_pairs(
    pointer, rows, inside, half, rest, head_dim, INTERLEAVED: tl.constexpr, PARTIAL: tl.constexpr, PAIRS: tl.constexpr
):
    """The pairs of the heads that start at pointer + rows [.., .., 1], in float32; 0 where there are none."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = wide(pointer + rows + column, inside & (column < head_dim))
        first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], PAIRS, 2]))
    else:
        left, right, has_left, has_right = pair_columns(half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS)
        first = wide(pointer + rows + left, inside & has_left)
        second = wide(pointer + rows + right, inside & has_right)
    return first, second


@triton.jit
def store_pairs(
    pointer,
    rows,
    inside,
    first,
    second,
    half,
    rest,
    head_dim,
    INTERLEAVED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.reshape(tl.join(first, second), [first.shape[0], first.shape[1], 2 * PAIRS])
        tl.store(pointer + rows + column, rounded(x, pointer), mask=inside & (column < head_dim))
    else:
        left, right, has_left, has_right = pair_columns(half, rest, head_dim, INTERLEAVED, PARTIAL, PAIRS)
        tl.store(pointer + rows + left, rounded(first, pointer), mask=inside & has_left)
        tl.store(pointer + rows + right, rounded(second, pointer), mask=inside & has_right)


@triton.jit
def load_angles(cos_ptr, sin_ptr, rows, inside, half, INVERSE: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin [TOKENS, 1, PAIRS] of the table's rows [TOKENS, 1, 1]."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    cos = tl.load(cos_ptr + rows + pair, mask=inside & (pair < half), other=0.0)
    sin = tl.load(sin_ptr + rows + pair, mask=inside & (pair < half), other=0.0)
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def tokens_at(
    number,
    tokens,
    half,
    table_stride,
    cos_ptr,
    sin_ptr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Of a tile's number: the sample, the tokens [TOKENS, 1, 1], and their cos and sin."""
    tiles = tl.cdiv(tokens, TOKENS)
    sample = (number // tiles).to(tl.int64)
    token = (number % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    angles = sample * table_stride + token * half
    cos, sin = load_angles(cos_ptr, sin_ptr, angles, token < tokens, half, INVERSE, PAIRS)
    return sample, token, cos, sin


@triton.jit
def turned(first, second, cos, sin, half, PARTIAL: tl.constexpr, PAIRS: tl.constexpr):
    left = first * cos - second * sin
    right = second * cos + first * sin
    if PARTIAL:
        turns = tl.arange(0, PAIRS)[None, None, :] < half
        left = tl.where(turns, left, first)
        right = tl.where(turns, right, second)
    return left, right


def pairs(head_dim: int, half: int) -> tuple[int, int]:
    """`rest` and PAIRS. The first is counted here, where the compiler sees whether it is a multiple of 16."""
    return (head_dim + 1) // 2 - half, triton.next_power_of_2((head_dim + 1) // 2)


def table(cos: Tensor, sin: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
    """cos and sin, contiguous in float32, and how far apart two samples' tables are: 0 for one table for all."""
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return cos, sin, tokens * cos.shape[-1] if cos.dim() == 3 else 0


def tile(heads: int, tokens: int, width: int, elements: int) -> tuple[int, int]:
    """TOKENS and HEADS of a tile with so many pairs a head and elements in all: first all heads, then more tokens."""
    block = min(triton.next_power_of_2(heads), max(elements // (2 * width), 1))
    return min(triton.next_power_of_2(tokens), max(elements // (2 * width * block), 1)), block
