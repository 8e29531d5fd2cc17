"""What the machine can do: measured beside each row, in turn with the contestants, and once for a run.

A shared machine is now fast and now slow, so a limit of five minutes ago says little. Each row is held against a copy
of as many bytes as it must move, from and to memory that is there already, against a matrix product in its dtype, and
on a CPU against exponentials in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from measure import Call, Row, Work, interval, take_turns
from torch import Tensor

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that are multiplied
SMALL = 256  # their side where torch has no fast product: bfloat16 runs at 0.75 GFLOP/s on a chip without AVX-512
PATIENCE = 1.0  # seconds that a product may take
NUMBERS = 2**17  # whose exponentials are taken by each thread of a CPU, over and over: they stay in the cache
ROTATED = 2**29  # bytes that a copy walks through, more than the caches of one process
CACHED = 2**20  # bytes of inputs up to which a user finds them in the cache
COPY, PRODUCT, EXPONENTIALS = "limit: copy", "limit: product", "limit: exponentials"


@cache
def _buffers(device: str) -> tuple[Tensor, Tensor]:
    first, second = (torch.zeros(ROTATED, dtype=torch.uint8, device=device) for _ in range(2))
    return first, second


def _copy(moved: float, device: str) -> Call:
    """Reads and writes `moved` bytes, or as many as there are."""
    size = int(min(max(moved / 2, 64), ROTATED))
    places = 1 if moved < CACHED else ROTATED // size
    source, target = (
        [buffer[size * i : size * (i + 1)] for i in range(min(places, 64))] for buffer in _buffers(device)
    )
    return lambda index: target[index % len(target)].copy_(source[index % len(source)])


@cache
def _product(device: str, dtype: torch.dtype, side: int) -> Call:
    # Numbers change from one to the next: a GPU is faster on ones, as it warms up less.
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda _: torch.mm(a, b, out=out)


@cache
def _small(dtype: torch.dtype) -> float:
    """Seconds of a SMALL product on a CPU."""
    return min(take_turns({"": _product("cpu", dtype, SMALL)}, "cpu", 0.0)[""])


def too_slow(flops: float, device: str, dtype: torch.dtype) -> str:
    """Why a call with so many operations is left out: torch has no fast product of `dtype`, and would take longer than
    PATIENCE for them. "" if it is not."""
    if device != "cpu" or not flops or _small(dtype) < 8 * _small(torch.float32):
        return ""
    if flops * _small(dtype) / (2.0 * SMALL**3) <= PATIENCE:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"left out where a call takes torch over {PATIENCE} s: it has no fast {name} products on this chip"


def _side(device: str, dtype: torch.dtype) -> int:
    return SMALL if too_slow(2.0 * SIDE[device] ** 3, device, dtype) else SIDE[device]


@cache
def _exponentials(device: str) -> tuple[Call, int]:
    count = NUMBERS * torch.get_num_threads()
    x, out = (torch.zeros(count, device=device) for _ in range(2))
    return (lambda _: torch.exp(x, out=out)), count


def contestants(work: Work, device: str, dtype: torch.dtype) -> dict[str, Call]:
    """What to time beside a row that must do `work`."""
    found = {COPY: _copy(work.bytes, device)}
    if work.flops:
        found[PRODUCT] = _product(device, dtype, _side(device, dtype))
    if work.exponentials and device == "cpu":  # no function of torch keeps a GPU's waiting for no memory
        found[EXPONENTIALS] = _exponentials(device)[0]
    return found


def product_flops(device: str, dtype: torch.dtype) -> float:
    """Of the product that is timed."""
    return 2.0 * _side(device, dtype) ** 3


def seconds(work: Work, times: dict[str, Sequence[float]], device: str, dtype: torch.dtype) -> float:
    """The time that the binding limit allows, by what was timed of `contestants`."""
    medians = {name: interval(values)[0] for name, values in times.items()}
    allowed = [medians[COPY] * max(1.0, work.bytes / 2 / ROTATED)]
    if work.flops:
        allowed.append(medians[PRODUCT] * work.flops / product_flops(device, dtype))
    if EXPONENTIALS in medians:
        allowed.append(medians[EXPONENTIALS] * work.exponentials / _exponentials(device)[1])
    return max(allowed)


def rows(device: str, dtypes: list[torch.dtype], longest: float) -> list[Row]:
    """The limits of the run as rows of the results, under the op "limit". longest: seconds for each."""
    work, calls = {"copy": Work(bytes=ROTATED)}, {"copy": _copy(ROTATED, device)}
    if device == "cpu":
        calls["exponentials"], count = _exponentials(device)
        work["exponentials"] = Work(exponentials=count)
    sides = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        calls[name] = _product(device, dtype, _side(device, dtype))
        work[name] = Work(flops=product_flops(device, dtype))
        sides[name] = _side(device, dtype)
    for call in calls.values():
        call(0)
    found = []
    for name, values in take_turns(calls, device, longest).items():
        median, low, high = interval(values)
        dtype_name = name if name in sides else "float32"
        what = f"product of {sides[name]}x{sides[name]}" if name in sides else name
        row = Row("limit", "machine", device, dtype_name, what, "forward", 1e6 * median, 1e6 * low, 1e6 * high)
        found.append(row.rated(work[name]))
    return found


def sentence(found: list[Row]) -> str:
    parts = []
    for row in (row for row in found if row.op == "limit"):
        if row.gbps:
            parts.append(f"copy {row.gbps:.1f} GB/s")
        elif row.tflops:
            parts.append(f"{row.dtype} products {row.tflops:.3f} TFLOP/s")
        else:
            count = _exponentials(row.device)[1]
            parts.append(f"{1e-3 * count / (row.median_us or 1):.2f} billion exponentials a second")
    return "Limits at the start of this run: " + ", ".join(parts) + "."
