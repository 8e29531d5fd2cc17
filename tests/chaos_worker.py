"""`blip3o train` of the preset "tiny" of conftest.py: the program that torchrun starts.

torchrun --nproc-per-node 2 tests/chaos_worker.py tests/tiny.toml --out RUN
"""

from __future__ import annotations

import sys

import chaos_run

from blip3o import cli
from blip3o.train import loop

if __name__ == "__main__":
    chaos_run.register_tiny()
    loop.train.__kwdefaults__["save_every_seconds"] = (
        1e9  # what is saved, is saved because the process was told to stop
    )
    sys.exit(cli.main(["train", *sys.argv[1:]]))
