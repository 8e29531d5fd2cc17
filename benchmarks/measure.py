"""The instrument: contestants timed in turn, rows of results, their table, and the comparison of two runs.

A row is one measurement. `ratio_to_best_peer` stands on our rows (the backends native and triton): the best peer's
median over ours, so above 1 we are faster. The reference is a peer: it is what one would write without us.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # threads stay on their cores; read when torch loads OpenMP

import argparse
import gc
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

BACKENDS = ("native", "triton")
FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError)  # of a peer: listed, not raised
OURS = (*BACKENDS, "native compile")  # the last: our networks under torch.compile
LONG = 0.25  # seconds: where a call takes longer, no more are made than are timed
LEAST = ((2.0, 2), (LONG, 3), (0.0, 5))  # turns of each at least, where one takes so many seconds or more
BEATEN = 2.0  # times the quickest of a race: who takes longer is not the best peer, whatever more turns say
WINDOW = 2e-3  # seconds of one call after the other: its code is in the caches then, its data is not
Call = Callable[[int], object]  # a contestant; its argument counts the calls, so that buffers can be rotated


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes read and written once, floating-point operations of matrix products, and
    exponentials (a logarithm or a sine counts as one)."""

    bytes: float = 0.0
    flops: float = 0.0
    exponentials: float = 0.0


@dataclass(frozen=True)
class Row:
    """One measurement; the microseconds are None where nothing was timed, and `reason` says why.

    low_us, high_us: the 95 % interval of the median.  gbps, tflops: the bytes and operations that the call cannot do
    without, over the median.  limit_share: the time the machine's binding limit allows, over the median.  memory:
    "fresh" if malloc is as it comes, which maps every large result anew, "reused" if it keeps freed memory; what we
    keep by ourselves (blip3o_kernels/memory.py) is kept in both.  checked: whether the result agreed with the
    reference.  intensity: operations on a byte, of matrix products where
    there are any, otherwise of any kind by FLOP formulas.
    """

    op: str
    provider: str
    device: str
    dtype: str
    shape: str
    direction: str
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    limit_share: float | None = None
    ratio_to_best_peer: float | None = None
    checked: bool = False
    memory: str = "fresh"
    peak_mib: float | None = None
    intensity: float | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What one row of the table is about."""
        return self.op, self.dtype, self.shape, self.direction, self.memory

    def rated(self, work: Work) -> Row:
        """The row with the rates at which it did `work`."""
        seconds = (self.median_us or math.nan) / 1e6
        gbps = work.bytes / seconds / 1e9 if work.bytes else None
        return replace(self, gbps=gbps, tflops=work.flops / seconds / 1e12 if work.flops else None)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def take_turns(
    contestants: dict[str, Call],
    device: str,
    seconds: float,
    least: int | None = None,
    most: int = 101,
    clock: Callable[[], float] = time.perf_counter,
    racing: Collection[str] = (),
    window: float = WINDOW,
) -> dict[str, list[float]]:
    """Seconds of one call, several times for each contestant: in turn, so that a busy machine slows all alike.

    A short call is repeated to fill a `window` of seconds. It ends when `seconds` have passed for each contestant, but
    not before `least` measurements of each (LEAST, if not given), nor after `most`. Each has run before: where one is
    LONG, the first round counts. `racing`: of these, who is LONG and BEATEN in the first round takes no other turn. The
    order is shuffled, and one count of calls serves all: what one contestant leaves in the caches, inputs or freed
    results, is of use to no certain other one. `clock` may be time.process_time, which a busy machine does not disturb,
    for calls of a single thread.
    """
    repeats: dict[str, int] = {}
    firsts: dict[str, float] = {}
    order, shuffled, calls = list(contestants), random.Random(0), 0

    def once(name: str) -> float:
        nonlocal calls
        call, first, number = contestants[name], calls, repeats.get(name, 1)
        calls += number
        synchronise(device)
        start = clock()
        for i in range(first, first + number):
            call(i)
        synchronise(device)
        return (clock() - start) / number

    for name in contestants:
        firsts[name] = shortest = once(name)
        if shortest < LONG:
            shortest = min(once(name), once(name))
        repeats[name] = max(1, min(200, math.ceil(window / max(shortest, 1e-7))))
    longest = max(firsts.values())
    counts = longest >= LONG
    least = least or next(turns for length, turns in LEAST if longest >= length)
    times = {name: [first] if counts else [] for name, first in firsts.items()}
    lost = max(LONG, BEATEN * min((firsts[name] for name in racing), default=0.0))
    order = [name for name in order if name not in racing or firsts[name] <= lost]
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(contestants)
        for taken in range(int(counts), most):
            if taken >= least and time.perf_counter() > end:
                break
            shuffled.shuffle(order)
            for name in order:
                times[name].append(once(name))
    finally:
        if collecting:
            gc.enable()
    return times


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval, by order statistics: no assumption on how times are distributed."""
    ordered, count = sorted(values), len(values)
    half = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor((count - 1) / 2 - half)), min(count - 1, math.ceil((count - 1) / 2 + half))
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return middle, ordered[low], ordered[high]


