"""The CUDA kernels on the host: csrc/cuda compiled as C++ over csrc/host, each CUDA thread a fiber, and the conformance
suite run on what comes out.

    python tests/cuda_on_host.py memory      under AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/cuda_on_host.py races       with every access of shared memory checked for a barrier before it
    python tests/cuda_on_host.py ... --faults
    python tests/cuda_on_host.py ... --op attention

Threads and blocks take turns in an order drawn from --seed. The first report ends the run with a status that is not 0.

With --faults the kernels are made wrong first, one place at a time, and each fault must be noticed: `memory` lets every
loop over elements run one step too far, and stops stores one short; `races` leaves out every barrier and every wait.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rebuilt import ROOT, compiler

# What is put in the place of what; `host::fault()` is the number of the fault that is on.
FAULTS = {
    "memory": [
        (
            re.compile(r"; (\w+) < ([^;]+); (?=\1 \+= (?:\w*THREADS|WARP|KEYS))"),
            r"; \1 < \2 + (host::fault() == NUMBER); ",
        ),
        (re.compile(r"(?<= )([\w.]+) < (width)\) column"), r"\1 < \2 + (host::fault() == NUMBER)) column"),
        (re.compile(r"([\w.]+) >= (a\.\w+|rows)\) return;"), r"\1 >= \2 + (host::fault() == NUMBER)) return;"),
        (re.compile(r"(?<=[ (])row < (rows) && "), r"row < \1 + (host::fault() == NUMBER) && "),
        (re.compile(r"step < steps;"), r"step < steps - (host::fault() == NUMBER);"),
        # Elements that nobody writes.
        (re.compile(r"row >= count \|\| "), r"row >= count - (host::fault() == NUMBER) || "),
        (re.compile(r"(?<=column) < (a\.value_dim)\) "), r" < \1 - (host::fault() == NUMBER)) "),
        (re.compile(r"(?<=\+ its) < (at\.rows)\)"), r" < \1 - (host::fault() == NUMBER))"),
    ],
    "races": [
        (re.compile(r"(?<=\s)(__sync(?:threads|warp)\(\);)"), r"if (host::fault() != NUMBER) \1"),
        (re.compile(r"(?<=\s)(cp_async_(?:commit|wait)(?:<\d>)?\(\);)"), r"if (host::fault() != NUMBER) \1"),
    ],
}
# Ops that take minutes: their samples in float32 and bfloat16 in turn, every eighth in float16; with --every in all.
SLOW = ("attention",)
COMMON = ["-std=gnu++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-w"]
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],  # whose interface csrc/host/races.cpp is: its own runtime is not linked
}


def with_faults(folder: Path, kind: str) -> tuple[Path, list[str]]:
    """A copy of csrc whose faults can be switched on, and where each of them is."""
    source, places = folder / "csrc", [""]
    shutil.copytree(ROOT / "csrc", source)
    for file in sorted(source.glob("cuda/*.cu*")):
        text = file.read_text()
        for pattern, replacement in FAULTS[kind]:
            for match in reversed(list(pattern.finditer(text))):
                fault = match.expand(replacement).replace("NUMBER", str(len(places)))
                line = text.count("\n", 0, match.start()) + 1
                places.append(f"{file.name}:{line}: {text.splitlines()[line - 1].strip()}")
                text = text[: match.start()] + fault + text[match.end() :]
        file.write_text(text)
    return source, places


def build(folder: Path, kind: str, source: Path) -> Path:
    """The library of the CUDA kernels for this machine's processor."""
    library, objects = folder / f"libblip3o_cuda_{kind}.so", []
    for file in [*sorted(source.glob("cuda/*.cu")), *sorted(source.glob("host/*.cpp"))]:
        checked = SANITIZERS[kind] if kind == "memory" or file.suffix == ".cu" else ["-DBLIP3O_RACES"]
        target = folder / f"{file.stem}.o"
        speed = ["-O2"] if file.suffix == ".cpp" else []  # what runs the kernels may be as fast as it can
        command = [compiler(), *COMMON, *speed, *checked, "-x", "c++", "-c", str(file), "-o", str(target)]
        subprocess.run(command, check=True)
        objects.append(str(target))
    link = SANITIZERS[kind] if kind == "memory" else []
    subprocess.run([compiler(), "-shared", *link, "-o", str(library), *objects], check=True)
    return library


def put_in_place(library: Path) -> None:
    """From now on what the native bodies call on a CPU are the CUDA kernels, for the ops that have any."""
    from blip3o_kernels import native

    loaded, before = ctypes.CDLL(str(library)), native.function

    def function(kind: str, op: str) -> object:
        if op not in native.ON_CUDA:
            return before(kind, op)
        found = loaded[f"blip3o_cuda_{op}"]
        found.argtypes = [ctypes.c_char_p]
        return found

    def cuda_call(op: str) -> Callable[..., None]:
        pack, call = native.packer(op), function("cuda", op)

        def checked(x: object, *arguments: float) -> None:
            status = call(pack(*arguments, 0, 0, 0))
            if status:
                raise native.failed(op, status)

        return checked

    native.function, native.cuda_call = function, cuda_call  # type: ignore[assignment]
    for op in native.ON_CUDA:
        if not op.endswith("_backward"):
            module = importlib.reload(importlib.import_module(f"blip3o_kernels.native_ops.{op}"))
            if hasattr(module, "forward_cuda"):  # what it does on a GPU differs by more than the function
                module.forward, module.backward = module.forward_cuda, module.backward_cuda
            contract = importlib.import_module(f"blip3o_kernels.ops.{op}")
            contract._shortcut = lambda *_: None  # type: ignore[attr-defined]  # which leads to the C++
            contract.at_once = lambda *_: None  # type: ignore[attr-defined]


