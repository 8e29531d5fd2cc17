"""The attention kernels for sm_90a: right on the host at all sizes, and the faults of asynchronous code are noticed."""

from __future__ import annotations

import re
from subprocess import CompletedProcess

import pytest


def all_well(program: CompletedProcess[str], least: int) -> None:
    assert program.returncode == 0, program.stdout + program.stderr
    faults = re.search(r"^(\d+) faults, 0 wrong or missed", program.stdout, re.MULTILINE)
    assert faults and int(faults[1]) >= least, program.stdout


@pytest.mark.program("tests/hopper_on_host.py", "memory", "--faults")
def test_within_bounds_and_every_element_is_written(program: CompletedProcess[str]) -> None:
    all_well(program, 8)


@pytest.mark.program("tests/hopper_on_host.py", "races", "--faults")
def test_waits_for_what_it_uses_and_a_missing_wait_is_noticed(program: CompletedProcess[str]) -> None:
    all_well(program, 40)