def measured(row: Row, times: Sequence[float], work: Work, limit: float | None) -> Row:
    """The row with its times. limit: the seconds that the machine's binding limit allows."""
    median, low, high = interval(times)
    timed = replace(row, median_us=1e6 * median, low_us=1e6 * low, high_us=1e6 * high)
    return replace(timed.rated(work), limit_share=limit / median if limit else None)


def compared(rows: Iterable[Row]) -> list[Row]:
    """The rows of one table line, ours with their ratio to the best peer that was checked."""
    rows = list(rows)
    peers = [row.median_us for row in rows if row.provider not in OURS and row.median_us and row.checked]
    return [
        replace(row, ratio_to_best_peer=min(peers) / row.median_us)
        if row.provider in OURS and row.median_us and peers
        else row
        for row in rows
    ]


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote. ValueError names the file and what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"expected a JSON file of an earlier run, found none at {path}")
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a list of measurements: {error}") from None


def groups(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found


def microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def line(rows: Sequence[Row], kept: float | None = None) -> str:
    """One line of the Markdown table; in bold where a peer is faster. kept: the ratio with freed memory kept."""
    ours = [row for row in rows if row.provider in OURS and row.median_us]
    best = min(ours, key=lambda row: row.median_us or math.inf, default=None)
    peers = sorted((row for row in rows if row.provider not in OURS and row.median_us), key=lambda r: r.median_us or 0)
    first = best or rows[0]
    ratio = best.ratio_to_best_peer if best else None
    share = f"{100 * best.limit_share:.0f} %" if best and best.limit_share else "-"
    cells = [first.op, first.dtype, first.shape, first.direction]
    cells += [f"{microseconds(best.median_us)} ({best.provider})" if best else "-"]
    cells += [f"{ratio:.2f}" if ratio else "-", f"{kept:.2f}" if kept else "", share]
    cells += [", ".join(f"{row.provider} {microseconds(row.median_us)}" for row in peers)]
    if ratio is not None and ratio < 1:
        cells = [f"**{cell}**" if cell else "" for cell in cells]
    return "| " + " | ".join(cells) + " |"


HEAD = "| op | dtype | shape | direction | ours, µs | x best peer | malloc keeping memory | of the limit | peers, µs |"
HEAD += "\n" + "|---" * 9 + "|"


def _ratio(group: Iterable[Row]) -> float | None:
    return max((row.ratio_to_best_peer for row in group if row.ratio_to_best_peer), default=None)


def table(rows: Iterable[Row]) -> str:
    """The Markdown table, one line for each op, shape and direction; then who was not there, and why.

    Rows whose memory is "reused" become a column beside those whose memory is "fresh", if there are any of these.
    """
    lines, absent, found = [HEAD], {}, groups(rows)
    kept = {key[:4]: _ratio(group) for key, group in found.items() if key[4] == "reused"}
    fresh = {key: group for key, group in found.items() if key[4] == "fresh"}
    for key, group in (fresh or found).items():
        lines.append(line(group, kept.get(key[:4])))
        absent.update({(row.provider, row.reason): row.op for row in group if row.reason})
    lines += ["", *(f"- {provider}: {reason}" for provider, reason in sorted(absent))]
    return "\n".join(lines)


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def slower(old: Iterable[Row], new: Iterable[Row]) -> list[str]:
    """Our rows that got slower against the best peer of their own run: by more than 5 %, and with intervals apart.

    Ratios, because two runs on a shared machine have no common clock; where there was no peer, microseconds.
    """
    before = {(row.key, row.provider): row for row in old if row.provider in OURS and row.median_us}
    found = []
    for row in new:
        then = before.get((row.key, row.provider))
        if then is None or not row.median_us or not then.median_us:
            continue
        if row.ratio_to_best_peer and then.ratio_to_best_peer:
            factor, word = then.ratio_to_best_peer / row.ratio_to_best_peer, "against the best peer"
        else:
            factor, word = row.median_us / then.median_us, "in time"
        apart = (row.low_us or 0) / row.median_us > 0.95 or factor > (then.high_us or 0) / then.median_us
        if factor > 1.05 and apart:
            found.append(f"{' '.join(row.key)} ({row.provider}): {factor:.2f} times slower {word}")
    return found


def machine(device: str) -> str:
    """The chip and the versions, for the head of a table."""
    chip = torch.cuda.get_device_name() if device != "cpu" else _cpu_name()
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{chip}{threads}, Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"


def _cpu_name() -> str:
    try:
        names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """For argparse: a number above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    return parse


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
