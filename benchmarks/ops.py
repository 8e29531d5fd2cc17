"""Every op beside its peers: checked, timed in turn, held against what the machine can do.

    python benchmarks/ops.py [--op rms_norm ...] [--dtype float32 ...] [--shapes decode|train|all|anchor]
                             [--presets nano ...] [--peers compile ...] [--device cuda] [--json F] [--markdown F]
                             [--plot DIR] [--compare OLD]

First each result is checked against the reference. Then all contestants of a row are timed in turn on the same inputs,
which are copied until they are larger than the caches; results are allocated as a user's call allocates them. In
"training" the backward pass follows the forward one. Our large results live in memory that we keep, as in any process
(blip3o_kernels/memory.py); `--memory reused` lets malloc keep freed memory, so that all contestants do,
and `both` adds that as a second column for the large rows, 8b's memory-bound ones in training.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anchors
import limits
import measure
import rows
import torch
from contest import Contest
from measure import Row, progress
from peers import Peer, peers
from torch import Tensor

from blip3o_kernels import OPS, keep_freed_memory, use
from blip3o_kernels.dispatch import Op, choose, refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = 2  # processes that compile
COMPILED = ("compile", "compile max-autotune", "flex")  # peers that Inductor compiles


def contestants(op: Op, case: rows.Case, x: Tensor, training: bool, wanted: list[str]) -> Iterator[Peer]:
    """Our backends, then the peers; those that are not wanted are left out."""
    device = x.device.type
    for backend in measure.BACKENDS:
        reason = refusal(op, backend, device, x.dtype)
        if reason or backend == choose(op, x):  # chosen without being forced, as a user's call would be
            yield Peer(backend, None if reason else op.function, reason)
            continue

        def on_backend(*args: object, backend: str = backend, **kwargs: object) -> object:
            with use(backend):
                return op.function(*args, **kwargs)

        yield Peer(backend, on_backend)
    for peer in peers(op.name, device, drawn="drawn" in case.shape or op.name == "flow_timesteps"):
        if wanted and peer.name not in wanted:
            continue
        if training and peer.forward_only:
            peer = replace(peer, function=None, reason="has no backward pass on a CPU")
        yield peer


def compile_ahead() -> None:
    """What Inductor compiles, in PARTS processes, which leave it in its cache on disk: two thirds of a first run is
    compiling, on one core. Not linear_cross_entropy, whose formula needs 12 GB at the size of 8b. max-autotune measures
    meanwhile, with a neighbour; of attention it has little to choose, and by factors of two and more."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part"]
    unbound = {**os.environ, "OMP_PROC_BIND": "false"}  # or the main threads of all would share the first core
    parts = [subprocess.Popen([*command, str(part)], env=unbound, stdout=subprocess.DEVNULL) for part in range(PARTS)]
    statuses = [part.wait() for part in parts]
    if any(statuses):
        raise SystemExit("compiling ahead failed")


def compile_part(options: argparse.Namespace) -> None:
    for number, (op, case, dtype, training) in enumerate(runs(options)):
        if number // 2 % PARTS != options.part or op.name == "linear_cross_entropy":  # forward and training go together
            continue
        if left_out(op, case, dtype, training, options):
            continue
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            contest = Contest(op, case, dtype, options.device, training)
            for peer in contestants(op, case, contest.leading, training, options.peers):
                if peer.name in COMPILED and peer.function is not None:
                    with suppress(*measure.FAILURES):  # which is told when its turn comes
                        contest.run(peer.function, 0)


def runs(options: argparse.Namespace) -> Iterator[tuple[Op, rows.Case, torch.dtype, bool]]:
    """What is measured: an op, its inputs, their dtype, and whether with the backward pass."""
    phases = list(rows.PHASES) if options.shapes == "all" else [options.shapes]
    anchored = options.shapes == "anchor"
    for case in (
        anchors.cases(options.op) if anchored else rows.cases(options.op, options.presets, phases, options.device)
    ):
        op = next(op for op in OPS if op.name == case.op)
        dtypes = [DTYPES[name] for name in options.dtype]
        for dtype in dtypes[:1] if case.op == "flow_timesteps" else dtypes:  # which has no float among its inputs
            for training in (False, True):
                if ("training" if training else "forward") in options.directions and (case.trained or not training):
                    yield op, case, dtype, training


def left_out(op: Op, case: rows.Case, dtype: torch.dtype, training: bool, options: argparse.Namespace) -> Row | None:
    """The row without a measurement, and why, where torch has no fast product of `dtype` and its call, which checks
    ours, would take too long."""
    reason = limits.too_slow(case.flops * (3 if training else 1), options.device, dtype)
    if not reason:
        return None
    name, direction = str(dtype).removeprefix("torch."), "training" if training else "forward"
    return Row(op.name, "native", options.device, name, case.shape, direction, memory=options.memory, reason=reason)


