"""Measures the machine code of every CUDA kernel without a GPU and holds it to limits, as gpu_code.py Triton's.

    python tests/cuda_code.py                        against tests/cuda_code_limits.json; `make check-gpu-code`
    python tests/cuda_code.py --update --out FILE    writes what is measured as the new limits, and a table for people:
                                                     read the difference

nvcc compiles the library for four GPUs (the target cuda_all, which builds again only what has changed) and reports what
each kernel needs; cuobjdump says which instructions it holds. A kernel is named as the compiler demangles it, after the
op whose arguments it takes; where several sources have the same one, the worst of each number counts.

A kernel fails if it spills registers, needs more registers, shared memory or stack than its limit, lost an instruction
that it had (16-byte loads and stores, matrix products, copies straight to shared memory), or has no limit; a limit
without its kernel fails too. A spill is let through if someone has given the kernel's line the number `spills` and a
`reason`. Machine code depends on nvcc's version: with another one than the limits were made with, only spills count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from code_limits import HOLDS, Code, counted, in_eights, objections, worst, written

ROOT = Path(__file__).parents[1]
LIMITS = Path(__file__).with_name("cuda_code_limits.json")
COMMAND = "python tests/cuda_code.py --update"
# As the target cuda_all has them, and the shared memory that one block of threads may have, in bytes.
GPUS = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
NEEDS = ("registers", "shared", "stack")  # a line of limits has them in this order, and then what the code holds
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

Codes = dict[str, dict[str, Code]]  # by kernel and GPU


def missing() -> str:
    """What is not here to build the library with; "" if nothing."""
    if NVCC is None:
        return "nvcc, CUDA's compiler"
    return "" if shutil.which("cmake") else "cmake on PATH: pip install cmake"


def build() -> Path:
    """libblip3o_cuda.so for every GPU of GPUS. RuntimeError holds what the compiler said."""
    cmake, folder = shutil.which("cmake") or "cmake", ROOT / "build/cuda"
    for command in ([cmake, "-S", str(ROOT), "-B", str(folder)], [cmake, "--build", str(folder), "-t", "cuda_all"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(run.stdout + run.stderr)
    return folder / "cuda_all/libblip3o_cuda.so"


def version() -> str:
    """nvcc's, such as 13.0.88; "" without one."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout if NVCC else ""
    found = re.search(r"\bV(\d[\d.]*)", text)
    return found[1] if found else ""


def cuobjdump() -> str:
    """The program; nvcc may come without, Triton brings one. RuntimeError if neither does."""
    folders = [Path(NVCC).resolve().parent] if NVCC else []
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise RuntimeError("cuobjdump: expected it beside nvcc or in Triton's package, found none")
    return found


