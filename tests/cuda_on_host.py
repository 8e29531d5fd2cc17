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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cuda_faults import FAULTS, ops_at, some, with_faults
from rebuilt import ROOT, compiler

# Ops that take minutes: each sample in float32 or in bfloat16 in turn, every eighth in float16; --every: in all three.
SLOW = ("attention",)
COMMON = ["-std=gnu++17", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-w", "-Wno-psabi"]
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],  # whose interface csrc/host/races.cpp is: its own runtime is not linked
}


def build(folder: Path, kind: str, kernels: list[Path], source: Path) -> Path:
    """The library of these CUDA sources for this machine's processor."""
    library, objects = folder / f"libblip3o_cuda_{kind}.so", []
    for file in [*sorted(kernels), *sorted(source.glob("host/*.cpp"))]:
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
    native.on_gpu = lambda _: True
    for op in native.ON_CUDA:
        if not op.endswith("_backward"):
            importlib.reload(importlib.import_module(f"blip3o_kernels.native_ops.{op}"))
            contract = importlib.import_module(f"blip3o_kernels.ops.{op}")
            contract._shortcut = lambda *_: None  # type: ignore[attr-defined]  # which leads to the C++
    products = importlib.import_module("blip3o_kernels.native_ops.linear_cross_entropy")
    products.late = lambda *_: False  # type: ignore[attr-defined]  # which leads there, too
    products.SPLIT = {"cpu"}  # type: ignore[attr-defined]


def draws() -> list[str]:
    """What is wrong with the noise that the kernels draw, by the tests of test_philox.py."""
    import test_philox

    broken = []
    for name in ("test_bits", "test_normals", "test_batches_do_not_matter", "test_drawn_is_as_given"):
        try:
            getattr(test_philox, name)("native")
        except AssertionError as error:
            broken.append(f"{name}: {error}")
    return broken


def rounded_gradients() -> list[str]:
    """What is wrong with a gradient of logits that is rounded once, which no sample has: a GPU's under autocast."""
    import torch

    from blip3o_kernels import logits
    from blip3o_kernels.native_ops import linear_cross_entropy as native
    from blip3o_kernels.ops import linear_cross_entropy as contract

    broken, product, options = [], logits._product, (0.1, 1e-2, 5.0)
    logits._product = lambda a, b, _: a.float() @ b.float()  # a CPU's would round the logits, too
    for dtype in (torch.bfloat16, torch.float16):
        for vocab in (77, 132):
            x, weight = torch.randn(9, 16), torch.randn(vocab, 16)
            leaves = [y.to(dtype).double().requires_grad_() for y in (x, weight)]
            target = torch.arange(9)
            names = dict(zip(("label_smoothing", "z_loss", "softcap"), options, strict=True))
            truth = torch.autograd.grad(contract.reference(*leaves, target, **names), leaves)
            _, *got = native.forward(x, weight, target, -100, *options, dtype, True, True)
            for a, b in zip(got, truth, strict=True):
                if not (a - b).norm() <= torch.finfo(dtype).eps * b.norm():
                    broken.append(f"rounded gradients, {dtype}, {vocab} logits: off by {(a - b).norm() / b.norm()}")
    logits._product = product
    return broken


def conform(first: bool = False, only: Sequence[str] = (), every: bool = False) -> list[str]:
    """What is wrong with the results of the ops, or of `only` these in their order, or the first of it; prints how many
    there were."""
    import torch
    from conformance import bound, evaluate, expectation, violations

    from blip3o_kernels import OPS, native, use

    torch.set_num_threads(1)
    known, broken = {op.name: op for op in OPS}, []
    for name in only or [name for name in known if name in native.ON_CUDA]:
        op, samples = known[name], 0
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for number, each in enumerate(zip(*(op.samples(dtype, "cpu") for dtype in dtypes), strict=True)):
            turn = dtypes[2 if number % 8 == 7 else number % 2]
            for dtype, sample in zip(dtypes, each, strict=True):
                if op.name in SLOW and not every and dtype is not turn:
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
    for name, check in (("flow_interpolate", draws), ("linear_cross_entropy", rounded_gradients)):
        if not only or name in only:
            broken += check()
    return broken


def missed(library: Path, places: list[str], numbers: Sequence[int], only: Sequence[str]) -> list[str]:
    """The faults that nothing notices: each is tried in a process of its own, because most of them end it."""
    fault, found = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "blip3o_host_fault"), []
    for number in numbers:
        place = places[number]
        ops = [op for op in ops_at(place) if op in (only or ops_at(place))]
        child = os.fork()
        if child == 0:
            fault.value = number
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os._exit(bool(conform(True, ops)))
        if os.waitpid(child, 0)[1] == 0:
            found.append(place)
    return found


def inside(library: Path, places: list[str], count: int, only: Sequence[str], every: bool) -> int:
    put_in_place(library)
    start, wrong = time.monotonic(), conform(only=only, every=every)
    numbers = [n for n, place in enumerate(places) if place and (not only or set(only) & set(ops_at(place)))]
    numbers = some(numbers, count)
    wrong += [f"MISSED {place}" for place in missed(library, places, numbers, only)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(numbers)} faults, {len(wrong)} wrong or missed, in {time.monotonic() - start:.0f} s")
    return int(bool(wrong))


def located(text: str, library: Path) -> str:
    """Addresses in the library's code as lines of the sources."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-Cpfis", "-e", str(library), match[1]]
        return (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.replace("\n", " ") or match[0]
        )

    return re.sub(r"code (0x[0-9a-f]+)", line, text)


def environment_of(kind: str, seed: int) -> dict[str, str]:
    """That of a process that loads such a library."""
    environment = {**os.environ, "BLIP3O_HOST_SEED": str(seed)}
    if kind == "memory":
        runtimes = [
            subprocess.run([compiler(), f"-print-file-name={x}"], capture_output=True, text=True, check=True).stdout
            for x in ("libasan.so", "libubsan.so")
        ]
        environment["LD_PRELOAD"] = ":".join(x.strip() for x in runtimes)
        environment["ASAN_OPTIONS"] = (
            "detect_leaks=0"  # Python and torch never free some of theirs
            ":max_malloc_fill_size=268435456:malloc_fill_byte=255"  # NaN, where nothing is written
        )
    return environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=list(SANITIZERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults", type=int, nargs="?", const=-1, default=0, metavar="N", help="all, or so many of them"
    )
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="only these, and the faults in their files")
    parser.add_argument("--every", action="store_true", help="all samples of all ops in all dtypes")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        places = json.loads(options.inside.with_suffix(".json").read_text())
        return inside(options.inside, places, options.faults, options.op, options.every)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, places = ROOT / "csrc", [""]
        if options.faults:  # those for Hopper have a program of their own
            source, places = with_faults(folder, FAULTS[options.kind], "^(?!.*hopper)")
        library = build(folder, options.kind, list(source.glob("cuda/*.cu")), source)
        library.with_suffix(".json").write_text(json.dumps(places))
        command = [sys.executable, __file__, options.kind, "--faults", str(options.faults), "--inside", str(library)]
        command += (["--op", *options.op] if options.op else []) + (["--every"] if options.every else [])
        environment = environment_of(options.kind, options.seed)
        run = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        sys.stderr.write(located(run.stderr, library))
        return run.returncode


if __name__ == "__main__":
    sys.exit(main())
