"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, in random calls of every op.

    python tests/fuzz.py --calls 1000000 --seed 0

Shapes, strides, offsets, options and dtypes are drawn as in tests/random_calls.py; each is run forward and backward on
every instruction set of this chip. Tensors are allocated to the byte, so that the sanitizer sees one element too far.
The first report ends the run with a status that is not 0.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rebuilt import ROOT, build_library, compiler, copy_package, run_on_copy

FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def fuzz(folder: Path, calls: int, seed: int) -> None:
    import torch
    from conformance import bound, evaluate
    from random_calls import CALLS, Draw

    import blip3o_kernels
    from blip3o_kernels import native
    from blip3o_kernels.dispatch import INSTRUCTION_SETS
    from blip3o_kernels.samples import Sample

    assert Path(blip3o_kernels.__file__).is_relative_to(folder)
    torch.set_num_threads(1)
    best = INSTRUCTION_SETS[native.instruction_set()]
    sets = [f"native:{name}" for name, code in INSTRUCTION_SETS.items() if 0 < code <= best]
    bodies = [(op, body) for op in blip3o_kernels.OPS for body in op.bodies]
    ops = [(op, body.dtypes) for op, body in bodies if (body.backend, body.device) == ("native", "cpu")]
    choices, made, start = random.Random(seed), Counter[str](), time.monotonic()
    while made.total() < calls:
        op, dtypes = choices.choice(ops)
        args, kwargs = CALLS[op.name](Draw(choices.randint, choices.choice(dtypes)))
        arguments = bound(op, Sample("random", args, kwargs))
        for instructions in sets:
            with blip3o_kernels.use(instructions):
                evaluate(op, op.function, arguments)
            made[op.name] += 2 if op.differentiable else 1
    seconds = time.monotonic() - start
    print(f"{made.total()} calls of {len(ops)} ops on {len(sets)} instruction sets in {seconds:.0f} s, no report")
    print(", ".join(f"{name} {number}" for name, number in sorted(made.items())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        fuzz(options.inside, options.calls, options.seed)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_package(folder)
        build_library(folder, sorted(ROOT.glob("csrc/cpu/*.cpp")), FLAGS)
        runtimes = [
            subprocess.run([compiler(), f"-print-file-name={library}"], capture_output=True, text=True, check=True)
            for library in ("libasan.so", "libubsan.so")
        ]
        return run_on_copy(
            folder,
            [__file__, "--calls", str(options.calls), "--seed", str(options.seed), "--inside", name],
            LD_PRELOAD=":".join(found.stdout.strip() for found in runtimes),
            ASAN_OPTIONS="detect_leaks=0",  # Python and torch never free some of theirs
            UBSAN_OPTIONS="print_stacktrace=1",
        )


if __name__ == "__main__":
    sys.exit(main())
