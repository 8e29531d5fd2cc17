"""Samples by their positions in a run, decoded by threads; faulty ones are told and replaced."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from blip3o.data.order import Order
from blip3o.data.shards import Sample, Shards, Wrong
from blip3o.data.tar import Fault

WINDOW = 10_000  # samples over which the rate of faulty ones is taken

Prepared = TypeVar("Prepared")


class FaultySample(UserWarning):
    """A sample that was replaced."""


class TooManyFaults(ValueError):
    """More samples are faulty than the loader was told to bear."""


class Loader(Generic[Prepared]):
    """The samples of a mixture of sources; what stands at a position of the run depends on (seed, position) alone.

    sources     each shuffled in its own epochs; mixed by weights (`Order`)
    prepare     what is returned of a sample, computed by the threads; a function of the sample alone. A sample for
                which it raises `Wrong` is faulty
    threads     that read, decode and prepare; how many does not change what is returned. 0: the caller's thread does
    max_faults  the largest share of positions whose own sample is faulty, among the last WINDOW that were read (or as
                many as an epoch of the largest source has if that is fewer)
    report      called with each fault once, by the caller of `samples`: first with all that the shards' headers show,
                then with those of samples in order; default: a warning FaultySample

    A faulty sample is replaced by the next good one in its source's order, so no other position changes. Raises
    TooManyFaults, at once if a source's headers show more than max_faults of its samples faulty.
    """

    def __init__(
        self,
        sources: Sequence[Shards],
        weights: Sequence[float] | None = None,
        *,
        prepare: Callable[[Sample], Prepared],
        seed: int,
        threads: int = 2,
        max_faults: float = 0.001,
        report: Callable[[Fault], None] | None = None,
    ) -> None:
        if threads < 0:
            raise ValueError(f"threads must be at least 0, got {threads}")
        if not 0 <= max_faults < 1:
            raise ValueError(f"max_faults must be at least 0 and below 1, got {max_faults}")
        self.sources = tuple(sources)
        self.order = Order([len(source) for source in sources], weights, seed=seed)
        self.prepare, self.report = prepare, report or warn
        self.window, self.max_faults = min(WINDOW, max(self.order.sizes)), max_faults
        self.allowed = int(max_faults * self.window)
        self.faults: Counter[str] = Counter()  # by kind, each counted once
        self._told: set[tuple[object, ...]] = set()
        self._read = 0  # positions
        self._recent: deque[int] = deque()  # which of those had a faulty sample, within the window
        for source in self.sources:
            known = source.known_faulty()
            self._tell(source.faults)
            if known > max_faults * len(source):
                raise TooManyFaults(
                    f"{known} of {len(source)} samples of {source.indices[0].shard.parent} are faulty by their headers "
                    f"alone, more than max_faults {max_faults}"
                )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="blip3o-data") if threads else None

    def __enter__(self) -> "Loader[Prepared]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the sources' files; reading a source by itself opens them again."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for source in self.sources:
            source.close()

    def samples(self, positions: Sequence[int]) -> list[Prepared]:
        """What is prepared of the samples at positions of the run. Raises TooManyFaults, and what reading raises."""
        found = (self._pool.map if self._pool is not None else map)(self.at, positions)
        samples = []
        for prepared, faults in found:
            self._note(faults)
            assert prepared is not None  # or there would be too many faults
            samples.append(prepared)
        return samples

    def at(self, position: int) -> tuple[Prepared | None, tuple[Fault, ...]]:
        """The sample at a position, prepared, and the faulty ones it replaces; None if more than allowed follow."""
        source, place = self.order.source(position)
        faults: list[Fault] = []
        while len(faults) <= self.allowed:
            found = self.sources[source].read(self.order.sample(source, place + len(faults)))
            if isinstance(found, Sample):
                try:
                    return self.prepare(found), tuple(faults)
                except Wrong as error:
                    found = Fault(found.shard, found.offset, error.kind, found.key, str(error))
            faults.append(found)
        return None, tuple(faults)

    def _note(self, faults: tuple[Fault, ...]) -> None:
        self._tell(faults)
        self._read += 1
        if faults:
            self._recent.append(self._read)
        while self._recent and self._recent[0] <= self._read - self.window:
            self._recent.popleft()
        if len(self._recent) > self.allowed or len(faults) > self.allowed:
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
            raise TooManyFaults(
                f"{max(len(self._recent), len(faults))} faulty samples among the last {self.window}, at most "
                f"{self.allowed} are borne (max_faults {self.max_faults}); different ones so far: "
                f"{counts}; the last one: {faults[-1]}"
            )

    def _tell(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            place = (fault.shard, fault.offset, fault.kind)
            if place not in self._told:
                self._told.add(place)
                self.faults[fault.kind] += 1
                self.report(fault)


def warn(fault: Fault) -> None:
    warnings.warn(f"replaced: {fault}", FaultySample, stacklevel=2)
