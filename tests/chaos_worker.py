"""`blip3o train` of the preset "tiny" of conftest.py: the program that torchrun starts.

torchrun --nproc-per-node 2 tests/chaos_worker.py tests/tiny.toml --out RUN
"""

from __future__ import annotations

import sys

import chaos_run

from blip3o import cli
from blip3o.train import loop


def main(words: list[str]) -> None:
    chaos_run.register_tiny()
    loop.train.__kwdefaults__["save_every_seconds"] = 1e9  # a save is made because a stop was asked for, or not at all
    sys.exit(cli.main(["train", *words]))


if __name__ == "__main__":
    main(sys.argv[1:])