def measure_case(op: Op, case: rows.Case, dtype: torch.dtype, training: bool, options: argparse.Namespace) -> list[Row]:
    device = options.device
    contest = Contest(op, case, dtype, device, training)
    head = Row(
        op.name, "", device, str(dtype).removeprefix("torch."), case.shape, "training" if training else "forward",
        memory=options.memory, intensity=contest.intensity,
    )  # fmt: skip
    found: dict[str, Row] = {}
    calls: dict[str, measure.Call] = {}
    for peer in contestants(op, case, contest.leading, training, options.peers):
        row = replace(head, provider=peer.name, reason=peer.reason)
        if peer.function is not None:
            function = peer.function
            try:
                row = replace(row, reason=contest.wrong(function, peer.random))
            except measure.FAILURES as error:
                if peer.name in measure.OURS and not options.keep_going:
                    raise
                row = replace(row, reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")
            row = replace(row, checked=not row.reason)
            if row.checked:
                calls[peer.name] = contest.timed(function)
            elif peer.name in measure.OURS and options.keep_going:
                progress(f"WRONG {op.name} {case.shape} {head.dtype} {head.direction}: {peer.name} {row.reason}")
                options.wrong += 1
            elif peer.name in measure.OURS:
                raise AssertionError(f"{op.name} {case.shape} {head.dtype}: {peer.name} {row.reason}")
        found[peer.name] = row
    yardsticks = limits.contestants(contest.work, device, dtype)
    times = measure.take_turns({**calls, **yardsticks}, device, options.seconds, racing=calls)
    limit = limits.seconds(contest.work, {name: times[name] for name in yardsticks}, device, dtype)
    for name in calls:
        found[name] = measure.measured(found[name], times[name], contest.work, limit)
    return measure.compared(found.values())


def summary(found: list[Row], bound: set[tuple[str, str]]) -> str:
    """The rows of ours in numbers; `bound`: the (op, shape) pairs that memory binds."""
    found = [row for row in found if row.memory == "fresh"] or found
    ratios = [row.ratio_to_best_peer for row in found if row.ratio_to_best_peer]
    memory = [row.ratio_to_best_peer for row in found if row.ratio_to_best_peer and (row.op, row.shape) in bound]
    behind = sum(ratio < 1 for ratio in ratios)
    return (
        f"{len(ratios)} rows of ours, {behind} behind the best peer; geometric mean of the ratios "
        f"{measure.geometric_mean(ratios):.2f}, over the {len(memory)} memory-bound rows "
        f"{measure.geometric_mean(memory):.2f}"
    )


def again_reused(options: argparse.Namespace, bound: set[tuple[str, str]]) -> list[Row]:
    """The large memory-bound rows once more, in a process whose malloc keeps freed memory for all contestants."""
    large = [
        op for op in options.op if any(bound_op == op for bound_op, shape in bound if shape.startswith("8b train"))
    ]
    if not large:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--memory", "reused", "--presets", "8b", "--shapes", "train"]
        command += ["--op", *large, "--dtype", *options.dtype, "--directions", *options.directions]
        command += ["--threads", str(options.threads), "--seconds", str(options.seconds), "--json", str(path)]
        subprocess.run(command + (["--peers", *options.peers] if options.peers else []), check=True, stdout=sys.stderr)
        return [row for row in measure.read(path) if row.op != "limit"]


def arguments() -> argparse.Namespace:
    known = [op.name for op in OPS]
    parser = argparse.ArgumentParser(description="Every op beside its peers.")
    parser.add_argument("--op", nargs="+", choices=known, default=known, metavar="OP")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--shapes", choices=[*rows.PHASES, "all", "anchor"], default="all")
    parser.add_argument("--presets", nargs="+", choices=["nano", "4b", "8b"], default=["nano", "4b", "8b"])
    parser.add_argument("--directions", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--peers", nargs="+", default=[], help="names as in the table; all if not given")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=measure.positive(int), default=torch.get_num_threads())
    parser.add_argument("--seconds", type=measure.positive(float), default=0.2, help="for each contestant of a row")
    parser.add_argument("--memory", choices=["fresh", "reused", "both"], default="fresh")
    parser.add_argument("--keep-going", action="store_true", help="list a backend of ours that is wrong, and go on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, metavar="DIR")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of compile_ahead
    parser.add_argument("--compare", type=Path, metavar="OLD", help="a JSON file of an earlier run")
    options = parser.parse_args()
    known = sorted({peer.name for op in options.op for peer in peers(op, options.device, drawn=False)})
    unknown = set(options.peers) - set(known)
    if unknown:
        parser.error(f"argument --peers: of these ops they are {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    old = measure.read(options.compare) if options.compare else []
    options.wrong, both = 0, options.memory == "both"
    options.memory = "fresh" if both else options.memory
    if options.memory == "reused" and not keep_freed_memory():
        raise SystemExit("--memory reused: this C library cannot keep freed memory")
    if options.shapes == "anchor" and options.device == "cpu":
        raise SystemExit("--shapes anchor: sizes of a data-centre GPU, expected --device cuda")
    if options.part is not None:
        return compile_part(options)
    if options.device == "cpu" and options.memory == "fresh" and "compile" in (options.peers or ["compile"]):
        compile_ahead()  # for `reused`, too, which comes after it
    found = limits.rows(options.device, [DTYPES[name] for name in options.dtype], 5 * options.seconds)
    bound = set()
    for op, case, dtype, training in runs(options):
        if case.memory_bound:
            bound.add((case.op, case.shape))
        if missing := left_out(op, case, dtype, training, options):
            found.append(missing)
            progress(measure.line([missing]))
            continue
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        with torch.set_grad_enabled(training):
            found += measure_case(op, case, dtype, training, options)
        progress(measure.line([row for row in found if row.key == found[-1].key]))
        if options.json:
            measure.write(options.json, found)
    if both:
        found += again_reused(options, bound)
        if options.json:
            measure.write(options.json, found)
    ours = [row for row in found if row.op != "limit"]
    head = f"`python benchmarks/ops.py`, {measure.machine(options.device)}, memory {options.memory}"
    text = "\n\n".join((head, limits.sentence(found), summary(ours, bound), measure.table(ours)))
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.plot:
        from roofline import plot

        progress(f"plots: {', '.join(map(str, plot(options.plot, found)))}")
    if old:
        worse = measure.slower(old, ours)
        print("\n".join(["", f"{len(worse)} rows slower than in {options.compare}:", *worse]))
    if options.wrong:
        sys.exit(f"{options.wrong} rows of ours are wrong")


if __name__ == "__main__":
    main()