def disassembled(library: Path, gpu: str) -> dict[str, str]:
    """The code for one GPU by the kernel's mangled name."""
    command = [cuobjdump(), "-sass", "-arch", gpu, str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *rest = re.split(r"^\s*Function : (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(rest[::2], rest[1::2], strict=True))


def reported(report: str) -> dict[tuple[str, str], Code]:
    """What nvcc's report says of each kernel, by mangled name and GPU. RuntimeError for a part that cannot be read."""
    _, *rest = re.split(r"Compiling entry function '(\w+)' for '(sm_\w+)'", report)
    found = {}
    for kernel, gpu, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        frame = re.search(
            rf"properties for {kernel}\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            text,
        )
        used = re.search(r"Used (\d+) registers(.*)", text)
        if frame is None or used is None:
            raise RuntimeError(
                f"{kernel} for {gpu}: expected its registers and stack in nvcc's report, got {text[:400]}"
            )
        shared = re.search(r"(\d+) bytes smem", used[2])
        found[kernel, gpu] = Code(
            registers=int(used[1]), shared=int(shared[1]) if shared else 0, stack=int(frame[1]),
            spills=int(frame[2]) + int(frame[3]),
        )  # fmt: skip
    return found


def demangled(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, run.stdout.splitlines(), strict=True))


def readable(name: str) -> str:
    """`void (anonymous namespace)::kernel<8, float>(blip3o_rope_arguments)` -> `rope: kernel<8, fp32>`."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("blip3o::", "")
    op = re.search(r"\bblip3o_(\w+)_arguments\b", name)
    depth, end = 0, len(name)
    while end and (depth or end == len(name)) and name.endswith(")"):  # the parameters, in which others may stand
        end -= 1
        depth += {")": 1, "(": -1}.get(name[end], 0)
    name = re.sub(r",? ?\bblip3o_\w+_arguments\b", "", name[:end])
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = re.sub(rf"\b{long}\b", short, name)
    return f"{op[1]}: {name}" if op else name


def measure(library: Path) -> Codes:
    """Of a library with its report beside it, as csrc/cuda/build.cmake leaves them."""
    found: Codes = {}
    kernels = reported(Path(f"{library}.txt").read_text())
    names = demangled(dict.fromkeys(kernel for kernel, _ in kernels))
    code = {gpu: disassembled(library, gpu) for gpu in dict.fromkeys(gpu for _, gpu in kernels)}
    for (kernel, gpu), needs in kernels.items():
        measured = replace(needs, **counted("cuda", code[gpu][kernel]))
        gpus = found.setdefault(readable(names[kernel]), {})
        gpus[gpu] = worst(measured, gpus[gpu]) if gpu in gpus else measured
    return {kernel: {gpu: found[kernel][gpu] for gpu in GPUS if gpu in found[kernel]} for kernel in sorted(found)}


def read(path: Path = LIMITS) -> dict[str, Any]:
    """A file of limits: {"nvcc": version, "code": {kernel: {GPU: [registers, shared, stack, what it holds]}}}."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"nvcc": "", "code": {}}
    return found


def limit_of(line: Mapping[str, Any], gpu: str) -> dict[str, Any]:
    """One GPU's limit by name, out of a kernel's line."""
    *needs, holds = line[gpu]
    return {**dict(zip(NEEDS, needs, strict=True)), "holds": holds.split()}


def check(found: Codes, limits: Mapping[str, Any], nvcc: str) -> list[str]:
    """What is wrong with the code, a line each. nvcc: the version that made it."""
    wrong = []
    for kernel, gpus in found.items():
        line = limits["code"].get(kernel, {})
        for gpu, code in gpus.items():
            allowed = line["spills"] if line.get("reason") else 0
            if code.spills > allowed:
                wrong.append(f"{kernel} for {gpu}: spills {code.spills} bytes (limit {allowed})")
            if code.shared > GPUS[gpu]:
                wrong.append(f"{kernel} for {gpu}: {code.shared} bytes of shared memory, the GPU has {GPUS[gpu]}")
            if nvcc != limits["nvcc"]:
                continue
            if gpu not in line:
                needs = ", ".join(f"{name} {asdict(code)[name]}" for name in NEEDS)
                wrong.append(f"{kernel} for {gpu}: {needs}, and no limit; {COMMAND}")
            else:
                wrong += objections(f"{kernel} for {gpu}", code, limit_of(line, gpu), NEEDS)
    if nvcc == limits["nvcc"]:
        wrong += [
            f"{kernel}: has a limit and is no more; {COMMAND}" for kernel in limits["code"] if kernel not in found
        ]
    return wrong


def updated(found: Codes, limits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines that fit what was found. Spills are not made a limit: that takes a person with a reason."""
    lines = {}
    for kernel, gpus in found.items():
        old = limits["code"].get(kernel, {})
        line: dict[str, Any] = {
            gpu: [in_eights(code.registers), code.shared, code.stack, " ".join(code.holds)]
            for gpu, code in gpus.items()
        }
        lines[kernel] = {**line, **{name: old[name] for name in ("spills", "reason") if name in old}}
    return lines


def table(found: Codes) -> str:
    """A row for each kernel, whatever its template arguments, and GPU: how many there are, the most that any needs,
    and how many hold each instruction."""
    groups: dict[tuple[str, str], list[Code]] = {}
    for kernel, gpus in found.items():
        for gpu, code in gpus.items():
            groups.setdefault((kernel.partition("<")[0], gpu), []).append(code)
    needs = (*NEEDS, "spills")
    lines = [f"| {' | '.join(['kernel', 'GPU', 'pieces', *needs, *HOLDS])} |"]
    lines.append("|---|---" + "|---:" * (1 + len(needs) + len(HOLDS)) + "|")
    for (kernel, gpu), codes in groups.items():
        most = [max(asdict(code)[name] for code in codes) for name in needs]
        holding = [sum(name in code.holds for code in codes) for name in HOLDS]
        lines.append(f"| {' | '.join(map(str, [kernel, gpu, len(codes), *most, *holding]))} |")
    return "\n".join(lines)


def report(found: Codes) -> str:
    """The table for people."""
    pieces = sum(map(len, found.values()))
    return f"""# Machine code of the CUDA kernels

Written by `python tests/cuda_code.py --out` with nvcc {version()}, without a GPU: {pieces} pieces
of {len(found)} kernels. A piece is a kernel with its template arguments for one GPU; `tests/cuda_code_limits.json` has
its limits. A row has the largest numbers of its pieces (registers of a thread; shared memory that is not asked for at
the launch, stack and spills in bytes), and how many of them hold loads and stores of 16 bytes, matrix products and
copies straight to shared memory.

{table(found)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine code of the CUDA kernels, against its limits.")
    parser.add_argument("--out", type=Path, help="a file for the table, in Markdown; standard output by default")
    parser.add_argument("--limits", type=Path, default=LIMITS, help="a file of limits")
    parser.add_argument("--update", action="store_true", help="write the limits")
    options = parser.parse_args()
    if missing():
        print(f"the CUDA sources are not checked: needs {missing()}")
        sys.exit(options.update)
    found, limits, nvcc = measure(build()), read(options.limits), version()
    if options.update:
        limits = {"nvcc": nvcc, "code": updated(found, limits)}
        options.limits.write_text(written("nvcc", nvcc, limits["code"]))
    elif limits["nvcc"] != nvcc:
        print(f"limits are of nvcc {limits['nvcc']}, this is {nvcc}: only spills count")
    if options.out is None:
        print(table(found))
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(found))
    wrong = check(found, limits, nvcc)
    print("\n".join([f"{len(found)} CUDA kernels for {len(GPUS)} GPUs, {len(wrong)} objections", *wrong]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
