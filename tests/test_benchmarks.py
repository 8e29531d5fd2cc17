"""The benchmark: that it measures what it says, tells a wrong contestant from a right one, and sees what got slower."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import anchors
import limits
import loading
import measure
import ops
import peers
import pytest
import roofline
import rows
import torch
from measure import Row, Work

from blip3o_kernels import OPS
from blip3o_kernels.samples import Draw
from blip3o_kernels.workloads import Untouched

ROOT = Path(__file__).parents[1]
EVERYTHING = list(rows.cases([op.name for op in OPS], ["nano", "4b", "8b"], list(rows.PHASES), "cpu"))
NANO = [case for case in EVERYTHING if case.shape.startswith("nano")]


def row(provider: str, median: float | None, **more: object) -> Row:
    row = Row("rms_norm", provider, "cpu", "float32", "nano decode", "forward", median, median, median, checked=True)
    return replace(row, **more)  # type: ignore[arg-type]


def test_every_op_has_rows_at_every_preset_and_peers() -> None:
    for preset in ("nano", "4b", "8b"):
        assert {case.op for case in EVERYTHING if case.shape.startswith(preset)} == {op.name for op in OPS}
    assert len({(case.op, case.shape) for case in EVERYTHING}) == len(EVERYTHING)
    for op in OPS:
        names = [peer.name for peer in peers.peers(op.name, "cpu", drawn=False)]
        assert {"reference", "compile", "compile max-autotune"} <= set(names) and len(names) == len(set(names))
        assert all(peer.function or peer.reason for peer in peers.peers(op.name, "cpu", drawn=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NANO, ids=lambda case: f"{case.op} {case.shape}")
def test_peers_compute_what_the_op_computes(case: rows.Case, dtype: torch.dtype) -> None:
    op = next(op for op in OPS if op.name == case.op)
    for training in {False, case.trained}:
        with torch.set_grad_enabled(training):
            contest = ops.Contest(op, case, dtype, "cpu", training)
            wanted = [*peers.PEERS[op.name], "reference", "sdpa math", "sdpa flash"]
            x = contest.inputs[0][0][0]
            assert isinstance(x, torch.Tensor)
            found = [peer for peer in ops.contestants(op, case, x, training, wanted) if peer.function]
            assert {"native", "reference"} < {peer.name for peer in found}
            wrong = {peer.name: contest.wrong(peer.function, peer.random) for peer in found}  # type: ignore[arg-type]
            assert not any(wrong.values()), wrong
            assert "off by" in contest.wrong(lambda *a, **k: spoilt(op.function(*a, **k)), random=False)


def test_anchors_are_calls_of_the_ops() -> None:
    cases = list(anchors.cases([op.name for op in OPS]))
    assert len({(case.op, case.shape) for case in cases}) == len(cases)
    for case in cases:
        op = next(op for op in OPS if op.name == case.op)
        args, kwargs = case.make(Untouched(torch.bfloat16, "cpu"))
        arguments = inspect.signature(op.function).bind(*args, **kwargs).arguments
        assert rows.work(case, dict(arguments), [], op.differentiable)["training"].bytes > 2**26
    names = {case.shape for case in cases if case.op == "attention"}
    for head_dim in (64, 128):
        for tokens in (2048, 4096, 8192, 16384):
            sizes = (16384 // tokens, 2048 // head_dim, tokens, head_dim)
            assert {f"anchor {anchors.attention_name(*sizes, causal)}" for causal in (False, True)} <= names


def test_peers_on_cuda_are_there_or_say_why_not() -> None:
    for op in OPS:
        found = {peer.name: peer for peer in peers.peers(op.name, "cuda", drawn=False)}
        assert {"reference", "compile"} <= set(found)
        assert all(peer.function or peer.reason for peer in found.values())
        assert not any(peer.forward_only for peer in found.values())
        if op.name == "attention":
            assert all(found[name].function for name in (*peers.SDPA, "functional", "flex"))
            assert {"flash-attn", "flash-attn 3"} <= set(found)


def spoilt(result: object) -> object:
    results = [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]
    return [results[0] * 1.25, *results[1:]]


def test_work_counts_each_tensor_once() -> None:
    case = next(case for case in NANO if case.op == "rms_norm" and case.trained)
    args, kwargs = case.make(Draw(torch.float32, "cpu"))
    x, weight = args[:2]
    assert isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)
    work = rows.work(case, {"x": x, "weight": weight, **kwargs}, [x], ("x", "weight"))
    assert work["forward"] == Work(bytes=4 * (2 * x.numel() + weight.numel()))
    assert work["training"].bytes == 4 * (2 * x.numel() + weight.numel() + 3 * x.numel() + 2 * weight.numel())


def test_turns_are_taken_in_turn() -> None:
    order: list[str] = []
    calls = {name: lambda _, name=name: (order.append(name), [i * i for i in range(2000)]) for name in "abc"}
    times = measure.take_turns(calls, "cpu", seconds=0.01, least=6, most=6)  # type: ignore[arg-type]
    assert all(len(values) == 6 and min(values) > 0 for values in times.values())
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches >= 6 * 3 - 1 and len(Counter(order)) == 3


@pytest.mark.parametrize(
    ("seconds", "calls", "turns"),
    [
        ({"a": 0.2, "b": 0.1}, {"a": 8, "b": 8}, {"a": 5, "b": 5}),
        ({"a": 0.2, "b": 0.01}, {"a": 8, "b": 8}, {"a": 5, "b": 5}),  # beaten, but not long
        ({"a": 0.3, "b": 0.2}, {"a": 3, "b": 5}, {"a": 3, "b": 3}),
        ({"a": 3.0, "b": 2.5}, {"a": 2, "b": 2}, {"a": 2, "b": 2}),
        ({"a": 3.0, "b": 1.4, "copy": 0.3}, {"a": 1, "b": 2, "copy": 2}, {"a": 1, "b": 2, "copy": 2}),
    ],
)
def test_long_calls_take_fewer_turns_and_the_first_counts(
    seconds: dict[str, float], calls: dict[str, int], turns: dict[str, int]
) -> None:
    now, order = 0.0, []

    def call(name: str) -> measure.Call:
        def run(_: int) -> None:
            nonlocal now
            now += seconds[name]
            order.append(name)

        return run

    contestants, racing = {name: call(name) for name in seconds}, seconds.keys() - {"copy"}
    times = measure.take_turns(contestants, "cpu", seconds=1e-9, clock=lambda: now, racing=racing)
    assert times == {name: pytest.approx([seconds[name]] * turns[name]) for name in seconds}
    assert Counter(order) == calls


def test_short_calls_fill_a_window() -> None:
    now = 0.0

    def call(_: int) -> None:
        nonlocal now
        now += 1.0e-3

    times = measure.take_turns({"a": call}, "cpu", seconds=1e-9, clock=lambda: now, window=20e-3)
    assert times == {"a": pytest.approx([1e-3] * 5)} and now == pytest.approx((3 + 5 * 20) * 1e-3)


def test_calls_too_short_for_the_clock() -> None:
    assert measure.take_turns({"a": lambda _: None}, "cpu", seconds=0.0, clock=lambda: 1.0) == {"a": [0.0] * 5}


def test_intervals_hold_the_median() -> None:
    assert measure.interval([5.0, 1.0, 3.0]) == (3.0, 1.0, 5.0)
    median, low, high = measure.interval([float(i) for i in range(101)])
    assert median == 50 and 38 <= low < 45 < 55 < high <= 62


def test_ratio_is_to_the_best_peer_that_was_right() -> None:
    found = measure.compared(
        [row("native", 10), row("compile", 8), row("transformers", 30), row("wrong", 1, checked=False)]
    )
    assert [one.ratio_to_best_peer for one in found] == [0.8, None, None, None]
    assert measure.line(found).startswith("| **rms_norm**")  # a peer wins: in bold
    assert measure.line(measure.compared([row("native", 10), row("compile", 30)])).startswith("| rms_norm")
    assert "- liger: not installed" in measure.table([*found, row("liger", None, reason="not installed")])


def test_malloc_keeping_memory_is_a_column() -> None:
    kept = measure.compared([row("native", 10, memory="reused"), row("compile", 15, memory="reused")])
    text = measure.table([*measure.compared([row("native", 10), row("compile", 30)]), *kept])
    assert "| 3.00 | 1.50 |" in text and text.count("rms_norm") == 1
    assert "| 1.50 |" in measure.table(kept)  # such rows alone are a table of their own


def test_what_got_slower_is_told(tmp_path: Path) -> None:
    before = measure.compared([row("native", 10), row("compile", 30)])
    measure.write(tmp_path / "old.json", before)
    assert measure.read(tmp_path / "old.json") == before
    after = measure.compared([row("native", 20), row("compile", 30)])
    assert len(measure.slower(before, after)) == 1 and "2.00 times slower" in measure.slower(before, after)[0]
    busy = measure.compared([row("native", 20), row("compile", 60)])  # the machine was slower, not we
    assert not measure.slower(before, busy) and not measure.slower(after, before)
    for text in ("{", "[3]", '[{"op": 1, "colour": 2}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            measure.read(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="none at"):
        measure.read(tmp_path / "absent.json")


def test_limits_bind_by_what_is_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_small", lambda dtype: 1e-3)
    times = {limits.COPY: [1e-3], limits.PRODUCT: [2e-3]}
    assert limits.seconds(Work(bytes=2**20, flops=2 * 2 * limits.SIDE["cpu"] ** 3), times, "cpu", torch.float32) == 4e-3
    assert limits.seconds(Work(bytes=2**20, flops=limits.SIDE["cpu"] ** 3 / 50), times, "cpu", torch.float32) == 1e-3


def test_rows_that_torch_is_too_slow_for_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip without AVX-512 a call of linear_cross_entropy at 4b takes torch two minutes in bfloat16."""
    monkeypatch.setattr(limits, "_small", lambda dtype: {torch.float32: 4e-4, torch.bfloat16: 5e-2}[dtype])
    options = argparse.Namespace(device="cpu", memory="fresh")
    op = next(op for op in OPS if op.name == "linear_cross_entropy")
    kept = []
    for case in (case for case in EVERYTHING if case.op in ("linear_cross_entropy", "rms_norm")):
        for dtype in (torch.float32, torch.bfloat16):
            row = ops.left_out(op, case, dtype, False, options)
            if row is None:
                kept.append((case.op, case.shape.split()[0], dtype))
            else:
                assert row.median_us is None and "no fast bfloat16 products" in row.reason
                assert row.reason in measure.table([row])
    assert ("linear_cross_entropy", "4b", torch.float32) in kept and ("rms_norm", "8b", torch.bfloat16) in kept
    assert ("linear_cross_entropy", "4b", torch.bfloat16) not in kept
    assert limits.product_flops("cpu", torch.bfloat16) < 1e-2 * limits.product_flops("cpu", torch.float32)


