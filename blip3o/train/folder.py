"""The folder of a run: one writer at a time, and whether what it holds is the same run."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from blip3o.train.devices import Devices


@contextmanager
def only_writer(folder: Path, devices: Devices) -> Iterator[None]:
    """Lock `folder`, making it if need be, until the block or the processes end. BlockingIOError if others hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if devices.any(devices.rank == 0 and not _locked(descriptor)):
            raise BlockingIOError(f"{folder} is being trained in by another process")
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def differences(before: Mapping[str, object], now: Mapping[str, object], prefix: str = "") -> list[str]:
    """Where two nested tables of plain values differ, in words."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, "absent"), now.get(key, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, now {new}")
    return found
