"""The bodies an op may have beside its reference, and the modules that hold them.

`native_ops/<op>.py` and `triton_ops/<op>.py` have a `forward` and a `backward`, with the same arguments and results.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import native, triton_ops
from .dispatch import Body

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

NATIVE_CPU = Body("native", "cpu", _FLOATS, True, native.CPU_MISSING)
NATIVE_CUDA = Body("native", "cuda", _FLOATS, True, native.CUDA_MISSING)
TRITON = (
    Body("triton", "cuda", _FLOATS, True, triton_ops.GPU_MISSING),
    Body("triton", "cpu", _FLOATS, True, triton_ops.CPU_MISSING),  # in Triton's interpreter
)


@cache
def body(op: str, backend: str) -> ModuleType:
    """The module with the bodies of `op` on "native" or "triton"; the first op on Triton imports triton itself."""
    return import_module(f".{backend}_ops.{op}", __package__)
