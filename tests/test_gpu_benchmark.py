"""`make gpu` without a GPU: parts with stand-in commands, runs under watch, the summary, a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import anchors
import gpu
import gpu_calls
import gpu_conformance
import gpu_summary
import pytest
import torch
from gpu import Outcome, Part
from measure import Row, compared, write

from blip3o_kernels import OPS, native

ROOT = Path(__file__).parents[1]
COUNT = "open('{name}.count', 'a').write('x')"


def statuses(folder: Path) -> dict[str, str]:
    return {name: outcome.status for name, outcome in gpu.read(folder).items()}


def test_a_part_that_fails_is_listed_and_the_next_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    parts = [
        Part("good", ("-c", f"{COUNT}; print('fine')"), 60),
        Part("bad", ("-c", f"{COUNT}; import sys; sys.exit('no such kernel')"), 60),
        Part("absent", ("-c", "1/0"), 60, "nvcc: not found"),
        Part("last", ("-c", COUNT), 60),
    ]
    assert gpu.run_all(parts, tmp_path, set(), 60, said.append) == 1
    assert statuses(tmp_path) == {"good": "done", "bad": "failed", "absent": "not possible", "last": "done"}
    found = gpu.read(tmp_path)
    assert found["bad"].reason == "status 1: no such kernel" and found["absent"].reason == "nvcc: not found"
    assert (tmp_path / "good.log").read_text() == "fine\n"
    assert "bad: failed: status 1: no such kernel" in said
    summary = (tmp_path / "summary.md").read_text()
    assert "| bad | failed |" in summary and "nvcc: not found" in summary
    assert {row["part"] for row in json.loads((tmp_path / "summary.json").read_text())["parts"]} == set(found)

    assert gpu.run_all(parts, tmp_path, {"last"}, 60, said.append) == 1
    counts = {name: (tmp_path / f"{name}.count").read_text() for name in ("good", "bad", "last")}
    assert counts == {"good": "x", "bad": "xx", "last": "xx"}  # done is done, unless asked for again
    assert "good: done before" in said
    assert gpu.run_all(parts[::3], tmp_path, set(), 60, said.append) == 0


def test_a_part_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import time; time.sleep(3); open('{name}.late', 'w')"
    program = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); print('on', flush=True)"
    )
    part = Part("slow", ("-c", f"{program}; time.sleep(60)"), 1.5)
    begun = time.monotonic()
    outcome = gpu.run(part, tmp_path, 60)
    assert time.monotonic() - begun < 10
    assert outcome.status == "failed" and outcome.reason == "stopped after 2 s: on"
    time.sleep(3)
    assert not (tmp_path / "slow.late").exists()


def test_no_part_is_begun_without_time(tmp_path: Path) -> None:
    parts = [Part("long", ("-c", COUNT), 100)]
    assert gpu.run_all(parts, tmp_path, set(), gpu.LEAST - 1, lambda _: None) == 0
    assert statuses(tmp_path) == {"long": "not begun"} and not (tmp_path / "long.count").exists()


def test_names_may_be_cut_short() -> None:
    known = [Part(name, (), 1) for name in ("machine", "ops-8b-rope", "ops-anchor-rope")]
    assert gpu.chosen(["ops", "machine"], known) == {part.name for part in known} == gpu.chosen(["all"], known)
    assert gpu.chosen(["ops-8b"], known) == {"ops-8b-rope"} and gpu.chosen([], known) == set()
    with pytest.raises(SystemExit, match=r"opps: expected the beginning of one of machine, "):
        gpu.chosen(["opps"], known)


def test_a_foreign_list_of_parts_is_named(tmp_path: Path) -> None:
    for text in ("{", '[{"part": "a", "colour": 1}]', "[3]"):
        (tmp_path / "parts.json").write_text(text)
        with pytest.raises(ValueError, match=r"parts\.json is not a list of parts"):
            gpu.read(tmp_path)


def test_every_op_is_measured_and_every_script_is_there() -> None:
    known = gpu.parts()
    names = [part.name for part in known]
    assert len(set(names)) == len(names)
    assert {f"ops-8b-{op.name}" for op in OPS} <= set(names)
    assert {f"ops-anchor-{name}" for name in anchors.CASES} <= set(names)
    assert all((ROOT / part.command[0]).is_file() for part in known)
    assert sum(part.seconds for part in known[:8]) < 20 * 60  # up to the sanitizers, even if each takes all its time


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: what is tested is how one without ends")
def test_without_a_gpu_it_ends_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2, run.stdout + run.stderr
    assert "no part is possible: no GPU: torch" in run.stdout
    found = gpu.read(tmp_path)
    assert set(found) == {part.name for part in gpu.parts()}
    assert {outcome.status for outcome in found.values()} == {"not possible"}
    assert all(outcome.reason for outcome in found.values())


@pytest.mark.program("tests/gpu_calls.py", "--device", "cpu", "--most", "4096")
def test_the_sanitizers_calls(program: CompletedProcess[str]) -> None:
    """Every op that has CUDA kernels is called, here on its C++."""
    assert program.returncode == 0, program.stdout + program.stderr
    made = dict(line.split(": ") for line in program.stdout.splitlines() if line.endswith(" calls"))
    assert set(made) == {op.name for op in OPS if op.name in native.ON_CUDA}
    assert all(int(text.split()[0]) >= 4 for text in made.values()), made


REPORT = """========= COMPUTE-SANITIZER
rms_norm: 12 calls
========= Invalid __global__ read of size 4 bytes
=========     at void blip3o::rms_forward<(int)32>(blip3o_rms_norm_arguments)+0x1b0
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x1]
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::copy<float>()+0x10
=========
12 calls in all
========= ERROR SUMMARY: 2 errors
"""


def test_what_a_sanitizer_reports_is_counted() -> None:
    found = gpu_calls.reports("memcheck", REPORT)
    assert len(found) == 2 and found[0].startswith(
        "Invalid __global__ read of size 4 bytes\nat void blip3o::rms_forward"
    )
    assert "Host Frame" not in found[0]
    assert gpu_calls.reports("initcheck", REPORT) == found[:1]  # torch's own kernels are its own affair
    assert not gpu_calls.reports("racecheck", "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards\n")


def test_a_sanitizer_that_reports_or_breaks_fails_its_part(tmp_path: Path) -> None:
    program, out = tmp_path / "compute-sanitizer", tmp_path / "memcheck.json"
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("kernels", "tests", ""))
    command = [sys.executable, "tests/gpu_calls.py", "--sanitize", "memcheck", "--json", str(out)]

    def run(text: str) -> CompletedProcess[str]:
        (tmp_path / "text").write_text(text)
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'text'}\n")
        program.chmod(0o755)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert run(REPORT).returncode == 1
    found = json.loads(out.read_text())
    assert (found["reports"], found["calls"], found["tool"]) == (2, 12, "memcheck")
    broken = run("========= COMPUTE-SANITIZER\n========= Device not supported\n")
    assert broken.returncode == 1
    refused = run("no such device\n")
    assert refused.returncode == 1 and "memcheck ended with status 0: no such device" in refused.stderr


STAND_IN = """
import os, time
import pytest

