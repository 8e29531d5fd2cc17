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
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction, create_function_from_signature

from blip3o_kernels import OPS, Op, dispatch, use
from blip3o_kernels.bodies import body
from blip3o_kernels.triton_ops import INTERPRETED
from blip3o_kernels.workloads import WORKLOADS, Untouched, Workload

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
INSTRUCTIONS = {
    "cuda": {
        "load16": r"\bLDG\.\S*(?:128|256)",
        "store16": r"\bSTG\.\S*(?:128|256)",
        "matrix": r"\b(?:[HIQDO]MMA|[HIQ]GMMA|UTC\w*MMA)\b",
        "copy": r"\b(?:LDGSTS|UBLKCP|UTMALDG)\b",
    },
    "hip": {
        "load16": r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)",
        "store16": r"\b(?:global|buffer|flat)_store_(?:dwordx4|b128)",
        "matrix": r"\bv_(?:mfma|smfmac|wmma|swmmac)_",
        "copy": r"\b(?:buffer_load_\w+ .* lds$|global_load_lds_)",
    },
}


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


@dataclass(frozen=True)
class Code:
    """What one piece of machine code needs and holds. failure: why there is none; everything else is then 0.

    registers: of a thread.  shared, stack: bytes.  spills: on NVIDIA the instructions that store or load a spilled
    register, on AMD the spilled vector registers (scalar ones go into lanes of those, not to memory).  The others
    count instructions: loads and stores of 16 bytes, matrix products, copies from global to shared memory that pass no
    register.
    """

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    threads: int = 0
    load16: int = 0
    store16: int = 0
    matrix: int = 0
    copy: int = 0
    failure: str = ""


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


def call(op: Op, workload: Workload) -> None:
    """Everything the op launches for a workload: without gradients, and with them if the workload trains."""
    bound = inspect.signature(op.function).bind(*workload.args, **workload.kwargs)
    with torch.no_grad():
        op.function(*bound.args, **bound.kwargs)
    if not workload.trained:
        return
    leaves = []
    for name, value in bound.arguments.items():
        if name in op.differentiable and isinstance(value, Tensor) and value.is_floating_point():
            bound.arguments[name] = value.detach().requires_grad_()
            leaves.append(bound.arguments[name])
    outputs = op.function(*bound.args, **bound.kwargs)
    wanted = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    if wanted:
        torch.autograd.grad(wanted, leaves, [torch.empty_like(y) for y in wanted], allow_unused=True)


class Unread(TorchDispatchMode):
    """torch's own functions of floating-point tensors, matrix products above all, return memory that nobody wrote."""

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function.is_view or not any(x.is_floating_point() for x in tensors):
            return function(*args, **kwargs)
        if function._schema.is_mutable:
            return kwargs["out"] if "out" in kwargs else args[0]
        args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        kwargs |= {"device": "meta"} if kwargs.get("device") else {}
        shapes = function(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype), shapes)


@contextmanager
def unread(op: Op) -> Iterator[None]:
    """Inside the block nothing is computed in the op's Triton body, neither by Triton nor by torch."""
    module = body(op.name, "triton")

    def quiet(function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            with Unread():
                return function(*args, **kwargs)

        return run

    functions: dict[str, Any] = {
        name: quiet(vars(module)[name]) for name in ("forward", "backward") if name in vars(module)
    }
    with mock.patch.multiple(module, **functions):
        yield


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
            with unread(op):
                call(op, workload)
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


def counted(backend: str, text: str) -> dict[str, Any]:
    return {name: len(re.findall(what, text, re.MULTILINE)) for name, what in INSTRUCTIONS[backend].items()}


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
            fewest = {name: min(value, asdict(other)[name]) for name, value in asdict(code).items()}
            most = {name: max(value, asdict(other)[name]) for name, value in asdict(code).items()}
            found[job.key] = Code(**{**most, **{name: fewest[name] for name in INSTRUCTIONS["cuda"]}})
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
        for name in ("registers", "shared"):
            if asdict(code)[name] > limit[name]:
                wrong.append(f"{key}: {name} {asdict(code)[name]}, limit {limit[name]}")
        lost = [name for name in limit["holds"] if not asdict(code)[name]]
        if lost:
            wrong.append(f"{key}: holds no {', '.join(lost)} any more")
    return wrong


def updated(found: dict[str, Code], limits: dict[str, Any], everything: bool) -> dict[str, Any]:
    """The limits that fit what was found. Spills are not made a limit: that takes a person with a reason."""
    code = {} if everything else dict(limits["code"])
    for key, measured in found.items():
        if not measured.failure:
            old = limits["code"].get(key, {})
            code[key] = {
                "registers": -(-measured.registers // 8) * 8,  # GPUs hand them out in eights
                "shared": measured.shared,
                "holds": [name for name in INSTRUCTIONS["cuda"] if asdict(measured)[name]],
                **{name: old[name] for name in ("spills", "reason") if name in old},
            }
    return {"triton": triton.__version__, "code": dict(sorted(code.items()))}


def written(limits: dict[str, Any]) -> str:
    """JSON with a line for each piece of code, so that differences read well."""
    lines = [f"  {json.dumps(key)}: {json.dumps(limit)}" for key, limit in limits["code"].items()]
    return f'{{\n "triton": {json.dumps(limits["triton"])},\n "code": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def table(found: dict[str, Code]) -> str:
    """A row for each kernel and GPU: how many pieces, the most any needs, and how many hold each instruction."""
    groups: dict[tuple[str, str], list[Code]] = {}
    for key, code in found.items():
        kernel, _, target = key.split(" | ")
        groups.setdefault((kernel, target), []).append(code)
    needs = ("registers", "shared", "stack", "spills", "threads")
    titles = ["kernel", "GPU", "pieces", *needs, *INSTRUCTIONS["cuda"]]
    lines = [f"| {' | '.join(titles)} |", "|---|---" + "|---:" * (len(titles) - 2) + "|"]
    for (kernel, target), codes in groups.items():
        most = [max(asdict(code)[name] for code in codes) for name in needs]
        holding = [sum(asdict(code)[name] > 0 for code in codes) for name in INSTRUCTIONS["cuda"]]
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
        options.limits.write_text(written(limits))
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
