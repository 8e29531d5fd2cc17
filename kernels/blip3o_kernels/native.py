"""Loads the two compiled libraries, libblip3o_cpu and libblip3o_cuda, through ctypes.

They are plain C (`csrc/blip3o.h`): an op's function takes one struct, `FORMATS` repeats its layout, and a test compares
the two. Packed bytes are one argument to convert instead of a dozen, which is most of what a ctypes call costs.
A missing library is not an error: `CPU_MISSING` and `CUDA_MISSING` say why it is missing, and are empty if it is there.

The libraries are found through `importlib.resources`: in an editable install they lie in site-packages, not beside
this file. torch must be imported before the CPU library is loaded, because its OpenMP symbols come from the runtime
torch has loaded.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from importlib import resources
from typing import Any, cast

import torch

from .dispatch import INSTRUCTION_SETS, BackendError
from .dispatch import instruction_set as forced_instruction_set

VERSION = 8  # BLIP3O_VERSION
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum blip3o_dtype
CHUNK = 1024  # BLIP3O_CHUNK

# The arguments of an op as `struct` packs them: P pointer, q int64_t, d double, f float, i int; all return a status.
FORMATS = {
    "rms_norm": "PPPqqqffiiiiiP",
    "rms_norm_backward": "PPPPPPqqqqffiiiiP",
    "add_rms_norm": "PPPPPqqqqffiiiiiP",
    "add_rms_norm_backward": "PPPPPPPqqqffiiiiP",
    "modulate": "PPPPPPPqqqqqqfiiiiiP",
    "modulate_backward": "PPPPPPPPPPPPqqqqqqiiiiiP",
    "gated_residual": "PPPPPPqqqqqqfiiiiP",
    "gated_residual_backward": "PPPPPPPPqqqqqiiiiP",
    "layer_norm": "PPPPPqqqfiiiiP",
    "layer_norm_backward": "PPPPPPPPqqqqiiiiP",
    "flow_interpolate": "PPPPPPqqqiiiiP",
    "flow_interpolate_backward": "PPPPPPPPPPqqqiiiiP",
    "flow_timesteps": "PPqqfffiiiiP",
    "timestep_embedding": "PPPqqdiiP",
    "timestep_embedding_backward": "PPPPqqdiiP",
    "flow_loss": "PPPPPPqqiiiP",
    "flow_loss_backward": "PPPPPPqqiiiP",
    "flow_step": "PPPPPPqqffiiiP",
    "flow_step_backward": "PPPPPPPPPPqqffiiiP",
    "linear_cross_entropy": "PPPPPqqqqqqfffiiiiiP",
    "linear_cross_entropy_fused": "PPPPPPPPPqqqqqqqffffiiiiP",
    "swiglu": "PPPqqqqiiiP",
    "swiglu_backward": "PPPPPqqqqqiiiP",
    "rope": "PPPPqqqqqqqqqqqqiiiiiP",
    "attention": "PPPPPPPPPqqqqqqqqqqqqqqqqqqqqqqqqqqqqffiiiiP",
    "attention_backward": "PPPPPPPPPPPPPqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqffiiiiP",
    "qk_norm_rope": "PPPPPPPPPPqqqqqqqqqqqqqfiiiiiiiP",
    "qk_norm_rope_backward": "PPPPPPPPPPPPPPPqqqqqqqqqqqqqqqqqqqqfiiiiiiiP",
}
# The CPU library has all of them, the CUDA library these.
ON_CUDA = (
    *("rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward"),
    *("layer_norm", "layer_norm_backward", "modulate", "modulate_backward"),
    *("gated_residual", "gated_residual_backward", "qk_norm_rope", "qk_norm_rope_backward"),
    *("swiglu", "swiglu_backward", "rope"),
    *("flow_interpolate", "flow_interpolate_backward", "flow_timesteps", "flow_loss", "flow_loss_backward"),
    *("flow_step", "flow_step_backward", "timestep_embedding", "timestep_embedding_backward", "linear_cross_entropy"),
    *("attention", "attention_backward"),
)
_INSTRUCTION_SET_NAMES = {code: name for name, code in INSTRUCTION_SETS.items() if name}


def _load(kind: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of that kind, "cpu" or "cuda", or None and the reason."""
    name = f"libblip3o_{kind}.so"
    found = resources.files("blip3o_kernels").joinpath("lib", name)
    if not found.is_file():
        return None, f"{name} is not installed"
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        return None, f"{name} does not load: {error}"
    version = library[f"blip3o_{kind}_version"]()
    if version != VERSION:
        return None, f"{name} has interface version {version}, expected {VERSION}: install again"
    absent = [op for op in FORMATS if (kind == "cpu" or op in ON_CUDA) and not hasattr(library, f"blip3o_{kind}_{op}")]
    if absent:
        return None, f"{name} is of another build and lacks {', '.join(absent)}: install again"
    return library, ""


