"""The networks' benchmarks: that they run, that their plans agree, and that a wrong plan is not timed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import end_to_end
import limits
import measure
import model
import plans
import pytest
import torch
import training
from measure import Row
from model import Contest
from torch import Tensor

ROOT = Path(__file__).parents[1]


def row(provider: str, median: float, **more: object) -> Row:
    found = Row("text", provider, "cpu", "float32", "nano", "forward", median, median, median, checked=True)
    return replace(found, **more)  # type: ignore[arg-type]


def test_ratios_are_of_the_faster_version_of_each() -> None:
    rows = [
        row("native", 20, peak_mib=30.0), row("native compile", 10, peak_mib=40.0),
        row("plain official", 40), row("plain official compile", 30, peak_mib=80.0),
        row("plain cached", 9, peak_mib=50.0), row("plain cached compile", 1, checked=False),
    ]  # fmt: skip
    assert end_to_end.ratios(rows, "official") == (3.0, 0.5)
    assert end_to_end.ratios(rows, "cached") == (0.9, 0.8)
    line = end_to_end.table(rows, "of the limit", memory=True).splitlines()[2]
    assert line.startswith("| **text** |") and "**compile 0.01**" in line and "**3.00**" in line and "**0.80**" in line


@pytest.mark.parametrize(("script", "tasks"), [(model, ["--tasks=text"]), (training, ["--stages=generation"])])
def test_what_torch_is_too_slow_for_is_left_out(
    script: ModuleType, tasks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "_small", lambda dtype: {torch.float32: 4e-4, torch.bfloat16: 5.0}[dtype])
    monkeypatch.setattr("sys.argv", ["", "--presets=nano", "--dtype=bfloat16", *tasks])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert any("| bfloat16 | nano" in line and "| - | - | - | - |" in line for line in lines)
    assert "it has no fast bfloat16 products on this chip" in lines[-1]


@pytest.mark.parametrize("script", ["model.py", "training.py"])
def test_the_programs(script: str, tmp_path: Path) -> None:
    """As a user would run them, on a few rows; a second run is compared with the first."""
    chosen = ["--tasks", "decode", "dit step"] if script == "model.py" else ["--stages", "understanding"]
    command = [sys.executable, f"benchmarks/{script}", "--presets", "nano", "--dtype", "float32", *chosen]
    command += ["--no-compile", "--seconds", "0.01", "--json", str(tmp_path / "b.json")]
    first = subprocess.run(
        [*command, "--markdown", str(tmp_path / "b.md")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = measure.read(tmp_path / "b.json")
    tasks = {"decode", "dit step"} if script == "model.py" else {"understanding"}
    assert {(one.op, one.provider) for one in found} == {
        (task, provider) for task in tasks for provider in ("native", "plain official", "plain cached")
    }
    assert all(one.checked and one.median_us and one.limit_share for one in found)
    assert all(bool(one.peak_mib) is (script == "training.py") for one in found)
    assert first.stdout.strip() == (
        tmp_path / "b.md"
    ).read_text().strip() and "| float32 | nano" in first.stdout.replace("*", "")
    if script == "training.py":  # which takes longer, and compares by the same lines
        return
    again = subprocess.run(
        [*command, "--compare", str(tmp_path / "b.json")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"rows slower than in {tmp_path / 'b.json'}" in again.stdout


def test_a_plan_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stops the run, a peer is listed with the reason."""
    with torch.inference_mode():
        contest = Contest("nano", torch.float32)
        expected = [contest.call("prefill", contest.contestant("plain official"))()]
        monkeypatch.setattr(plans.Cached, "prefill", lambda self, ids: plans.Official.prefill(self, ids) + 1)
        monkeypatch.setattr(plans.Native, "prefill", lambda self, ids: expected[0] + 1)

        def results(provider: str) -> list[Tensor]:
            return [contest.call("prefill", contest.contestant(provider))()]

        peer = end_to_end.checked(row("plain cached", 1), lambda: results("plain cached"), expected, 1e-3)
        assert not peer.checked and peer.reason.startswith("off by")
        with pytest.raises(AssertionError, match="native off by"):
            end_to_end.checked(row("native", 1), lambda: results("native"), expected, 1e-3)
