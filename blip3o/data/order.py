"""Which sample comes at which position: pure functions of integers, so that a run's data state is one position.

A position counts samples over the whole run, all processes and epochs together: row r of step s is position
s * batch_size + r. Processes share the rows of each step, so every one has its exact share, and a run that stopped
after a step goes on from it with any number of processes.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

from blip3o.data.scenes import GOLDEN

_MASK = (1 << 64) - 1
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 8
MAX_PERIOD = 1_000_000


def mix(x: int) -> int:
    """splitmix64's finaliser of the low 64 bits of x, as `scenes.mix64` for tensors."""
    x &= _MASK
    x = (x ^ (x >> 30)) * _MUL1 & _MASK
    x = (x ^ (x >> 27)) * _MUL2 & _MASK
    return x ^ (x >> 31)


def permuted(index: int, n: int, seed: int, epoch: int) -> int:
    """Where `index` goes in a permutation of 0..n-1 that (seed, epoch) chooses; no memory, constant time on average.

    A Feistel network permutes the smallest 4^h >= n numbers; it is applied again until it hits one below n (cycle
    walking), fewer than 4 times on average. Raises ValueError for an index outside 0..n-1.
    """
    if not 0 <= index < n:
        raise ValueError(f"index must be in 0..{n - 1}, got {index}")
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    key = mix(mix(seed * GOLDEN + 1) + epoch * GOLDEN)
    while True:
        left, right = index >> half, index & mask
        for step in range(_ROUNDS):
            left, right = right, left ^ mix(key + (step << 56) + right * GOLDEN) & mask
        index = left << half | right
        if index < n:
            return index


class Order:
    """The order of several sources that are mixed by weight, each shuffled anew in each of its epochs.

    sizes    samples of each source
    weights  of each source, integers or decimals such as 0.7. In lowest terms they sum to a period M; of the positions
             k M .. (k + 1) M - 1 source i has exactly its weight, in an order drawn for that k. A single source
             needs none.

    Raises ValueError for an empty source, a weight that is not positive, or a period above MAX_PERIOD.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int) -> None:
        self.sizes, self.seed = tuple(sizes), seed
        given = (1,) if weights is None else tuple(weights)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be those of at least one source, each with samples, got {list(sizes)}")
        if len(given) != len(self.sizes) or not all(weight > 0 for weight in given):
            raise ValueError(f"weights must be {len(self.sizes)} positive numbers, got {list(given)}")
        exact = [Fraction(str(weight)) for weight in given]  # 0.7 is meant as 7/10
        common = lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * common) for weight in exact]
        self.shares = tuple(share // gcd(*whole) for share in whole)
        self.period = sum(self.shares)
        if self.period > MAX_PERIOD:
            raise ValueError(f"weights must sum to at most {MAX_PERIOD} in lowest terms, got {self.period}: round them")

    def source(self, position: int) -> tuple[int, int]:
        """(source, place in that source's own order) of a position; the place counts over the source's epochs."""
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        block, inside = divmod(position, self.period)
        slot = permuted(inside, self.period, self.seed + 1, block)
        for source, share in enumerate(self.shares):
            if slot < share:
                return source, block * share + slot
            slot -= share
        raise AssertionError("shares sum to the period")

    def sample(self, source: int, place: int) -> int:
        """The sample's number in its source at a place of the source's order."""
        epoch, inside = divmod(place, self.sizes[source])
        return permuted(inside, self.sizes[source], self.seed + 2 + source, epoch)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, sample's number in it) at a position."""
        source, place = self.source(position)
        return source, self.sample(source, place)
