"""The Triton bodies without a GPU: their numbers in the interpreter, their code compiled ahead of time for six GPUs."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason='needs triton: pip install "blip3o[triton]"')
import gpu_code  # noqa: E402
import triton.language as tl  # noqa: E402

from blip3o_kernels import OPS, ops  # noqa: E402

ROOT = Path(__file__).parents[1]


BODIES = [body for op in OPS for body in op.bodies if (body.backend, body.device) == ("triton", "cpu")]


@pytest.mark.program(
    "-m", "pytest", "-q", "tests/test_ops.py", "-k", "conformance and triton-cpu", TRITON_INTERPRET="1"
)
def test_conformance_in_the_interpreter(program: subprocess.CompletedProcess[str]) -> None:
    """tests/test_ops.py once more, with Triton's interpreter on: then the bodies run on a CPU and take part."""
    assert program.returncode == 0, program.stdout + program.stderr
    expected = sum(len(body.dtypes) for body in BODIES)
    assert re.search(rf"\b{expected} passed, \d+ deselected", program.stdout), program.stdout


@pytest.mark.program("-m", "pytest", "-q", "tests/test_memory.py", TRITON_INTERPRET="1")
def test_memory_in_the_interpreter(program: subprocess.CompletedProcess[str]) -> None:
    """tests/test_memory.py too."""
    assert program.returncode == 0, program.stdout + program.stderr
    assert " failed" not in program.stdout and re.search(r"\b\d+ passed", program.stdout), program.stdout


@pytest.mark.program("-m", "pytest", "-q", "tests/test_interop.py", TRITON_INTERPRET="1")
def test_interop_in_the_interpreter(program: subprocess.CompletedProcess[str]) -> None:
    """tests/test_interop.py too."""
    assert program.returncode == 0, program.stdout + program.stderr
    assert " failed" not in program.stdout and re.search(r"\b\d+ passed", program.stdout), program.stdout


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("empty_cache")
def test_machine_code_of_one_kernel() -> None:
    """`make check-gpu-code` does this for all kernels: compiled for six GPUs, measured, held to committed limits."""
    jobs = [
        job
        for job in gpu_code.jobs_of([ops.rms_norm.OP])
        if job.kernel == "rms_norm._forward_kernel" and job.variant.startswith("bf16") and "BLOCK=4096" in job.variant
    ]
    assert {job.target for job in jobs} == set(gpu_code.TARGETS)
    found = gpu_code.measure_all(jobs, processes=1)
    assert not gpu_code.check(found, json.loads(gpu_code.LIMITS.read_text()))
    for key, code in found.items():
        assert code.registers and code.load16 and code.store16 and not code.spills, key


@triton.jit
def _greedy_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """Every value is needed after the sum of all of them: far more than a thread has registers."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    tl.store(y_ptr + columns, x - tl.sum(x, axis=0))


@pytest.mark.usefixtures("empty_cache")
def test_machine_code_can_fail() -> None:
    with gpu_code.recorded() as jobs:
        x = torch.empty(16384)
        _greedy_kernel[(1,)](x, x, BLOCK=16384, num_warps=1)
    chosen = [job for job in jobs.values() if job.target in ("sm_90", "gfx1100")]
    found = gpu_code.measure_all(chosen, processes=1)
    assert len(found) == 2

    def objections(limit: dict[str, object], **measured: int) -> list[str]:
        """To the two pieces, with limits that fit but for `limit`, and with numbers that are theirs but for some."""
        limits = gpu_code.updated(found, {"triton": "", "code": {}}, everything=True)
        for fitting in limits["code"].values():
            fitting.update(limit)
        return gpu_code.check({key: replace(code, **measured) for key, code in found.items()}, limits)

    def both(lines: list[str], words: str) -> bool:
        return len(lines) == 2 and all(words in line for line in lines)

    allowed: dict[str, object] = {"spills": 10**6, "reason": "this test"}
    assert both(objections({}), "spills") and both(objections({"spills": 10**6}), "spills")
    assert not objections(allowed)
    assert both(objections({**allowed, "registers": 8}), "limit 8")
    assert both(objections({**allowed, "holds": ["matrix"]}), "holds no matrix")
    assert len(objections(allowed, shared=2**20)) == 4, "more than the limit, and more than the GPU has"
    nothing = {"triton": triton.__version__, "code": {}}
    assert len([line for line in gpu_code.check(found, nothing) if "--update" in line]) == 2
    other = {"triton": "0", "code": {}}
    assert both(gpu_code.check(found, other), "spills")
