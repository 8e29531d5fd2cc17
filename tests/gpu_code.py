"""Compiles every Triton kernel for six GPUs without having one, measures the machine code, and holds it to limits.

    python tests/gpu_code.py                   all ops, against tests/gpu_code_limits.json; `make check-gpu-code`
    python tests/gpu_code.py rms_norm rope     these ops alone
    python tests/gpu_code.py --update          writes what is measured as the new limits: read the difference

Which kernels there are, and with which arguments, is nowhere written down: each op is called on its workloads, forward
and backward, with its launches recorded instead of made, for each GPU whose tiles differ from another's. Triton then
specialises a recorded launch as it would on that GPU (16-byte alignment, multiples of 16, ones), so what is compiled
here is what would run there.

A piece of code fails if it does not compile, spills registers, needs more shared memory or threads than the GPU has,
needs more registers or shared memory than its limit, or lost an instruction that it had (16-byte loads and stores,
matrix products, copies straight to shared memory). A spill is let through if someone has given the limit the number
`spills` and a `reason`. Machine code depends on Triton's version: with another one than the limits were made with,
only the first three count.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from code_limits import HOLDS, Code, counted, in_eights, objections, worst, written
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction, create_function_from_signature
from workload_calls import call, unread

from blip3o_kernels import OPS, Op, dispatch, use
from blip3o_kernels.bodies import body
from blip3o_kernels.triton_ops import INTERPRETED
from blip3o_kernels.workloads import WORKLOADS, Untouched

LIMITS = Path(__file__).with_name("gpu_code_limits.json")
COMMAND = "python tests/gpu_code.py --update"
# Each GPU, and the shared memory that one block of threads may have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64 * 1024),
}
THREADS = 1024  # of a block, on all of them
# By the names that `architecture` gives them in a body with launches of its own for each: attention's.
FAMILIES: dict[str, list[str]] = {}
for _target, (_gpu, _) in TARGETS.items():
    FAMILIES.setdefault("hip" if _gpu.backend == "hip" else f"sm{_gpu.arch}", []).append(_target)
DTYPES = (torch.bfloat16, torch.float32)  # float32 for the first workload of an op alone


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one GPU. variant: what the launch fixes at compile time, in words."""

    kernel: str
    variant: str
    target: str
    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.kernel} | {self.variant} | {self.target}"


