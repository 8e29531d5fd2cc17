"""`blip3o train` of the preset "tiny" of conftest.py, saving after every step: the program that torchrun starts.

torchrun --nproc-per-node 2 tests/train_tiny.py tests/tiny.toml --out RUN
"""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import register

from blip3o import cli
from blip3o.train import loop

if __name__ == "__main__":
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    loop.train.__kwdefaults__["save_every_seconds"] = 0.0
    sys.exit(cli.main(["train", *sys.argv[1:]]))
