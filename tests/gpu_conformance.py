"""tests/test_ops.py on the GPU, test by test: one that hangs, or leaves the GPU's context broken, costs itself alone.

    python tests/gpu_conformance.py --out F [--keyword native-cuda] [--seconds 60]

The tests run in a process that is stopped when one of them takes longer than --seconds, and started again for the rest
after that, after a crash and after a CUDA error, behind which nothing in a process works. F is a line of JSON for each
test, written as it ends; tests that F says have passed are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BROKEN = ("CUDA error", "AcceleratorError", "CUDNN_STATUS", "CUBLAS_STATUS")  # what a sticky error's text holds
LONGEST = 300  # characters of a failure that are kept
RESTARTS = 25


class Reporter:
    """A plugin of pytest: leaves out what has ended, writes down what starts and what ends."""

    def __init__(self, out: Path, job: int, jobs: int) -> None:
        self.job, self.jobs = job, jobs
        self.out, self.ended = out, {row["test"] for row in read(out) if row["outcome"] != "started"}
        self.broken = False

    def write(self, **row: object) -> None:
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        mine = [item for item in items[self.job :: self.jobs] if item.nodeid not in self.ended]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="started", at=time.time())

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        text = "" if report.passed else str(report.longrepr)
        self.broken |= any(word in text for word in BROKEN)
        message = next((line[2:] for line in text.splitlines() if line.startswith("E ")), text[-LONGEST:]).strip()
        self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message[:LONGEST])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.broken:
            sys.stdout.flush()
            os._exit(3)  # an orderly end would wait for the GPU


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut off is left out."""
    if not out.exists():
        return []
    lines = out.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def results(out: Path) -> dict[str, dict[str, Any]]:
    """The last row of each test."""
    return {row["test"]: row for row in read(out)}


def inside(options: argparse.Namespace) -> int:
    import pytest

    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", options.keyword, *options.tests]
    return int(pytest.main(arguments, plugins=[Reporter(options.out, options.job, options.jobs)]))


def watched(options: argparse.Namespace) -> int:
    """Runs what is left in one process; its status, or that of a killed one if a test took too long."""
    command = [sys.executable, __file__, "--inside", "--out", str(options.out), "--keyword", options.keyword]
    command += ["--job", str(options.job), "--jobs", str(options.jobs)]
    process = subprocess.Popen([*command, *options.tests], cwd=ROOT, start_new_session=True)
    began = time.time()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            last = (read(options.out) or [{"outcome": ""}])[-1]
            if last["outcome"] == "started" and time.time() - max(last["at"], began) > options.seconds:
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def all_of_job(options: argparse.Namespace) -> int:
    """Runs a job's tests in as many processes as it takes; the status of the last."""
    passed = [row for row in read(options.out) if row["outcome"] == "passed"]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in passed), encoding="utf-8")
    status = 2
    for _ in range(RESTARTS):
        status = watched(options)
        last = (read(options.out) or [{"outcome": ""}])[-1]
        if last["outcome"] == "started":
            late = status == -signal.SIGKILL
            why = f"ran longer than {options.seconds:g} s" if late else f"ended with status {status}"
            row = {"test": last["test"], "outcome": "failed", "message": f"the process {why}"}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        elif status != 3:
            break
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keyword", default="cuda", help="pytest's -k")
    parser.add_argument("--seconds", type=float, default=60.0, help="of one test")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes beside each other; then of F.jsonl there are F.0.jsonl on"
    )
    parser.add_argument("--job", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("tests", nargs="*", default=["tests/test_ops.py"])
    options = parser.parse_args()
    out = options.out.absolute()
    if options.inside:
        options.out = out
        sys.exit(inside(options))
    out.parent.mkdir(parents=True, exist_ok=True)
    outs = [out.with_suffix(f".{job}{out.suffix}") for job in range(options.jobs)] if options.jobs > 1 else [out]
    jobs = [argparse.Namespace(**{**vars(options), "job": job, "out": file}) for job, file in enumerate(outs)]
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(all_of_job, jobs))
    found = [row["outcome"] for file in outs for row in results(file).values()]
    print(f"{found.count('passed')} passed, {found.count('failed')} failed, {found.count('skipped')} skipped")
    sys.exit(0 if found.count("passed") and set(found) <= {"passed", "skipped"} and set(statuses) <= {0, 5} else 1)


if __name__ == "__main__":
    main()
