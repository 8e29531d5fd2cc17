"""Everything worth doing on a machine with an NVIDIA GPU, in 20 minutes at most, safest first; `make gpu`.

    python benchmarks/gpu.py [--out DIR] [--minutes 20] [--only PART ...] [--again PART ...] [--list]

machine      what the GPU is, how it is set and what it reaches
build        the CUDA library for it, put in place, and one kernel run
conformance  tests/test_ops.py on the GPU, CUDA's bodies and Triton's
sanitizer    compute-sanitizer on every CUDA kernel, forward and backward, at small sizes
ops          every op beside its peers: at the sizes others publish (anchor), at 8b's, in decoding
model        the networks at work, and training steps, beside plain torch

A part is a process with a time limit of its own; its output goes to DIR/<part>.log, its results to DIR/<part>.json as
they come. After each part DIR/summary.md and summary.json are written anew. A part that fails, or that is not possible
here, is listed with the reason, and the next goes on. A second run goes on where the first one stopped: parts that are
done are left alone, unless --again names them ("all" names all). Names may be cut short: `--only ops` means all of
these.

The status is 0 if nothing failed, 1 if something did, 2 if no part is possible, as without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu_summary

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / name for name in ("kernels", "", "benchmarks", "tests")]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SLOW = {"compile max-autotune"}  # peers that try kernels for minutes
ALL_SCORES = {"transformers", "reference", "compile", "sdpa math", "flex"}  # that is 17 GB at 16k, or compiles for long
LEAST = 15.0  # seconds for which no part is begun


@dataclass(frozen=True)
class Part:
    """name: also that of its files.  command: after the interpreter's name; {name} stands for the path of its results,
    without the ending.  seconds: its limit.  missing: why it is not possible here, "" if it is."""

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """status: "done", "failed", "not possible" or "not begun", and then `reason` says why; seconds: it took."""

    part: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def gpu_missing() -> str:
    """Why there is no GPU to use, "" if there is one. Asked without making a context on it."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    return f"no GPU: torch {torch.__version__} {built} and finds none"


def program_missing(name: str) -> str:
    return "" if shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") else f"{name}: not found"


def parts() -> list[Part]:
    """In the order in which they run. Which ops there are is the package's to say."""
    import anchors
    from peers import peers

    from blip3o_kernels import OPS, native

    no_gpu, json_file = gpu_missing(), ("--json", "{name}.json")
    nvcc, sanitizer = (no_gpu or program_missing(name) for name in ("nvcc", "compute-sanitizer"))

    def conformance(backend: str, seconds: float, *more: str) -> Part:
        script = ("tests/gpu_conformance.py", "--out", "{name}.jsonl", "--keyword", f"{backend}-cuda", *more)
        return Part(f"conformance-{backend}", script, seconds, no_gpu)

    def ops(op: str, sizes: str, seconds: float) -> Part:
        command: tuple[str, ...] = ("benchmarks/ops.py", "--device", "cuda", "--dtype", "bfloat16", "--op", op)
        command += ("--shapes", "anchor") if sizes == "anchor" else ("--presets", sizes)
        left_out = SLOW | (ALL_SCORES if (op, sizes) == ("attention", "anchor") else set())
        if not no_gpu:
            command += ("--peers", *(peer.name for peer in peers(op, "cuda", False) if peer.name not in left_out))
        return Part(f"ops-{sizes}-{op}", (*command, "--keep-going", *json_file), seconds, no_gpu)

    found = [
        Part("machine", ("benchmarks/gpu_machine.py", *json_file), 60, no_gpu),
        Part("build", ("benchmarks/gpu_build.py",), 240, nvcc),
        conformance("native", 180, "--jobs", "4"),
    ]
    for tool in TOOLS:
        found.append(Part(f"sanitizer-{tool}", ("tests/gpu_calls.py", "--sanitize", tool, *json_file), 90, sanitizer))
    names = sorted((op.name for op in OPS), key=lambda name: name not in native.ON_CUDA)
    found += [ops(name, "anchor", 150 if name == "attention" else 90) for name in names if name in anchors.CASES]
    found.append(conformance("triton", 240, "--jobs", "8", "--seconds", "200"))  # each kernel is compiled there
    found += [ops(name, "8b", 75) for name in names]
    for script in ("model", "training"):
        command = (f"benchmarks/{script}.py", "--device", "cuda", "--dtype", "bfloat16", *json_file)
        found.append(Part(script, (*command, "--no-compile"), 90, no_gpu))
    found.append(Part("model-compiled", ("benchmarks/model.py", *command[1:], "--presets", "4b"), 150, no_gpu))
    return found


