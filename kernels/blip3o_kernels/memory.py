"""Where results live: memory that stays with the process instead of being mapped anew for each of them.

The first write to newly mapped memory is a page fault for every 4 KiB, and the system clears the page first: a large
result costs several times the op that computes it. glibc's malloc maps every block of more than 32 MiB anew and trims
its heap below that. So on a CPU the native bodies take what is 1 MiB or larger from csrc/cpu/memory.cpp, as torch takes
GPU memory from its caching allocator:

- Results get huge pages where the system has them, 2 MiB for one fault.
- A result's memory is kept when torch releases it, and serves the next of about its size. torch releases it when
  nothing holds it any more: no view, graph, NumPy array or other library, so nobody can tell it from fresh memory. Only
  growing such a tensor in place, with `resize_` or as `out=`, raises, as it does for one made from a NumPy array.
- What is kept is at most a quarter of the machine's memory, and of all but the last quarter of that the system is told
  that it may take it whenever it is short of memory. `keep_results` changes the limit, `release_results` gives
  everything back.

Everybody else's results, torch's included, are malloc's as ever; `keep_freed_memory` changes that for the process.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import native

LARGE = 2**20  # bytes of a result from which on it gets memory of ours
_CPU = torch.device("cpu")
_TYPES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.float16: (2, 16), torch.float64: (2, 64)}  # DLPack's
_CAPSULE = b"dltensor"  # its name, which must outlive it
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.argtypes, _new_capsule.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
_result, _keep, _release, _kept = native.memory_functions()
# Bytes that are kept unless told otherwise.
KEPT = 0 if _keep is None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`: without gaps, in x's order."""
    if x.nbytes < LARGE or not x.is_cpu:
        return torch.empty_like(x)
    strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
    return _large(x.shape, strides, x.dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """`torch.empty(shape, dtype=dtype, device=device)`."""
    if prod(shape) * dtype.itemsize < LARGE or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return _large(shape, [prod(shape[i + 1 :]) for i in range(len(shape))], dtype)


def tokens_first(x: Tensor, width: int | None = None) -> Tensor:
    """`strides.tokens_first(x, width)`."""
    batch, heads, tokens, own = x.shape
    width = own if width is None else width
    token = heads * width
    shape, strides = (batch, heads, tokens, width), (tokens * token, width, token, 1)
    if batch * tokens * token * x.element_size() < LARGE or not x.is_cpu:
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    return _large(shape, strides, x.dtype)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.floats = torch.empty(LARGE // 4, dtype=torch.float32, device=_CPU)


def scratch(floats: int) -> Tensor:
    """float32 memory of at least that size for one call of the library to work in: up to LARGE always the same of each
    thread, as for one token making a tensor costs a tenth of the op."""
    return _scratch.floats if floats <= LARGE // 4 else empty((floats,), torch.float32)


def _large(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`empty_strided` in memory of ours, if there is any."""
    if _result is not None and dtype in _TYPES:
        tensor = _result(struct.pack(f"{3 + 2 * len(shape)}q", *_TYPES[dtype], len(shape), *shape, *strides))
        if tensor:
            return torch.from_dlpack(_new_capsule(tensor, _CAPSULE, None))
    return torch.empty_strided(shape, strides, dtype=dtype)


def keep_results(limit: int) -> None:
    """Keep at most `limit` bytes of results that nobody holds any more; 0 gives each back to the system at once."""
    if limit < 0:
        raise ValueError(f"limit: expected a number of bytes >= 0, got {limit}")
    if _keep is not None:
        _keep(limit)


def release_results() -> int:
    """Give what is kept back to the system now, and go on keeping; how many bytes it was."""
    return 0 if _release is None else _release()


def kept_results() -> int:
    """Bytes of results that nobody holds any more and that are kept for the next ones."""
    return 0 if _kept is None else _kept()


keep_results(KEPT)
_scratch = _Scratch()


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the whole process and all libraries in it; whether the C library can.

    It does for torch's own results what this module does for ours. After this call the process stays as large as it
    once was, and results land in memory that is there already. glibc alone knows this; elsewhere nothing changes.
    Source: mallopt(3).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
