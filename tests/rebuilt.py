"""A copy of the package with a CPU library built otherwise, and a process on the copy: for faults.py and fuzz.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernels/blip3o_kernels"


def copy_package(folder: Path) -> Path:
    """blip3o_kernels without its libraries, in `folder`."""
    target = folder / "blip3o_kernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return target


def compiler() -> str:
    return shutil.which(os.environ.get("CXX", "c++")) or "c++"


def build_library(folder: Path, sources: Iterable[Path], flags: list[str]) -> None:
    """libblip3o_cpu for the copy in `folder`: as CMakeLists.txt builds it, but for the flags. Two files at a time."""
    (folder / "blip3o_kernels/lib").mkdir()
    common = ["-std=gnu++17", "-fopenmp", "-fPIC", "-w", "-Wno-psabi", "-fno-exceptions", "-fno-rtti", *flags]
    waiting = [(source, folder / f"{source.stem}.o") for source in sources]
    objects, running = [str(o) for _, o in waiting], []
    while waiting or running:
        while waiting and len(running) < 2:
            source, target = waiting.pop()
            running.append(subprocess.Popen([compiler(), *common, "-c", str(source), "-o", str(target)]))
        if running.pop(0).wait():
            raise RuntimeError("the compiler failed")
    link = ["-shared", "-Wl,--unresolved-symbols=ignore-all", "-o", str(folder / "blip3o_kernels/lib/libblip3o_cpu.so")]
    subprocess.run([compiler(), *common, *objects, *link], check=True)


def run_on_copy(folder: Path, command: list[str], **environment: str) -> int:
    """Runs `python *command` with the copy in `folder` in front, and returns its exit status."""
    # -S: no start-up files of site-packages, so no editable install that would win over the copy
    path = [str(folder), str(ROOT / "tests"), *(p for p in sys.path if "site-packages" in p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment}
    return subprocess.run([sys.executable, "-S", *command], env=environment, check=False).returncode
