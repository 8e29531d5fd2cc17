"""The results of gpu.py's parts in one table for people and one file for programs: DIR/summary.md and DIR/summary.json.

What is aimed at stands in TARGETS, beside what was reached. A backward pass's time is that of training less that of the
forward pass, of the same contestant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import anchors
import end_to_end
import measure
from measure import Row


class Outcome(Protocol):
    """gpu.py's."""

    @property
    def part(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class Target:
    """op, shape: of the rows.  direction: "forward", "backward" or "training".  unit: "TFLOP/s", "TB/s", or "of copy"
    for the share of a copy of the same bytes.  Of an H200; other GPUs have other limits."""

    op: str
    shape: str
    direction: str
    value: float
    unit: str


def _attention(head_dim: int, causal: bool) -> str:
    heads = anchors.HIDDEN // head_dim
    return "anchor " + anchors.attention_name(1, heads, anchors.TOKENS, head_dim, causal)


_BATCH, _HEADS, _GROUPS, _DIM, _KEYS = anchors.DECODE
_SIZES = {
    "rms_norm": f"{anchors.ROWS}x{anchors.WIDTH}",
    "add_rms_norm": f"{anchors.ROWS}x{anchors.WIDTH}",
    "layer_norm": f"{anchors.ROWS}x{anchors.WIDTH}",
    "modulate": f"{anchors.SAMPLES}x{anchors.ROWS // anchors.SAMPLES}x{anchors.WIDTH}",
    "gated_residual": f"{anchors.SAMPLES}x{anchors.ROWS // anchors.SAMPLES}x{anchors.WIDTH}",
}
_FEATURES = "x".join(map(str, anchors.FEATURES))
_NOISES = ("drawn", "given")
TARGETS = [
    Target("attention", _attention(128, False), "forward", 690, "TFLOP/s"),
    Target("attention", _attention(128, True), "forward", 670, "TFLOP/s"),
    Target("attention", _attention(64, False), "forward", 480, "TFLOP/s"),
    Target("attention", _attention(64, True), "forward", 480, "TFLOP/s"),
    Target("attention", _attention(128, False), "backward", 600, "TFLOP/s"),
    Target("attention", _attention(128, True), "backward", 570, "TFLOP/s"),
    *(Target(op, f"anchor {size}", "forward", 4.1, "TB/s") for op, size in _SIZES.items()),
    *(Target(op, f"anchor {size}", "backward", 3.8, "TB/s") for op, size in _SIZES.items()),
    *(Target("flow_interpolate", f"anchor {_FEATURES} {noise}", "forward", 0.9, "of copy") for noise in _NOISES),
    *(Target(op, f"anchor {_FEATURES}", "forward", 0.9, "of copy") for op in ("flow_loss", "flow_step")),
    Target(
        "attention", f"anchor decode {_BATCH}x{_HEADS}x1x{_DIM} of {_GROUPS}x{_KEYS}", "forward", 0.85, "of copy"
    ),
    *(
        Target(
            "linear_cross_entropy", f"anchor {anchors.WORDS}x{anchors.WIDTH} to {anchors.VOCABULARY}", direction, 650,
            "TFLOP/s",
        )
        for direction in ("forward", "training")
    ),
]  # fmt: skip
DIRECTIONS = ("forward", "training")


def rates(row: Row) -> tuple[float, float, float]:
    """Seconds, bytes and operations of one call."""
    seconds = (row.median_us or 0.0) / 1e6
    return seconds, (row.gbps or 0.0) * 1e9 * seconds, (row.tflops or 0.0) * 1e12 * seconds


def reached(target: Target, row: Row | None, forward: Row | None) -> float | None:
    """What a row says of a target, in its unit. row: of training where the target is of a backward pass, and `forward`
    is then that of the forward pass."""
    if row is None or not row.median_us:
        return None
    if target.unit == "of copy":
        return row.limit_share
    seconds, moved, flops = rates(row)
    if target.direction == "backward":
        if forward is None or not forward.median_us or forward.median_us >= row.median_us:
            return None
        seconds, moved, flops = (both - first for both, first in zip(rates(row), rates(forward), strict=True))
    return moved / seconds / 1e12 if target.unit == "TB/s" else flops / seconds / 1e12


def by_target(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each target what our fastest backend reached, and the best peer."""
    found = []
    for target in TARGETS:
        measured = "training" if target.direction == "backward" else target.direction
        table: dict[str, float] = {}
        for row in rows:
            if (row.op, row.shape, row.direction) == (target.op, target.shape, measured) and row.checked:
                same = [x for x in rows if (x.op, x.shape, x.provider) == (row.op, row.shape, row.provider)]
                forward = next((x for x in same if x.direction == "forward" and x.checked), None)
                value = reached(target, row, forward)
                if value is not None:
                    table[row.provider] = value
        ours = {name: value for name, value in table.items() if name in measure.OURS}
        peers = {name: value for name, value in table.items() if name not in measure.OURS}
        best, peer = (max(each, key=lambda name, each=each: each[name], default="") for each in (ours, peers))  # type: ignore[misc]
        found.append(
            {
                **asdict(target), "ours": ours.get(best), "backend": best, "best_peer": peers.get(peer), "peer": peer,
            }
        )  # fmt: skip
    return found


def by_op(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each op and direction: how many times as fast as the best peer ours is at best and at worst, and its share of
    the machine's limit at best and at worst."""
    best: dict[tuple[str, str], list[Row]] = {}
    for group in measure.groups(rows).values():
        ours = [row for row in group if row.provider in measure.OURS and row.median_us and row.checked]
        if ours:
            row = min(ours, key=lambda row: row.median_us or 0)
            best.setdefault((row.op, row.direction), []).append(row)
    found = []
    for (op, direction), group in best.items():
        ratios = sorted(row.ratio_to_best_peer for row in group if row.ratio_to_best_peer)
        shares = sorted(row.limit_share for row in group if row.limit_share)
        found.append(
            {
                "op": op, "direction": direction, "rows": len(group), "behind": sum(ratio < 1 for ratio in ratios),
                "best_ratio": ratios[-1] if ratios else None, "worst_ratio": ratios[0] if ratios else None,
                "worst_share": shares[0] if shares else None, "best_share": shares[-1] if shares else None,
                "backends": sorted({row.provider for row in group}),
            }
        )  # fmt: skip
    return sorted(found, key=lambda each: (each["op"], each["direction"]))


def read_rows(folder: Path, pattern: str) -> list[Row]:
    """The measurements of all files of that pattern, those of a part that was stopped included."""
    found: list[Row] = []
    for path in sorted(folder.glob(pattern)):
        try:
            found += measure.read(path)
        except ValueError:  # being written when its part was stopped
            continue
    return [row for row in found if row.op != "limit"]


def read_object(path: Path) -> dict[str, Any]:
    """A part's JSON object; empty if it has none, or was stopped while writing it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        return {}
    return found


def conformance(paths: Iterable[Path]) -> dict[str, Any]:
    """How many tests passed and failed, and which failed why."""
    last: dict[str, dict[str, Any]] = {}
    for line in (line for path in paths for line in path.read_text().split("\n")[:-1]):
        row = json.loads(line)
        last[row["test"]] = row
    failed = {
        test.partition("::")[2]: row.get("message", "") for test, row in last.items() if row["outcome"] == "failed"
    }
    return {"passed": sum(row["outcome"] == "passed" for row in last.values()), "failed": failed}


def collect(folder: Path, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Everything that the parts left in a folder."""
    rows = read_rows(folder, "ops-*.json")
    networks = [row for name in ("model", "training", "model-compiled") for row in read_rows(folder, f"{name}.json")]
    return {
        "parts": [{key: getattr(one, key) for key in ("part", "status", "reason", "seconds")} for one in outcomes],
        "machine": read_object(folder / "machine.json"),
        "conformance": {
            name: conformance(sorted(folder.glob(f"{name}.*jsonl")))
            for name in sorted({path.name.partition(".")[0] for path in folder.glob("conformance-*.jsonl")})
        },
        "sanitizer": [read_object(path) for path in sorted(folder.glob("sanitizer-*.json"))],
        "targets": by_target(rows),
        "ops": by_op(rows),
        "rows": [asdict(row) for row in rows],
        "networks": [asdict(row) for row in networks],
    }


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if unit == "of copy" else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def markdown(found: dict[str, Any]) -> str:
    gpu, machine = found["machine"].get("gpu", {}), found["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine.get("versions", {}).items())
    limits = ", ".join(
        f"{row['shape']} {row['gbps'] / 1000:.2f} TB/s"
        if row["gbps"]
        else f"{row['dtype']} {row['tflops']:.0f} TFLOP/s"
        for row in machine.get("limits", [])
    )
    text = [f"# {gpu.get('name', 'No GPU was read')}", f"{versions}. Measured: {limits}." if gpu else ""]
    reasons = (
        (each["part"], each["status"], f"{each['seconds']:.0f} s", each["reason"].replace("|", "/"))
        for each in found["parts"]
    )
    text += ["## Parts", _table(("part", "status", "time", "reason"), reasons)]
    if found["conformance"]:
        text.append("## Conformance")
        for name, each in found["conformance"].items():
            text.append(f"{name}: {each['passed']} passed, {len(each['failed'])} failed")
            text += [f"- {test}: {message}" for test, message in each["failed"].items()]
    if any(found["sanitizer"]):
        counts = ((each["tool"], each["calls"], each["reports"]) for each in found["sanitizer"] if each)
        text += ["## compute-sanitizer", _table(("tool", "calls", "reports"), counts)]
    if found["rows"]:
        aims = (
            (
                each["op"], each["shape"].removeprefix("anchor "), each["direction"], each["unit"],
                _number(each["value"], each["unit"]), _number(each["ours"], each["unit"]), each["backend"],
                _number(each["best_peer"], each["unit"]), each["peer"],
            )
            for each in found["targets"]
        )  # fmt: skip
        titles = ("op", "size", "direction", "unit", "aim (H200)", "ours", "backend", "best peer", "peer")
        text += ["## Aims", _table(titles, aims)]
        ops = (
            (
                each["op"], each["direction"], each["rows"], each["behind"], _number(each["best_ratio"]),
                _number(each["worst_ratio"]), _number(each["worst_share"], "of copy"),
                _number(each["best_share"], "of copy"), ", ".join(each["backends"]),
            )
            for each in found["ops"]
        )  # fmt: skip
        titles = ("op", "direction", "rows", "behind", "best ratio", "worst ratio", "least share", "most share", "ours")
        text += ["## Ops: times as fast as the best peer, share of the machine's limit", _table(titles, ops)]
        text += ["## Rows", measure.table(Row(**row) for row in found["rows"])]
    if found["networks"]:
        rows = [Row(**row) for row in found["networks"]]
        text += ["## Networks", end_to_end.table(rows, "share", memory=False)]
    return "\n\n".join(part for part in text if part) + "\n"


def write(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """DIR/summary.json and DIR/summary.md of what there is so far."""
    found = collect(folder, list(outcomes))
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "summary.md").write_text(markdown(found))
