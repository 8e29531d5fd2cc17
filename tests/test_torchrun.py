"""Training under torchrun, as a user starts it, when one process dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from blip3o.train.recipe import Recipe
from blip3o.train.run import Run

STEPS = 40
PATIENCE = 300.0  # a loaded machine is slow to start a process


def torchrun(folder: Path) -> subprocess.Popen[str]:
    """Two processes that save after every step and share the weights out by FSDP."""
    program = [ROOT / "tests/train_tiny.py", ROOT / "tests/tiny.toml", "--out", folder, "--stage", "generation"]
    changes = [f"generation.steps={STEPS}", "generation.parallel=fsdp", "generation.frozen=sharded"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *program, *changes],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def logged(folder: Path) -> list[dict[str, object]]:
    *lines, _ = (folder / "log.jsonl").read_text().split("\n")  # the last may be cut short
    return [row for row in map(json.loads, lines) if row["stage"] == "generation"]


def test_kill_9_of_one_process(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    """torchrun ends the other one; the next start goes on from the last commit, here on one process."""
    folder, uncut = (Path(shutil.copytree(snapshots / "understanding", tmp_path / name)) for name in ("run", "uncut"))
    process = torchrun(folder)
    deadline = time.monotonic() + PATIENCE
    while len(logged(folder)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and len(workers) == 2, errors
    assert not [number for number in workers if Path(f"/proc/{number}").exists()]

    chosen = replace(tiny["generation"], steps=STEPS)
    run = Run(folder, "tiny")
    assert (run.stage, run.step > 2, run.step < STEPS) == ("generation", True, True)
    for place in (folder, uncut):
        Run(place, "tiny").run_stage("generation", chosen, lambda _: None)
        assert not [path for path in place.iterdir() if path.suffix in (".new", ".old")]
    losses, expected = ([row["loss"] for row in logged(place)] for place in (folder, uncut))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-6)
