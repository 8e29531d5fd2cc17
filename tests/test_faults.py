"""Every additive term of every backward pass, dropped once, breaks the conformance bound (tests/faults.py)."""

from __future__ import annotations

import re
from subprocess import CompletedProcess

import pytest


def all_noticed(program: CompletedProcess[str], least: int) -> None:
    """`least`: fewer terms than that would mean that the search is broken."""
    lines = program.stdout.splitlines()
    assert program.returncode == 0, "\n".join(line for line in lines if "MISSED" in line) + program.stderr
    dropped = re.search(r": (\d+) terms dropped, 0 missed", program.stdout)
    assert dropped and int(dropped[1]) >= least, program.stdout


@pytest.mark.program("tests/faults.py", "native")
def test_every_dropped_term_of_the_native_bodies_is_noticed(program: CompletedProcess[str]) -> None:
    all_noticed(program, 200)


@pytest.mark.program("tests/faults.py", "triton")
def test_every_dropped_term_of_the_triton_bodies_is_noticed(program: CompletedProcess[str]) -> None:
    pytest.importorskip("triton", reason='needs triton: pip install "blip3o[triton]"')
    all_noticed(program, 200)
