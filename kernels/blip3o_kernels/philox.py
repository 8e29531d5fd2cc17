"""Counter-based random numbers: Philox4x32-10 in plain PyTorch, the specification of what every backend draws.

One call turns a counter of four 32-bit words c and a key of two, k, into four random words. Ten rounds of

    c <- (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0))      of the 64-bit products
    k <- (k0 + 0x9E3779B9,  k1 + 0xBB67AE85)                                            between two rounds

with M0 = 0xD2511F53 and M1 = 0xCD9E8D57. The bits of an element of a sample are those of

    key     = (seed low, seed high)
    counter = (element // 4,  position low,  position high,  stream << 24 | draw)       word element % 4 of the result

where the position is the sample's place in the whole run. So the bits depend neither on how a batch is split nor on
the number of processes, and nothing has to be kept to resume a run.

    seed      0 <= seed < 2^64
    position  int64; its 64 bits are taken as they are
    element   < 2^34, counted within the sample
    stream    8 bits: what the bits are for, STREAMS
    draw      24 bits: which of several independent draws for the same sample

From words to numbers, for a word w and a pair of words (w0, w1):

    uniform   u = ((w >> 9) + 1/2) 2^-23            an odd multiple of 2^-24: exact in float32, and never 0 or 1
    normal    n0 = sqrt(-2 log u0) cos(2 pi u1)     for the elements with even number,
              n1 = sqrt(-2 log u0) sin(2 pi u1)     for the next one; |n| < 5.77

Backends agree in every bit of u. Their normals are each within NORMAL_ULPS units in the last place, of
max(|n|, 1) in float32, of the exact value; within one backend and instruction set they are the same bits everywhere.
Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123); Box and Muller 1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks

STREAMS = {"noise": 0, "timesteps": 1}
STREAM_SHIFT = 24  # the bits of draw
MAX_ELEMENTS = 2**34
NORMAL_ULPS = 6  # the worst of logarithm, root, angle, cosine and product together; the largest seen is 3.4

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def check_seed(seed: int) -> int:
    """`seed` as the signed 64-bit integer of the same bits, which is how torch and C carry it."""
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        checks.fail("seed", "0 <= seed < 2^64", seed)
    return seed - 2**64 if seed >= 2**63 else seed


def check_draw(draw: int) -> None:
    if isinstance(draw, bool) or not isinstance(draw, (int, torch.SymInt)):
        raise TypeError(f"draw: expected an int, got {type(draw).__name__}")
    if not 0 <= draw < 1 << STREAM_SHIFT:
        checks.fail("draw", f"0 <= draw < 2^{STREAM_SHIFT}", draw)


def check_positions(positions: Tensor) -> None:
    checks.of(torch.int64, "positions", positions)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four words of a counter and a key: int64 tensors of shapes that broadcast, and ints, in [0, 2^32)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product, by the multiplier's halves: int64 has no room for an unsigned product."""
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD


def bits(positions: Tensor, elements: int, seed: int, stream: int, draw: int = 0) -> Tensor:
    """The words [B, elements], int64 in [0, 2^32), of the samples at `positions` [B] int64."""
    if not 0 <= elements <= MAX_ELEMENTS:
        checks.fail("elements", "at most 2^34 elements per sample", elements)
    if not 0 <= stream < 256:
        checks.fail("stream", "0 <= stream < 256", stream)
    check_positions(positions)
    check_draw(draw)
    seed = check_seed(seed)
    groups = torch.arange(-(-elements // 4), device=positions.device)
    rows = positions.view(-1, 1)
    last = torch.full_like(rows, stream << STREAM_SHIFT | draw)
    words = philox4x32((groups, rows & _WORD, (rows >> 32) & _WORD, last), (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(words, -1).flatten(1)[:, :elements]


def uniform(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on (0, 1), one for each word; dtype: float32 or float64, the same values in both."""
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def normal(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals [..., N] by Box and Muller, one for each of `words` [..., N]; N is even. Computed in `dtype`."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(words[..., 0::2], dtype)))
    turns = uniform(words[..., 1::2], dtype)
    quarter = torch.round(
        4.0 * turns
    )  # what is left of the angle is exact; 2 pi turns in float32 would be off by 2^-22
    rest = (turns - quarter / 4.0) * (2.0 * math.pi)
    c, s = (torch.round(part(quarter * (math.pi / 2.0))) for part in (torch.cos, torch.sin))  # 0, 1 or -1
    cosine, sine = torch.cos(rest), torch.sin(rest)
    return torch.stack((radius * (c * cosine - s * sine), radius * (s * cosine + c * sine)), -1).flatten(-2)


def noise(positions: Tensor, shape: tuple[int, ...], seed: int, draw: int, dtype: torch.dtype) -> Tensor:
    """The noise [B, *shape] of the samples at `positions` [B], standard normal."""
    elements = math.prod(shape)
    words = bits(positions, elements + elements % 2, seed, STREAMS["noise"], draw)
    return normal(words, dtype)[:, :elements].reshape(len(positions), *shape)
