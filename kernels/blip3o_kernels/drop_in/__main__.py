"""What `patch` does to which model, as a table: `python -m blip3o_kernels.drop_in [--models NAME ...]`.

One line for each architecture, small and with random weights, in float32 and bfloat16: which op runs in how many
modules, the largest difference of outputs that the self-check saw, what it would have accepted, and what stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from . import patch
from .architectures import DIFFUSION, LANGUAGE, build

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("model", "modules", "replaced", "float32", "bfloat16", "kept as it is")


def row(name: str) -> list[str]:
    differences = []
    for dtype in DTYPES.values():
        with patch(build(name, dtype)) as patched:
            key = "logits" if name in LANGUAGE else "sample"
            difference, allowed = patched.differences[key]
            differences.append(f"{difference:.1e} of {allowed:.1e}")
    replaced = ", ".join(f"{op} x {count}" for op, count in patched.replaced.items())
    kept = "; ".join(f"{kind}: {why}" for kind, why in patched.kept.items())
    return [name, str(patched.modules), replaced, *differences, kept or "-"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m blip3o_kernels.drop_in", description=__doc__)
    known = [*LANGUAGE, *DIFFUSION]
    parser.add_argument("--models", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    chosen = parser.parse_args(arguments).models
    if set(chosen) & set(DIFFUSION):
        from diffusers.utils import logging

        logging.set_verbosity_error()  # it remarks on every change of a dtype
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in chosen:
        print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main()