def conform(first: bool = False, only: tuple[str, ...] = (), every: bool = False) -> list[str]:
    """What is wrong with the results of the ops, or of `only` these, or the first of it; prints how many there were."""
    import torch
    from conformance import bound, evaluate, expectation, violations

    from blip3o_kernels import OPS, native, use

    torch.set_num_threads(1)
    broken = []
    for op in OPS:
        if op.name not in native.ON_CUDA or op.name not in (only or native.ON_CUDA):
            continue
        samples, dtypes = 0, (torch.float32, torch.bfloat16, torch.float16)
        for number, each in enumerate(zip(*(op.samples(dtype, "cpu") for dtype in dtypes), strict=True)):
            for dtype, sample in zip(dtypes, each, strict=True):
                turn = 2 if number % 8 == 7 else number % 2
                if op.name in SLOW and not every and dtype is not dtypes[turn]:
                    continue
                arguments = bound(op, sample)
                with use("native"):
                    got = evaluate(op, op.function, arguments)
                found = list(violations(got, expectation(op, "native:cuda", arguments)))
                broken += [f"{op.name} {dtype} {sample.name}: {found}"] if found else []
                if first and broken:
                    return broken
                samples += 1
        print(f"{op.name}: {samples} samples", flush=True)
    return broken


def inclusions(file: Path) -> set[str]:
    """The names of a source of csrc/cuda and of the files there that it includes, and those, ..."""
    found = {file.name}
    for name in re.findall(r'^#include "(\w+\.cuh)"', file.read_text(), re.MULTILINE):
        found |= inclusions(file.parent / name)
    return found


def missed(library: Path, places: list[str], op: str) -> list[str]:
    """The faults that nothing notices: each is tried in a process of its own, because most of them end it."""
    fault, found = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "blip3o_host_fault"), []
    included = {file.name: inclusions(file) for file in (ROOT / "csrc/cuda").glob("*.cu")}
    for number, place in enumerate(places[1:], start=1):
        only = tuple(name[:-3] for name, files in included.items() if place.partition(":")[0] in files)
        if op and only != (op,):
            continue
        child = os.fork()
        if child == 0:
            fault.value = number
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os._exit(bool(conform(True, (op,) if op else only)))
        if os.waitpid(child, 0)[1] == 0:
            found.append(place)
    return found


def inside(library: Path, places: list[str], op: str, every: bool) -> int:
    put_in_place(library)
    start, wrong = time.monotonic(), conform(only=(op,) if op else (), every=every)
    wrong += [f"MISSED {place}" for place in missed(library, places, op)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{max(0, len(places) - 1)} faults, {len(wrong)} wrong or missed, in {time.monotonic() - start:.0f} s")
    return int(bool(wrong))


def located(text: str, library: Path) -> str:
    """Addresses in the library's code as lines of the sources."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-Cpfis", "-e", str(library), match[1]]
        return (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.replace("\n", " ") or match[0]
        )

    return re.sub(r"code (0x[0-9a-f]+)", line, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=list(SANITIZERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--op", default="", help="only this op, and the faults in its files")
    parser.add_argument("--every", action="store_true", help="all samples of all ops in all dtypes")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(
            options.inside, json.loads(options.inside.with_suffix(".json").read_text()), options.op, options.every
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, places = with_faults(folder, options.kind) if options.faults else (ROOT / "csrc", [])
        library = build(folder, options.kind, source)
        library.with_suffix(".json").write_text(json.dumps(places))
        environment = {**os.environ, "BLIP3O_HOST_SEED": str(options.seed)}
        if options.kind == "memory":
            runtimes = [
                subprocess.run([compiler(), f"-print-file-name={x}"], capture_output=True, text=True, check=True).stdout
                for x in ("libasan.so", "libubsan.so")
            ]
            environment["LD_PRELOAD"] = ":".join(x.strip() for x in runtimes)
            environment["ASAN_OPTIONS"] = (
                "detect_leaks=0"  # Python and torch never free some of theirs
                ":max_malloc_fill_size=268435456:malloc_fill_byte=255"  # NaN, where nothing is written
            )
        command = [sys.executable, __file__, options.kind, "--op", options.op, "--inside", str(library)]
        command += ["--every"] if options.every else []
        run = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        sys.stderr.write(located(run.stderr, library))
        return run.returncode


if __name__ == "__main__":
    sys.exit(main())
