"""Counter-based random numbers in Triton; ../philox.py says what they are.

Written out instead of tl.rand, which has no room for all of the counter. The products go through uint64, which a
compiler turns into one wide multiplication, and logarithm and turn are those of csrc/cpu/vector.h: the built-in ones
differ from GPU to GPU, and some are exact to an absolute error only.
"""

import triton
import triton.language as tl

from ..philox import STREAM_SHIFT, STREAMS

_SHIFT = tl.constexpr(STREAM_SHIFT)
NOISE = tl.constexpr(STREAMS["noise"])
TIMESTEPS = tl.constexpr(STREAMS["timesteps"])


@triton.jit
def words(group, position, seed, draw, STREAM: tl.constexpr):
    """The four words, uint32, of elements 4 group .. 4 group + 3 of the sample at `position`, int64."""
    c0 = group.to(tl.uint32)  # cuts off
    c1 = position.to(tl.uint32) + c0 * 0
    c2 = (position >> 32).to(tl.uint32) + c0 * 0
    c3 = (tl.cast(draw, tl.int64) | (STREAM << _SHIFT)).to(tl.uint32) + c0 * 0
    seed = tl.cast(seed, tl.int64)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """Uniform on (0, 1)."""
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def logarithm(v):
    """The natural logarithm of a normal, positive number."""
    bits = v.to(tl.int32, bitcast=True) - 0x3F3504F3  # from sqrt(1/2)
    n = (bits >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0  # v = 2^n (1 + f)
    square = f * f
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    return (p * f * square - n * 2.12194440e-4 - square * 0.5 + f) + n * 0.693359375


@triton.jit
def turn(u):
    """cos(2 pi u) and sin(2 pi u), for 0 <= u < 2^20."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    t = (u - quarter.to(tl.float32) * 0.25) * 6.28318531
    square = t * t
    c = 2.443315711809948e-5
    c = c * square - 1.388731625493765e-3
    c = c * square + 4.166664568298827e-2
    c = c * (square * square) + (1.0 - square * 0.5)
    s = -1.9515295891e-4
    s = s * square + 8.3321608736e-3
    s = s * square - 1.6666654611e-1
    s = s * (square * t) + t
    odd = (quarter & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cosine, cosine), tl.where((quarter & 2) == 2, -sine, sine)


@triton.jit
def normals(word0, word1):
    """A pair of standard normals from a pair of words."""
    radius = tl.sqrt_rn(-2.0 * logarithm(uniform(word0)))
    cosine, sine = turn(uniform(word1))
    return radius * cosine, radius * sine


@triton.jit
def noise(first, position, seed, draw, BLOCK: tl.constexpr):
    """The standard normals of elements first .. first + BLOCK - 1 of a sample; first and BLOCK are divisible by 4."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    word0, word1, word2, word3 = words(group, position, seed, draw, NOISE)
    normal0, normal1 = normals(word0, word1)
    normal2, normal3 = normals(word2, word3)
    return tl.interleave(tl.interleave(normal0, normal2), tl.interleave(normal1, normal3))
