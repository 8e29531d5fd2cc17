"""What training promises, put to the test a few times each (`make chaos` does it thoroughly)."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from chaos import ROWS
from chaos_process import Child, Say
from tqdm import tqdm


@pytest.mark.program("tests/chaos.py", "--short")
def test_every_promise_is_kept(program: CompletedProcess[str]) -> None:
    assert program.returncode == 0, program.stdout + program.stderr
    assert [line.split(":")[0] for line in program.stdout.splitlines() if "seed" in line] == list(ROWS)
    assert program.stdout.endswith("every promise kept\n")


def test_a_killed_process_takes_no_lock_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "_lock", multiprocessing.RLock(), raising=False)  # as tqdm's own, shared among forks

    def hold(say: Say) -> None:
        tqdm.get_lock().acquire()
        say("held")
        signal.pause()

    def use(say: Say) -> None:
        with tqdm.get_lock():
            say("used")

    for work, word in ((hold, "held"), (use, "used")):
        child = Child(work, tmp_path / word)
        said = child.hear(10.0)
        child.kill()
        child.wait()
        assert said == word