def test_good(): pass
def test_wrong(): assert 1 == 2
def test_hangs(): time.sleep(600)
def test_crashes(): os._exit(9)
def test_breaks_the_gpu(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): open(os.environ["COUNT"], "a").write("x")
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
def test_other(): pass
"""


def test_a_test_that_hangs_or_breaks_costs_itself_alone(tmp_path: Path) -> None:
    tests, out, count = tmp_path / "test_stand_in.py", tmp_path / "out.jsonl", tmp_path / "count"
    tests.write_text(STAND_IN)
    command = [sys.executable, "tests/gpu_conformance.py", "--out", str(out), "--seconds", "4", str(tests)]
    command += ["--keyword", "stand_in and not other"]

    def run() -> CompletedProcess[str]:
        environment = {**os.environ, "COUNT": str(count)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 1 and "2 passed, 4 failed, 1 skipped" in first.stdout, first.stdout + first.stderr
    found = {name.partition("::")[2]: row for name, row in gpu_conformance.results(out).items()}
    assert found["test_hangs"]["message"] == "the process ran longer than 4 s"
    assert found["test_crashes"]["message"] == "the process ended with status 9"
    assert "illegal memory access" in found["test_breaks_the_gpu"]["message"]
    assert "assert 1 == 2" in found["test_wrong"]["message"] and count.read_text() == "x"
    assert gpu_summary.conformance([out])["passed"] == 2 and len(gpu_summary.conformance([out])["failed"]) == 4

    tests.write_text("def test_good(): assert 0\ndef test_after(): assert 0\ndef test_wrong(): pass\n")
    second = run()
    assert second.returncode == 0 and "3 passed, 0 failed" in second.stdout, second.stdout  # what has passed is not run

    command += ["--jobs", "2"]
    tests.write_text(STAND_IN.replace("test_hangs", "no_hanging").replace("test_crashes", "no_crash"))
    both = run()
    assert both.returncode == 1 and "2 passed, 2 failed, 1 skipped" in both.stdout, both.stdout + both.stderr
    parts = sorted(tmp_path.glob("out.*.jsonl"))
    assert len(parts) == 2 and gpu_summary.conformance(parts)["passed"] == 2


def row(op: str, shape: str, direction: str, provider: str, median: float, **more: object) -> Row:
    found = Row(op, provider, "cuda", "bfloat16", shape, direction, median, median, median, checked=True)
    return replace(found, **more)  # type: ignore[arg-type]


def test_the_summary_says_what_was_aimed_at_and_reached(tmp_path: Path) -> None:
    target = next(each for each in gpu_summary.TARGETS if each.direction == "backward" and each.unit == "TFLOP/s")
    rows = [
        *compared(
            [
                row(target.op, target.shape, "forward", "native", 100.0, tflops=500.0, limit_share=0.5),
                row(target.op, target.shape, "forward", "sdpa cudnn", 80.0, tflops=625.0),
                row(target.op, target.shape, "forward", "wrong", 1.0, tflops=9e9, checked=False),
            ]
        ),
        *compared(
            [
                row(target.op, target.shape, "training", "native", 400.0, tflops=437.5),
                row(target.op, target.shape, "training", "sdpa cudnn", 500.0, tflops=350.0),
            ]
        ),
    ]
    write(tmp_path / "ops-anchor-attention.json", rows)
    (tmp_path / "ops-8b-rope.json").write_text('[\n{"op": "ro')  # its part was stopped
    gpu_summary.write(tmp_path, [Outcome("ops-anchor-attention", "done", seconds=3.0)])
    found = json.loads((tmp_path / "summary.json").read_text())
    aims = {(each["op"], each["shape"], each["direction"]): each for each in found["targets"]}
    forward = aims[target.op, target.shape, "forward"]
    assert (forward["ours"], forward["backend"], forward["best_peer"], forward["peer"]) == (
        500,
        "native",
        625,
        "sdpa cudnn",
    )
    backward = aims[target.op, target.shape, "backward"]  # 125 Gflop in 300 us; the peer's in 420
    assert backward["ours"] == pytest.approx(125e-3 / 300e-6) and backward["best_peer"] == pytest.approx(
        125e-3 / 420e-6
    )
    assert [(each["direction"], each["best_ratio"], each["behind"]) for each in found["ops"]] == [
        ("forward", 0.8, 1), ("training", 1.25, 0),
    ]  # fmt: skip
    text = (tmp_path / "summary.md").read_text()
    assert "| attention | 1x16x16384x128 | backward | TFLOP/s | 600 | 417 | native |" in text


def test_targets_are_rows_that_are_measured() -> None:
    measured = {(case.op, case.shape): case for case in anchors.cases([op.name for op in OPS])}
    for target in gpu_summary.TARGETS:
        case = measured[target.op, target.shape]
        assert case.trained or target.direction == "forward"
