"""What training promises, put to the test a few times each (`make chaos` does it thoroughly)."""

from __future__ import annotations

from subprocess import CompletedProcess

import pytest
from chaos import ROWS


@pytest.mark.program("tests/chaos.py", "--short")
def test_every_promise_is_kept(program: CompletedProcess[str]) -> None:
    assert program.returncode == 0, program.stdout + program.stderr
    assert [line.split(":")[0] for line in program.stdout.splitlines() if "seed" in line] == list(ROWS)
    assert program.stdout.endswith("every promise kept\n")
