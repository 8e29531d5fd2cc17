"""Every additive term of every backward pass, dropped once, breaks the conformance bound (tests/faults.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_dropped_term_is_noticed(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason='needs triton: pip install "blip3o[triton]"')
    run = subprocess.run([sys.executable, str(FAULTS), backend], capture_output=True, text=True, check=False)
    assert run.returncode == 0, "\n".join(line for line in run.stdout.splitlines() if "MISSED" in line) + run.stderr
    dropped = re.search(rf"{backend}: (\d+) terms dropped, 0 missed", run.stdout)
    assert dropped and int(dropped[1]) >= 15, run.stdout