@contextmanager
def recorded(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[dict[tuple[str, str, str], Job]]:
    """Inside the block kernels are not launched; the jobs to compile what would have been are gathered."""
    jobs: dict[tuple[str, str, str], Job] = {}

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        for target in targets:
            backend = make_backend(TARGETS[target][0])
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            arguments, specialisation, rest = bind(*args, **kwargs)
            options, signature, constants, attributes = kernel._pack_args(
                backend, kwargs, arguments, specialisation, rest
            )
            source = ASTSource(kernel, signature, constants, attributes)
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
            job = Job(name, described(source, options), target, source, options.__dict__)
            jobs[target, source.hash(), options.hash()] = job

    with mock.patch.object(JITFunction, "run", record):
        yield jobs


def described(source: ASTSource, options: Any) -> str:
    """Dtypes, constants, warps and stages; "odd": pointers and integers not known to be multiples of 16."""
    names = list(source.signature)
    kinds = list(source.signature.values())
    dtypes = dict.fromkeys(kind[1:] for kind in kinds if kind.startswith("*"))
    constants = [f"{names[path[0]]}={value}" for path, value in source.constants.items()]
    aligned = {path[0] for path, known in source.attrs.items() if ["tt.divisibility", 16] in known}
    odd = [names[i] for i, kind in enumerate(kinds) if kind[0] in "*iu" and i not in aligned]
    words = [*dtypes, *constants, f"warps={options.num_warps}", f"stages={options.num_stages}"]
    return " ".join(words + ([f"odd={','.join(odd)}"] if odd else []))


def jobs_of(ops: Iterable[Op]) -> list[Job]:
    """All machine code of the ops that have a Triton body, each piece once."""
    jobs: dict[tuple[str, str, str], Job] = {}
    with mock.patch.object(dispatch, "refusal", return_value=""), use("triton"):
        for op in ops:
            if not any(each.backend == "triton" for each in op.bodies):
                continue
            if op.name not in WORKLOADS:
                raise SystemExit(f"{op.name} has a Triton body and no workloads: add them to workloads.py")
            found: dict[tuple[str, str, str], Job] = {}
            module = body(op.name, "triton")
            if "architecture" in vars(module):  # the launches depend on the GPU
                for family, targets in FAMILIES.items():
                    with mock.patch.object(module, "architecture", return_value=family), recorded(targets) as some:
                        call_all(op)
                    found |= some
            else:
                with recorded() as found:
                    call_all(op)
            if not found:
                raise SystemExit(f"{op.name}: its Triton body was called and launched nothing")
            jobs |= found
    return list(jobs.values())


def call_all(op: Op) -> None:
    """The op on its workloads, on the first of them in all dtypes."""
    for dtype in DTYPES:
        for workload in WORKLOADS[op.name](Untouched(dtype, "cpu")):
            with unread(body(op.name, "triton")):
                call(op, workload, workload.trained)
            if dtype != DTYPES[0]:
                break


def measure(job: Job) -> Code:
    try:
        compiled = triton.compile(job.source, target=TARGETS[job.target][0], options=job.options)
    except (TritonError, RuntimeError, ValueError) as error:
        return Code(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    code = measured_nvidia(compiled.asm) if "cubin" in compiled.asm else measured_amd(compiled.asm["amdgcn"])
    threads = compiled.metadata.num_warps * TARGETS[job.target][0].warp_size
    return replace(code, shared=compiled.metadata.shared, threads=threads)


def measured_nvidia(asm: dict[str, Any]) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:1000]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Code(registers=int(usage[1]), stack=int(usage[2]), spills=spills, **counted("cuda", text))


def measured_amd(text: str) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)$", text, re.MULTILINE)
        assert found is not None, name
        return int(found[1])

    stack = field("private_segment_fixed_size")
    return Code(registers=field("vgpr_count"), stack=stack, spills=field("vgpr_spill_count"), **counted("hip", text))


_jobs: list[Job] = []  # what the worker processes inherit: a job holds a kernel, which does not pickle


def _measure_number(index: int) -> Code:
    return measure(_jobs[index])


