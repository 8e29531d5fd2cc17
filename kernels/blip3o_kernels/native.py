"""Loads the two compiled libraries, libblip3o_cpu and libblip3o_cuda, through ctypes.

They are plain C (`csrc/blip3o.h`): `SIGNATURES` repeats the declarations as one letter an argument, and a test compares the two.
A missing library is not an error: `CPU_MISSING` and `CUDA_MISSING` say why it is missing, and are empty if it is there.

The libraries are found through `importlib.resources`: in an editable install they lie in site-packages, not beside this file.
torch must be imported before the CPU library is loaded, because its OpenMP symbols come from the runtime torch has loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import resources
from typing import Any, cast

import torch

from .dispatch import INSTRUCTION_SETS, BackendError

VERSION = 1  # BLIP3O_VERSION
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum blip3o_dtype

# p pointer, l int64_t, f float, i int. Every function returns int, the status, except those in TEXT.
SIGNATURES = {
    "blip3o_cpu_version": "",
    "blip3o_cpu_best": "",
    "blip3o_cpu_threaded": "",
    "blip3o_cpu_rms_norm": "ppplllffii",
    "blip3o_cpu_rms_norm_backward": "ppppppllllffii",
    "blip3o_cuda_version": "",
    "blip3o_cuda_error": "",
    "blip3o_cuda_rms_norm": "ppplllffip",
    "blip3o_cuda_rms_norm_backward": "ppppppllllffip",
}
TEXT = ("blip3o_cuda_error",)
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_INSTRUCTION_SET_NAMES = {code: name for name, code in INSTRUCTION_SETS.items() if name}


def _load(kind: str) -> tuple[dict[str, Any], str]:
    """The functions of that library ("cpu" or "cuda") with their signatures declared, or none and the reason."""
    name = f"libblip3o_{kind}.so"
    found = resources.files("blip3o_kernels").joinpath("lib", name)
    if not found.is_file():
        return {}, f"{name} is not installed"
    try:
        library = ctypes.CDLL(str(found))
        version = library[f"blip3o_{kind}_version"]()
        if version != VERSION:
            return {}, f"{name} has interface version {version}, expected {VERSION}: install again"
        symbols = [symbol for symbol in SIGNATURES if symbol.startswith(f"blip3o_{kind}_")]
        functions = {symbol: library[symbol] for symbol in symbols}
    except (OSError, AttributeError) as error:  # it does not load, or lacks a function
        return {}, f"{name} does not load: {error}"
    for symbol, function in functions.items():
        function.argtypes = [_TYPES[letter] for letter in SIGNATURES[symbol]]
        function.restype = ctypes.c_char_p if symbol in TEXT else ctypes.c_int
    return functions, ""


_CPU, CPU_MISSING = _load("cpu")
_CUDA, CUDA_MISSING = _load("cuda")


def function(symbol: str) -> Callable[..., int]:
    """The C function of that name; without its library, a function that raises BackendError."""
    found = _CPU.get(symbol) or _CUDA.get(symbol)
    if found is not None:
        return cast(Callable[..., int], found)

    def absent(*arguments: object) -> int:
        raise BackendError(f"{symbol}: {CPU_MISSING if symbol.startswith('blip3o_cpu_') else CUDA_MISSING}")

    return absent


def instruction_set() -> str:
    """What the CPU library uses here: "avx512", "avx2" or "portable"; "" without the library."""
    return _INSTRUCTION_SET_NAMES[_CPU["blip3o_cpu_best"]()] if _CPU else ""


def failed(op: str, status: int) -> BackendError:
    """The exception for a status that is not 0."""
    reasons = {
        1: "an argument is out of range",
        2: "there is no body for these dtypes",
        3: f"this chip has {instruction_set()} at best",
        4: f"CUDA reported {_CUDA['blip3o_cuda_error']().decode()}" if _CUDA else "",
    }
    return BackendError(f"{op}: the native library refused with status {status}: {reasons[status]}")