_CPU, CPU_MISSING = _load("cpu")
_CUDA, CUDA_MISSING = _load("cuda")


def packer(op: str) -> Callable[..., bytes]:
    """Packs the arguments of `op` into the bytes of its C struct."""
    return struct.Struct(FORMATS[op]).pack


def function(kind: str, op: str) -> Callable[[bytes], int]:
    """The C function of `op` in the library of that kind, or without it a function that raises BackendError."""
    library, missing = (_CPU, CPU_MISSING) if kind == "cpu" else (_CUDA, CUDA_MISSING)
    if library is not None:
        found = library[f"blip3o_{kind}_{op}"]
        found.argtypes = [ctypes.c_char_p]
        return cast(Callable[[bytes], int], found)

    def absent(arguments: bytes) -> int:
        raise BackendError(f"{op}: {missing}")

    return absent


Memory = tuple[
    Callable[[bytes], int | None] | None,
    Callable[[int], None] | None,
    Callable[[], int] | None,
    Callable[[], int] | None,
]


def memory_functions() -> Memory:
    """result, keep, release and kept of the CPU library (csrc/cpu/memory.cpp); without the library None."""
    if _CPU is None:
        return None, None, None, None
    result, keep = _CPU["blip3o_cpu_result"], _CPU["blip3o_cpu_keep"]
    release, kept = _CPU["blip3o_cpu_release"], _CPU["blip3o_cpu_kept"]
    result.argtypes, result.restype = [ctypes.c_char_p], ctypes.c_void_p
    keep.argtypes, keep.restype = [ctypes.c_int64], None
    release.restype = kept.restype = ctypes.c_int64
    return result, keep, release, kept


def shortcut_function() -> Callable[[bytes, Any], int | None] | None:
    """blip3o_cpu_shortcut; it calls Python, so the interpreter's lock is kept."""
    if _CPU is None:
        return None
    found = ctypes.PyDLL(_CPU._name)["blip3o_cpu_shortcut"]
    found.argtypes, found.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_void_p
    return cast(Callable[[bytes, Any], "int | None"], found)


def cpu_call(op: str) -> Callable[..., None]:
    """`op` in the CPU library, as a function of the struct's members before the instruction set, which raises."""
    pack, call, get_num_threads = packer(op), function("cpu", op), torch.get_num_threads

    def checked(*arguments: float) -> None:
        status = call(pack(*arguments, forced_instruction_set(), get_num_threads(), 0))
        if status:
            raise failed(op.removesuffix("_backward"), status)

    return checked


def cuda_call(op: str) -> Callable[..., None]:
    """`op` in the CUDA library, as a function of a tensor on its GPU and the struct's members up to its stream."""
    pack, call = packer(op), function("cuda", op)

    def checked(x: torch.Tensor, *arguments: float) -> None:
        with torch.cuda.device(x.device):
            status = call(pack(*arguments, 0, 0, torch.cuda.current_stream().cuda_stream))
        if status:
            raise failed(op.removesuffix("_backward"), status)

    return checked


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x goes to the CUDA library, which has workspaces of its own. tests/cuda_on_host.py says yes to all."""
    return not x.is_cpu


def intel() -> bool:
    """Whether Intel made the chip; False without the CPU library."""
    return _CPU is not None and bool(_CPU.blip3o_cpu_intel())


def instruction_set() -> str:
    """What the CPU library uses here: a name of INSTRUCTION_SETS; "" without the library."""
    return "" if _CPU is None else _INSTRUCTION_SET_NAMES[_CPU.blip3o_cpu_best()]


def failed(op: str, status: int) -> BackendError:
    """The exception for a status that is not 0."""
    reasons = {
        1: "an argument is out of range",
        2: "there is no body for these dtypes",
        3: f"this chip has {instruction_set()} at best",
        4: f"CUDA reported {_cuda_error()}",
    }
    return BackendError(f"{op}: the native library refused with status {status}: {reasons[status]}")


def _cuda_error() -> str:
    if _CUDA is None:
        return ""
    _CUDA.blip3o_cuda_error.restype = ctypes.c_char_p
    text: bytes = _CUDA.blip3o_cuda_error()
    return text.decode()