def run(part: Part, folder: Path, seconds: float) -> Outcome:
    """Runs a part for at most so many seconds; whatever it started ends with it."""
    if part.missing:
        return Outcome(part.name, "not possible", part.missing)
    limit = min(part.seconds, seconds)
    if limit < min(LEAST, part.seconds):
        return Outcome(part.name, "not begun", "no time is left: run it again to go on")
    log, begun = folder / f"{part.name}.log", time.monotonic()
    command = [sys.executable, *(word.format(name=folder / part.name) for word in part.command)]
    path = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # its group too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took = round(time.monotonic() - begun, 1)
    if status == 0:
        return Outcome(part.name, "done", seconds=took)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    why = f"stopped after {limit:.0f} s" if status is None else f"status {status}"
    return Outcome(part.name, "failed", f"{why}: {lines[-1][:300]}" if lines else why, took)


def read(folder: Path) -> dict[str, Outcome]:
    """What came of the parts of earlier runs. ValueError names a file that is none of ours."""
    path = folder / "parts.json"
    if not path.exists():
        return {}
    try:
        return {row["part"]: Outcome(**row) for row in json.loads(path.read_text())}
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a list of parts: {error}") from None


def write(folder: Path, outcomes: Iterable[Outcome]) -> None:
    """By a rename, so that a run that is stopped leaves the old file or the new one."""
    text = ",\n".join(json.dumps(asdict(outcome)) for outcome in outcomes)
    new = folder / "parts.json.new"
    new.write_text(f"[\n{text}\n]\n")
    new.replace(folder / "parts.json")


def chosen(names: Sequence[str], known: Sequence[Part]) -> set[str]:
    """The parts that the words name, whole or by their beginning. SystemExit for a word that names none."""
    found = set()
    for word in names:
        some = {part.name for part in known if word == "all" or part.name.startswith(word)}
        if not some:
            raise SystemExit(f"{word}: expected the beginning of one of {', '.join(part.name for part in known)}")
        found |= some
    return found


def run_all(
    known: Sequence[Part], folder: Path, again: set[str], seconds: float, told: Callable[[str], None] = print
) -> int:
    """Runs the parts that are not done yet, and those of `again`; the status that the program ends with."""
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + seconds, read(folder)
    outcomes = {name: old for name, old in outcomes.items() if name not in again}
    for part in known:
        before = outcomes.get(part.name)
        if before is not None and before.status == "done":
            told(f"{part.name}: done before")
            continue
        told(f"{part.name} ...")
        outcomes[part.name] = run(part, folder, end - time.monotonic())
        told(line(outcomes[part.name]))
        write(folder, outcomes.values())
        gpu_summary.write(folder, outcomes.values())
    write(folder, outcomes.values())
    gpu_summary.write(folder, outcomes.values())
    mine = [outcomes[part.name] for part in known]
    if all(outcome.status == "not possible" for outcome in mine):
        return 2
    return int(any(outcome.status == "failed" for outcome in mine))


def line(outcome: Outcome) -> str:
    reason = f": {outcome.reason}" if outcome.reason else f" in {outcome.seconds:.0f} s"
    return f"{outcome.part}: {outcome.status}{reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no part goes on")
    parser.add_argument("--only", nargs="+", default=["all"], metavar="PART")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART")
    parser.add_argument("--list", action="store_true", help="the parts, their limits and commands")
    options = parser.parse_args()
    sys.path[:0] = [str(path) for path in PATHS if str(path) not in sys.path]
    known = parts()
    only, again = chosen(options.only, known), chosen(options.again, known)
    wanted = [part for part in known if part.name in only]
    if options.list:
        print(*(f"{part.name}, {part.seconds:.0f} s: {' '.join(part.command)}" for part in wanted), sep="\n")
        return
    status = run_all(wanted, options.out.absolute(), again, 60 * options.minutes)
    print(f"summary: {options.out / 'summary.md'}" if status != 2 else f"no part is possible: {wanted[0].missing}")
    sys.exit(status)


if __name__ == "__main__":
    main()
