"""Builds the CUDA library for this machine's GPU, puts it where the package looks for it, and runs a kernel of it.

    python benchmarks/gpu_build.py [--arch 90a]

Needs nvcc, cmake and a C++ compiler. The CPU library is built too if the package has none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
KINDS = {"cpu": "libblip3o_cpu.so", "cuda": "libblip3o_cuda.so"}
# What the new library is asked in a process of its own: this one has loaded the old.
TRIAL = """
import torch
from blip3o_kernels import native, rms_norm, use
assert not native.CUDA_MISSING, native.CUDA_MISSING
x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
with use("native"):
    y = rms_norm(x)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (1024,), eps=1e-6), rtol=2e-2, atol=2e-2)
print("the library runs")
"""


def architecture() -> str:
    """As nvcc names it; Hopper's own instructions are in 90a alone."""
    number = "".join(map(str, torch.cuda.get_device_capability()))
    return "90a" if number == "90" else number


def place() -> Path:
    """The folder of the installed libraries; in an editable install it is not beside the sources."""
    package = resources.files("blip3o_kernels")
    found = package.joinpath("lib", KINDS["cpu"])
    if found.is_file():
        return Path(str(found)).parent
    import blip3o_kernels

    assert blip3o_kernels.__file__ is not None
    return Path(blip3o_kernels.__file__).parent / "lib"


def build(arch: str, folder: Path, kind: str) -> Path:
    """The library of that kind. SystemExit says what is missing, or ends with what the compiler said."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise SystemExit("needs cmake on PATH: pip install cmake")
    library = folder / ("cuda_here" if kind == "cuda" else "") / KINDS[kind]
    if not library.exists():  # the last build failed, and left its stamp
        (folder / "cuda_here.done").unlink(missing_ok=True)
    environment = {**os.environ, "BLIP3O_CUDA_ARCHS": arch}
    target = {"cpu": "blip3o_cpu", "cuda": "cuda_here"}[kind]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder)],
        [cmake, "--build", str(folder), "--parallel", "--target", target],
    ):
        print("$", *command, flush=True)
        if subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(f"{Path(command[0]).name} failed")
    if not library.exists():
        raise SystemExit(f"nvcc left no library; {library}.txt has what it said")
    return library


def put(library: Path, folder: Path) -> None:
    """By a rename: whoever has the old one open keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{library.name}.new"
    shutil.copyfile(library, new)
    new.replace(folder / library.name)
    print(f"{folder / library.name}: {library.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="", help="such as 90a; this machine's GPU if not given")
    options = parser.parse_args()
    arch, target = options.arch or architecture(), place()
    folder = ROOT / f"build/gpu_{arch}"
    if not (target / KINDS["cpu"]).exists():
        put(build(arch, folder, "cpu"), target)
    put(build(arch, folder, "cuda"), target)
    if not options.arch:
        subprocess.run([sys.executable, "-c", TRIAL], check=True)


if __name__ == "__main__":
    main()