def measure_all(jobs: list[Job], processes: int) -> dict[str, Code]:
    """Code by key; where launches differ in nothing a key tells, the worst of each number."""
    _jobs[:] = jobs
    if processes == 1:
        codes = [measure(job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
            codes = list(pool.map(_measure_number, range(len(jobs)), chunksize=4))
    found: dict[str, Code] = {}
    for job, code in zip(jobs, codes, strict=True):
        other = found.setdefault(job.key, code)
        if other != code:
            found[job.key] = worst(code, other)
    return dict(sorted(found.items()))


def check(found: dict[str, Code], limits: dict[str, Any]) -> list[str]:
    """What is wrong with the code, a line each. limits: {"triton": version, "code": {key: limit}}."""
    wrong = []
    same_version = limits["triton"] == triton.__version__
    for key, code in found.items():
        limit = limits["code"].get(key)
        if code.failure:
            wrong.append(f"{key}: does not compile: {code.failure}")
            continue
        shared = TARGETS[key.rpartition(" | ")[2]][1]
        if code.shared > shared or code.threads > THREADS:
            wrong.append(
                f"{key}: {code.shared} bytes of shared memory and {code.threads} threads, the GPU has {shared}"
                f" and {THREADS}"
            )
        allowed = limit["spills"] if limit and limit.get("reason") else 0
        if code.spills > allowed or (code.stack and not allowed):
            wrong.append(f"{key}: spills {code.spills} (limit {allowed}), stack {code.stack} bytes")
        if not same_version:
            continue
        if limit is None:
            wrong.append(f"{key}: has no limit; {COMMAND}")
            continue
        wrong += objections(key, code, limit, ("registers", "shared"))
    return wrong


def updated(found: dict[str, Code], limits: dict[str, Any], everything: bool) -> dict[str, Any]:
    """The limits that fit what was found. Spills are not made a limit: that takes a person with a reason."""
    code = {} if everything else dict(limits["code"])
    for key, measured in found.items():
        if not measured.failure:
            old = limits["code"].get(key, {})
            code[key] = {
                "registers": in_eights(measured.registers),
                "shared": measured.shared,
                "holds": measured.holds,
                **{name: old[name] for name in ("spills", "reason") if name in old},
            }
    return {"triton": triton.__version__, "code": dict(sorted(code.items()))}


def table(found: dict[str, Code]) -> str:
    """A row for each kernel and GPU: how many pieces, the most any needs, and how many hold each instruction."""
    groups: dict[tuple[str, str], list[Code]] = {}
    for key, code in found.items():
        kernel, _, target = key.split(" | ")
        groups.setdefault((kernel, target), []).append(code)
    needs = ("registers", "shared", "stack", "spills", "threads")
    titles = ["kernel", "GPU", "pieces", *needs, *HOLDS]
    lines = [f"| {' | '.join(titles)} |", "|---|---" + "|---:" * (len(titles) - 2) + "|"]
    for (kernel, target), codes in groups.items():
        most = [max(asdict(code)[name] for code in codes) for name in needs]
        holding = [sum(asdict(code)[name] > 0 for code in codes) for name in HOLDS]
        lines.append(f"| {' | '.join(map(str, [kernel, target, len(codes), *most, *holding]))} |")
    return "\n".join(lines) + "\n"


def report(found: dict[str, Code], limits: dict[str, Any]) -> str:
    """The table for people, with what spills and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, code in found.items():
        if code.spills or code.stack:
            kernel, _, target = key.split(" | ")
            reason = limits["code"].get(key, {}).get("reason", "not looked at")
            reasons.setdefault((reason, target), []).append(kernel)
    spilled = [
        f"- {target}: {', '.join(f'{kernels.count(each)} of {each}' for each in dict.fromkeys(kernels))}. {reason}"
        for (reason, target), kernels in reasons.items()
    ]
    return f"""# Machine code of the Triton kernels

Written by `python tests/gpu_code.py --out` with triton {triton.__version__}, without a GPU: {len(found)} pieces.
A piece is a kernel as a workload launches it on a GPU; its limit is in `tests/gpu_code_limits.json`. A row has the
largest numbers of its pieces (registers and spills of a thread, shared memory and stack in bytes), and how many of
them hold loads and stores of 16 bytes, matrix products and copies straight to shared memory.

{table(found)}
Spills:

{chr(10).join(spilled) or "none"}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine code of the Triton kernels, against its limits.")
    parser.add_argument("ops", nargs="*", help="names of ops; all if none is given")
    parser.add_argument("--out", type=Path, help="a file for the table, in Markdown; standard output by default")
    parser.add_argument("--limits", type=Path, default=LIMITS, help="a file of limits")
    parser.add_argument("--update", action="store_true", help="write the limits")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if INTERPRETED:
        raise SystemExit("unset TRITON_INTERPRET: the interpreter makes no machine code")
    unknown = set(options.ops) - {op.name for op in OPS}
    if unknown:
        raise SystemExit(f"ops: expected some of {', '.join(op.name for op in OPS)}, got {', '.join(sorted(unknown))}")

    jobs = jobs_of(op for op in OPS if not options.ops or op.name in options.ops)
    found = measure_all(jobs, options.processes)
    limits = json.loads(options.limits.read_text()) if options.limits.exists() else {"triton": "", "code": {}}
    if options.update:
        limits = updated(found, limits, everything=not options.ops)
        options.limits.write_text(written("triton", limits["triton"], limits["code"]))
    elif limits["triton"] != triton.__version__:
        print(f"limits are of triton {limits['triton']}, this is {triton.__version__}: only what cannot run counts")
    if options.out is None:
        print(table(found))
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report(found, limits))
    wrong = check(found, limits)
    if not options.ops and limits["triton"] == triton.__version__:
        wrong += [f"{key}: has a limit and is no more; {COMMAND}" for key in limits["code"] if key not in found]
    print("\n".join([f"{len(found)} pieces of machine code, {len(wrong)} objections", *wrong]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
