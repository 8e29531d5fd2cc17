"""What this machine has, and which backend each op will use on it."""

import os
import platform
from pathlib import Path

import torch

import blip3o
from blip3o.train.loop import BFLOAT16_PRODUCTS
from blip3o_kernels import OPS, BackendError, dispatch, explain, native


class UnsoundMachine(RuntimeError):
    """Something must be mended before the figures of this machine mean anything."""


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded into this process; more than one fight over the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.rsplit("/", 1)[-1]}
    return sorted(name for name in names if Path(name).name.startswith(("libgomp", "libomp", "libiomp")))


def examine() -> dict[str, object]:
    """Versions, libraries and choices, as plain values under stable keys."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found: dict[str, object] = {
        "blip3o": blip3o.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": device,
        "native_cpu": native.CPU_MISSING or f"loaded, {native.instruction_set()}",
        "native_cuda": native.CUDA_MISSING or "loaded",
        "openmp_runtimes": openmp_runtimes(),
        "training_products": "bfloat16 (AMX tiles)" if BFLOAT16_PRODUCTS else "float32 (no AMX tiles for bfloat16)",
        "forced_backend": dispatch.forced.backend if dispatch.forced else "none",
    }
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                first = explain(op, torch.zeros(1, dtype=dtype, device=kind)).splitlines()[0].partition(": ")[2]
            except BackendError as error:
                first = f"none ({error})"
            found[f"{op.name}.{str(dtype).removeprefix('torch.')}"] = first
    return found


def check(found: dict[str, object]) -> None:
    """Raise UnsoundMachine if what `examine` found has to be mended."""
    runtimes = found["openmp_runtimes"]
    if isinstance(runtimes, list) and len(runtimes) > 1:
        raise UnsoundMachine(f"{len(runtimes)} OpenMP runtimes are loaded, expected one: {', '.join(runtimes)}")
