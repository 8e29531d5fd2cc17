"""Samples in the order of a run, decoded by threads ahead of the consumer; faulty ones are told and replaced."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any

from blip3o.data.order import Order
from blip3o.data.shards import Sample, Shards
from blip3o.data.tar import Fault

WINDOW = 10_000  # positions over which the rate of faulty samples is taken


class FaultySample(UserWarning):
    """A sample that was replaced."""


class TooManyFaults(ValueError):
    """More samples are faulty than the loader was told to bear."""


class Loader:
    """Endless samples of a mixture of sources, those of one process; `position` is the whole state.

    sources     each shuffled in its own epochs; mixed by weights (`Order`)
    position    of the run, where all processes together go on: what `position` was when the run stopped
    rank, world  this process and how many there are. It yields the samples of position + rank, + rank + world, ...
    threads     that read, decode and transform; how many does not change what is yielded. 0: the caller's thread does
    ahead       samples that wait decoded at most
    transform   what is yielded of a sample, computed by the threads; it must be a function of the sample alone
    max_faults  the largest share of positions whose own sample is faulty, among the last WINDOW that were read (or as
                many as a process reads in an epoch of the largest source if that is fewer)
    report      called with each fault once, by the consumer: first with all that the shards' headers show, then with
                those of samples in order; default: a warning FaultySample

    A faulty sample is replaced by the next good one in its source's order, so what stands at a position depends on
    (seed, position) alone and no other position changes. Raises TooManyFaults, at once if a source's headers show more
    than max_faults of its samples faulty; from `next` what reading raises.
    """

    def __init__(
        self,
        sources: Sequence[Shards],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        position: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        ahead: int = 16,
        transform: Callable[[Sample], Any] | None = None,
        max_faults: float = 0.001,
        report: Callable[[Fault], None] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..world - 1, got {rank} of world {world}")
        if position < 0 or threads < 0 or ahead < 1:
            raise ValueError(
                f"position and threads must be at least 0 and ahead at least 1, got {position}, {threads}, {ahead}"
            )
        if not 0 <= max_faults < 1:
            raise ValueError(f"max_faults must be at least 0 and below 1, got {max_faults}")
        self.sources = tuple(sources)
        self.order = Order([len(source) for source in sources], weights, seed=seed)
        self.position, self.rank, self.world = position, rank, world
        self.transform, self.report = transform, report or warn
        window = min(WINDOW, max(1, max(self.order.sizes) // world))
        self.allowed = int(max_faults * window)
        self.window, self.max_faults = window, max_faults
        self.faults: Counter[str] = Counter()  # by kind, each counted once
        self.waited = 0.0  # seconds that the consumer waited for samples
        self._told: set[tuple[object, ...]] = set()
        self._recent: deque[int] = deque()  # the last positions whose own sample was faulty
        self._started = perf_counter()
        self._ahead = ahead if threads else 1
        self._submitted = position + rank
        self._queue: deque[Future[tuple[Any, tuple[Fault, ...]]]] = deque()
        for source in self.sources:
            known = source.known_faulty()
            self._tell(source.faults)
            if known > max_faults * len(source):
                raise TooManyFaults(
                    f"{known} of {len(source)} samples of {source.indices[0].shard.parent} are faulty by their headers "
                    f"alone, more than max_faults {max_faults}"
                )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="blip3o-data") if threads else None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; the sources stay open."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = perf_counter()
        if self._pool is None:
            value, faults = self._load(self.position + self.rank)
        else:
            while len(self._queue) < self._ahead:
                self._queue.append(self._pool.submit(self._load, self._submitted))
                self._submitted += self.world
            value, faults = self._queue[0].result()
        self.waited += perf_counter() - start
        self._note(faults)
        if self._queue:
            self._queue.popleft()
        self.position += self.world
        return value

    @property
    def waiting(self) -> float:
        """Share of the time since the loader was made that its consumer waited for samples."""
        return self.waited / max(perf_counter() - self._started, 1e-9)

    def at(self, position: int) -> tuple[Sample | None, tuple[Fault, ...]]:
        """The sample at a position of the run, and the faulty ones it replaces; None if more than allowed follow."""
        source, place = self.order.source(position)
        faults: list[Fault] = []
        while len(faults) <= self.allowed:
            found = self.sources[source].read(self.order.sample(source, place + len(faults)))
            if isinstance(found, Sample):
                return found, tuple(faults)
            faults.append(found)
        return None, tuple(faults)

    def _load(self, position: int) -> tuple[Any, tuple[Fault, ...]]:
        sample, faults = self.at(position)
        return (sample if sample is None or self.transform is None else self.transform(sample)), faults

    def _note(self, faults: tuple[Fault, ...]) -> None:
        self._tell(faults)
        if faults:
            self._recent.append(self.position)
        while self._recent and self._recent[0] <= self.position - self.window * self.world:
            self._recent.popleft()
        if len(self._recent) > self.allowed or len(faults) > self.allowed:
            raise TooManyFaults(
                f"{max(len(self._recent), len(faults))} faulty samples among the last {self.window}, at most "
                f"{self.allowed} are borne (max_faults {self.max_faults}); the last one: {faults[-1]}"
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