def test_the_program(tmp_path: Path) -> None:
    """One op, as a user would run it, twice: the second run is compared with the first."""
    command = [sys.executable, "benchmarks/ops.py", "--op", "swiglu", "--presets", "nano", "--seconds", "0.01"]
    command += ["--peers", "transformers", "reference", "--dtype", "float32", "--json", str(tmp_path / "b.json")]
    first = subprocess.run(
        [*command, "--plot", str(tmp_path), "--markdown", str(tmp_path / "b.md")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = measure.read(tmp_path / "b.json")
    assert {(one.shape.split()[1], one.direction) for one in found if one.op == "swiglu"} == {
        ("decode", "forward"), ("train", "forward"), ("train", "training"),
    }  # fmt: skip
    ours = [one for one in found if one.provider == "native"]
    assert len(ours) == 3 and all(one.ratio_to_best_peer and one.limit_share and one.checked for one in ours)
    assert {
        "op",
        "provider",
        "device",
        "dtype",
        "shape",
        "direction",
        "median_us",
        "low_us",
        "high_us",
        "gbps",
        "tflops",
    } <= set(json.loads((tmp_path / "b.json").read_text())[0])
    assert "| swiglu | float32 |" in first.stdout.replace("**", "")
    assert "3 rows of ours" in first.stdout and first.stdout.strip() == (tmp_path / "b.md").read_text().strip()
    assert (tmp_path / "roofline_float32.svg").read_text().count("<circle") > 3
    again = subprocess.run(
        [*command, "--compare", str(tmp_path / "b.json")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"rows slower than in {tmp_path / 'b.json'}" in again.stdout
    wrong = subprocess.run([*command, "--peers", "apex"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "transformers" in wrong.stderr and "apex" in wrong.stderr


def test_an_op_has_its_colour_in_every_plot(tmp_path: Path) -> None:
    timed = {"gbps": 1.0, "tflops": 1.0, "intensity": 1.0}
    rows = [row("native", 1, op="rope", **timed), row("native", 1, op="swiglu", **timed)]
    rows += [row("native", 1, op="swiglu", **timed, dtype="bfloat16")]
    rows += [row("copy", 1, op="limit", dtype=dtype, gbps=1.0, tflops=1.0) for dtype in ("float32", "bfloat16")]
    found = [re.findall(r'fill="([^"]+)"/><text[^>]*>swiglu<', x.read_text()) for x in roofline.plot(tmp_path, rows)]
    assert len(found) == 2 and found[0] == found[1] != []


def test_a_plot_needs_the_limits() -> None:
    with pytest.raises(ValueError, match="limits"):
        roofline.plot(Path("unused"), [row("native", 1)])


def test_the_benchmark_of_loading() -> None:
    head, _, *found = loading.measure([32], [0, 2], seconds=0.02, batch=4)
    assert len(found) == 4 and all(line.count("|") == head.count("|") for line in found)
    assert all(float(line.split("|")[4]) > 0 for line in found)
