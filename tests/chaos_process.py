"""Processes that measure or are killed, forked from this one, which has imported torch: a start costs milliseconds."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

Say = Callable[[str], None]


class Child:
    """A forked process that runs `work(say)` and ends with status 0, or 1 after an exception.

    What it says are lines that `hear` returns; what it prints goes to the file `errors`.
    """

    def __init__(self, work: Callable[[Say], None], errors: Path) -> None:
        self.errors = errors
        self._read, write = os.pipe()
        self._text = b""
        self.status: int | None = None  # as waitpid says it; None while it runs
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        status = 1
        try:
            os.close(self._read)
            output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            tqdm.set_lock(threading.RLock())  # its own is shared among forks: who is killed with it keeps it from all
            work(lambda line: _write(write, line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def hear(self, seconds: float | None = None) -> str | None:
        """The next line that the child said; None once it has ended, or when none has come for so long."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._text:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                return None
            found = os.read(self._read, 1 << 16)
            if not found:
                return None
            self._text += found
        line, self._text = self._text.split(b"\n", 1)
        return line.decode()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> list[str]:
        """The lines not heard yet, once the child has ended."""
        lines = []
        while (line := self.hear()) is not None:
            lines.append(line)
        _, self.status = os.waitpid(self.pid, 0)
        os.close(self._read)
        return lines

    @property
    def killed(self) -> bool:
        return self.status == signal.SIGKILL

    def check(self) -> None:
        """Raise RuntimeError, with what it printed, unless it ended with status 0."""
        if self.status != 0:
            raise RuntimeError(f"a process ended with status {self.status}:\n{tail(self.errors)}")


def tail(path: Path, characters: int = 2000) -> str:
    return path.read_text(errors="replace")[-characters:]


def _write(descriptor: int, line: str) -> None:
    data = (line + "\n").encode()
    while data:
        data = data[os.write(descriptor, data) :]


def in_child(work: Callable[[Say], None], errors: Path) -> list[str]:
    """What `work` says, run in a process of its own. Raises RuntimeError if it fails."""
    child = Child(work, errors)
    lines = child.wait()
    child.check()
    return lines
