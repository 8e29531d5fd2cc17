"""The CUDA kernels compute what the ops' contracts say, thread by thread on the host, and planted faults are found."""

from __future__ import annotations

import re
from subprocess import CompletedProcess

import pytest

from blip3o_kernels import native


def all_well(program: CompletedProcess[str], least: int, ops: bool = True) -> None:
    """`least`: fewer faults than that would mean that they are no longer found in the sources."""
    assert program.returncode == 0, program.stdout + program.stderr
    for op in native.ON_CUDA if ops else ():
        if not op.endswith("_backward"):
            assert re.search(rf"^{op}: [1-9]\d* samples$", program.stdout, re.MULTILINE)
    faults = re.search(r"^(\d+) faults, 0 wrong or missed", program.stdout, re.MULTILINE)
    assert faults and int(faults[1]) >= least, program.stdout


@pytest.mark.program("tests/cuda_on_host.py", "races")
def test_ordered_by_barriers(program: CompletedProcess[str]) -> None:
    all_well(program, 0)


@pytest.mark.gpu_code
@pytest.mark.program("tests/cuda_on_host.py", "memory", "--faults", "12")
def test_within_bounds_and_a_step_too_far_is_noticed(program: CompletedProcess[str]) -> None:
    all_well(program, 12)


@pytest.mark.gpu_code
@pytest.mark.program("tests/cuda_on_host.py", "races", "--faults", "12", "--op", "attention", "layer_norm", "flow_loss")
def test_a_missing_barrier_is_noticed(program: CompletedProcess[str]) -> None:
    all_well(program, 12, ops=False)


@pytest.mark.gpu_code
@pytest.mark.program("tests/hopper_on_host.py", "memory", "--faults", "6")
def test_hopper_within_bounds_and_every_element_is_written(program: CompletedProcess[str]) -> None:
    all_well(program, 6, ops=False)


@pytest.mark.gpu_code
@pytest.mark.program("tests/hopper_on_host.py", "races", "--faults", "12")
def test_hopper_waits_for_what_it_uses_and_a_missing_wait_is_noticed(program: CompletedProcess[str]) -> None:
    all_well(program, 12, ops=False)
