"""Triton bodies, one file per op. Importing this package does not import triton; importing a file of it does."""

import os
from importlib.util import find_spec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton's own switch: kernels run in Python, on a CPU
GPU_MISSING = "" if find_spec("triton") else "triton is not installed"
CPU_MISSING = GPU_MISSING or (
    "" if INTERPRETED else "on a CPU it runs only in triton's interpreter, TRITON_INTERPRET=1"
)
