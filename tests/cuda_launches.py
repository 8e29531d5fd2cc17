"""The launches that every CUDA op makes at the sizes of 4b and 8b, recorded on the host instead of made.

    python tests/cuda_launches.py           a table of them, and what is wrong with any
    python tests/cuda_launches.py rope      of these ops alone

csrc/cuda is compiled as C++ over csrc/host, which tells of a launch and makes none, and the ops' Python takes its CUDA
branch on memory that nobody reads. Ops and functions are those of native.ON_CUDA, sizes those of workloads.py and of
the ops' samples. It is wrong if

- a launch is none that the GPU takes, each of four in turn: grid, threads in whole warps, shared memory together with
  what the kernel has by itself, registers for all its threads (tests/cuda_code_limits.json knows both);
- a call over many elements leaves most of a GPU idle, or a thread has more elements than a loop over a row needs;
- a size beyond 32 bits is cut to them, or comes to a launch, instead of being refused with a status;
- an address that is not a multiple of 16 is refused, or goes to a kernel that needs one (but for INSIDE);
- a call runs on another stream than that of its tensor's device, or comes to the C++ of a CPU.

Told as well, and no objection: the kernels that no sample launches, which no test of results runs either.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cuda_code
import torch
from rebuilt import ROOT, compiler
from torch import Tensor
from workload_calls import call, unread

from blip3o_kernels import OPS, Op, dispatch, memory, native, use
from blip3o_kernels.bodies import body
from blip3o_kernels.workloads import WORKLOADS, Untouched

STREAM = 0x5EED  # what torch says that the current stream is, inside the device's own block
LARGE, BUSY = 2**20, 64  # over so many elements a call takes at least so many blocks; a large GPU has places for 130
MOST_ELEMENTS = 4096  # of a thread
# Calls whose kernels choose by themselves whether they read 16 bytes at a time. That they choose well is shown by
# cuda_on_host.py: UBSan tells of a vector at an address that is no multiple of its size.
INSIDE = tuple(f"{op}{end}" for op in ("flow_interpolate", "flow_loss", "flow_step") for end in ("", "_backward"))
BEYOND = (2**31, 2**32, 2**40)  # added to a size: multiples of every vector's length, so that nothing else changes
REGISTERS = 65536  # of all threads of a block
# Of a GPU for each that the library is compiled for: compute capability, multiprocessors, and the shared memory of a
# block. What is compiled for 80 runs on 86 and 89 too, which have less of it.
GPUS = {
    "sm_80": (8, 108, 99 * 1024), "sm_90a": (9, 132, 227 * 1024),
    "sm_100": (10, 148, 227 * 1024), "sm_120": (12, 188, 99 * 1024),
}  # fmt: skip
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    kernel: str  # as cuda_code.py names it
    blocks: Sizes
    threads: Sizes
    shared: int

    def __str__(self) -> str:
        sizes = (" x ".join(map(str, sizes)) for sizes in (self.blocks, self.threads))
        return f"{self.kernel}, {' blocks of '.join(sizes)}, {self.shared} bytes"


@dataclass
class Call:
    """One call of a C function: its name without blip3o_cuda_, its struct's bytes, what it launched and returned."""

    function: str
    arguments: bytes
    launches: list[Launch] = field(default_factory=list)
    status: int = 0

    @property
    def values(self) -> list[Any]:
        return list(struct.unpack(native.FORMATS[self.function], self.arguments))

    @property
    def kernels(self) -> set[str]:
        return {launch.kernel for launch in self.launches}


def members() -> dict[str, list[tuple[str, str]]]:
    """The structs of blip3o.h: for each function the type and the name of every member."""
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc/blip3o.h").read_text(), flags=re.DOTALL)
    found: dict[str, list[tuple[str, str]]] = {}
    for text, function in re.findall(r"typedef struct \{(.*?)\} blip3o_(\w+)_arguments;", header, flags=re.DOTALL):
        found[function] = []
        for declaration in text.split(";")[:-1]:
            first, *others = (" ".join(part.split()) for part in declaration.split(","))
            kind, _, name = first.rpartition(" ")
            found[function] += [(kind, each) for each in (name, *others)]
    return found


MEMBERS = members()


class Recorder:
    """The library on the host, told to record. calls: what it was asked for by the ops."""

    def __init__(self, library: Path) -> None:
        self.library, self.calls = ctypes.CDLL(str(library)), list[Call]()
        self.kernels = self._names(library)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t)
        self._record = kind(self._launch)  # kept: the library calls it
        place = ctypes.c_void_p.in_dll(self.library, "blip3o_host_record")
        place.value = ctypes.cast(self._record, ctypes.c_void_p).value

    def _names(self, library: Path) -> dict[int, str]:
        """What lies where in memory."""
        text = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
        places = {name: int(place, 16) for place, _, name in (line.split() for line in text.splitlines())}
        known = ctypes.cast(self.library.blip3o_cuda_version, ctypes.c_void_p).value
        assert known is not None
        base = known - places["blip3o_cuda_version"]
        names = cuda_code.demangled(places)
        return {base + place: cuda_code.readable(names[name]) for name, place in places.items()}

    def _launch(self, kernel: int, sizes: Any, shared: int) -> None:
        blocks, threads = (sizes[0], sizes[1], sizes[2]), (sizes[3], sizes[4], sizes[5])
        self.calls[-1].launches.append(Launch(self.kernels[kernel], blocks, threads, shared))

    def become(self, gpu: str) -> None:
        """From now on the library takes itself for one on that GPU."""
        for name, value in zip(("capability", "multiprocessors"), GPUS[gpu][:2], strict=True):
            ctypes.c_int.in_dll(self.library, f"blip3o_host_{name}").value = value

    def call(self, function: str, arguments: bytes) -> Call:
        made = Call(function, arguments)
        self.calls.append(made)
        made.status = self.library[f"blip3o_cuda_{function}"](ctypes.c_char_p(arguments))
        return made

    def changed(self, recorded: Call, member: int, value: int) -> Call:
        """The same call with another value of one member."""
        values = recorded.values
        values[member] = value
        made = self.call(recorded.function, struct.pack(native.FORMATS[recorded.function], *values))
        self.calls.pop()
        return made

    def function(self, kind: str, op: str) -> Callable[[bytes], int]:
        """native.function: without a GPU every call comes here."""

        def run(arguments: bytes) -> int:
            if kind == "cpu":
                raise AssertionError(f"{op}: a tensor on a GPU came to the C++ of a CPU")
            return self.call(op, arguments).status

        return run


@contextmanager
def as_on_a_gpu(recorder: Recorder) -> Iterator[None]:
    """Inside the block the native bodies take every tensor for one on a GPU, and the recorder for their library. For a
    process of its own: the bodies' modules stay so."""
    inside: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        inside.append(which)
        yield
        inside.pop()

    with (
        mock.patch.object(Tensor, "is_cpu", property(lambda _: False)),
        mock.patch.object(Tensor, "is_cuda", property(lambda _: True)),
        mock.patch.object(torch.cuda, "device", device),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=STREAM * len(inside))),
        mock.patch.object(native, "function", recorder.function),
        mock.patch.object(memory, "LARGE", 2**62),
        mock.patch.object(dispatch, "_shortcut", lambda: -1),  # a shortcut leads to the C++
        mock.patch.object(dispatch, "refusal", return_value=""),
        use("native"),
    ):
        for op in OPS:
            if op.name in native.ON_CUDA:
                importlib.reload(body(op.name, "native"))
        yield


def illegal(made: Call, codes: Mapping[str, Any], gpu: str) -> Iterator[str]:
    """The launches that a GPU would refuse. codes: the lines of tests/cuda_code_limits.json."""
    for launch in made.launches:
        threads, what = prod(launch.threads), f"{made.function}: {launch}"
        if not (0 < threads <= 1024 and threads % 32 == 0 and launch.threads[2] <= 64):
            yield f"{what}: {threads} threads, expected whole warps and 1024 at most"
        if not (0 < launch.blocks[0] < 2**31 and all(0 < side < 2**16 for side in launch.blocks[1:])):
            yield f"{what}: no GPU has such a grid"
        line = codes.get(launch.kernel)
        if line is None:
            yield f"{what}: its machine code has no limits; {cuda_code.COMMAND}"
            continue
        limit, room = cuda_code.limit_of(line, gpu), GPUS[gpu][2]
        if launch.shared + limit["shared"] > room:
            yield f"{what}: with {limit['shared']} of its own, a block has {room} on {gpu}"
        if threads * limit["registers"] > REGISTERS:
            yield f"{what}: {limit['registers']} registers for {threads} threads, {gpu} has {REGISTERS}"


def elements_of(made: Call, tensors: list[Tensor]) -> int:
    """Over how many elements a call works: those of the largest tensor, or of a chunk of logits."""
    values = {name: value for (_, name), value in zip(MEMBERS[made.function], made.values, strict=True)}
    return values["rows"] * values["vocab"] if "vocab" in values else max(x.numel() for x in tensors)


def unfit(made: Call, elements: int) -> Iterator[str]:
    """What is wrong with a call over tensors of so many elements."""
    if made.status or not made.launches:
        yield f"{made.function}: status {made.status}, {len(made.launches)} launches"
        return
    if made.values[-1] != STREAM:
        yield f"{made.function}: on another stream than that of its tensor's device"
    blocks = max(prod(launch.blocks) for launch in made.launches)
    threads = max(prod(launch.blocks) * prod(launch.threads) for launch in made.launches)
    if elements >= LARGE and blocks < BUSY:
        yield f"{made.function}: {blocks} blocks for {elements} elements, expected {BUSY} at least"
    if elements > MOST_ELEMENTS * threads:
        yield f"{made.function}: {threads} threads for {elements} elements, expected one for {MOST_ELEMENTS} at most"


def cut_short(recorder: Recorder, recorded: Call, codes: Mapping[str, Any], gpu: str) -> Iterator[str]:
    """Sizes that are out of range and neither refused nor launched for. One that is cut to 32 bits gives the launch of
    what is left, though it is one that launches depend on."""
    for index, (kind, name) in enumerate(MEMBERS[recorded.function]):
        size = recorded.values[index]
        if kind != "int64_t" or size <= 0:
            continue
        for other in (*(size + more for more in BEYOND), 0, -1):
            made, what = recorder.changed(recorded, index, other), f"{recorded.function}: {name} {other}"
            if made.status not in (0, 1):
                yield f"{what}: status {made.status}, expected 1: an argument is out of range"
            if made.status:
                continue
            yield from (f"{what}: {wrong}" for wrong in illegal(made, codes, gpu))
            twice = recorder.changed(recorded, index, 2 * size)
            for before, after, double in zip(recorded.launches, made.launches, twice.launches, strict=False):
                depends = double.kernel == before.kernel and double != before and twice.status == 0
                if other > size and after == before and depends:
                    yield f"{what}: is launched as {size} is: {before}"


def misaligned(recorder: Recorder, recorded: Call, codes: Mapping[str, Any], gpu: str) -> Iterator[str]:
    """Inputs at addresses that are no multiples of 16: all are served, and the first is not read 16 bytes at a time."""
    wide = {
        kernel
        for kernel in recorded.kernels
        if kernel in codes and "load16" in cuda_code.limit_of(codes[kernel], gpu)["holds"]
    }
    first = True
    for index, (kind, name) in enumerate(MEMBERS[recorded.function]):
        if kind not in ("const void*", "const float*") or not recorded.values[index]:
            continue
        made = recorder.changed(recorded, index, recorded.values[index] + 4)
        if made.status or not made.launches:
            yield f"{recorded.function}: status {made.status} with {name} at a multiple of 4"
        yield from illegal(made, codes, gpu)
        if first and wide and wide <= made.kernels and recorded.function not in INSIDE:
            yield f"{recorded.function}: {', '.join(sorted(wide))} for {name} at a multiple of 4"
        first = False


def of_samples(op: Op, recorder: Recorder, codes: Mapping[str, Any], gpu: str) -> Iterator[str]:
    """Records what the op launches for its samples, and says what is wrong."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for sample in op.samples(dtype, "cpu"):
            start = len(recorder.calls)
            call(op, sample)
            for made in recorder.calls[start:]:
                wrong = [f"{made.function}: status {made.status}"] if made.status else illegal(made, codes, gpu)
                yield from (f"{op.name} {sample.name}: {one}" for one in wrong)


def of_workloads(op: Op, recorder: Recorder, codes: Mapping[str, Any], gpu: str) -> Iterator[str]:
    """Records what the op launches for its workloads, prints it, and says what is wrong."""
    for dtype in (torch.bfloat16, torch.float32):
        for workload in WORKLOADS[op.name](Untouched(dtype, "cpu")):
            start = len(recorder.calls)
            with unread(body(op.name, "native")):
                call(op, workload, workload.trained)
            made, head = recorder.calls[start:], f"{workload.name}, {str(dtype).removeprefix('torch.')}, {gpu}"
            print(*dict.fromkeys(f"{head}: {one.function}: {x}" for one in made for x in one.launches), sep="\n")
            tensors = [x for x in (*workload.args, *workload.kwargs.values()) if isinstance(x, Tensor)]
            for one in made:
                wrong = [*illegal(one, codes, gpu), *unfit(one, elements_of(one, tensors))]
                wrong += [*cut_short(recorder, one, codes, gpu), *misaligned(recorder, one, codes, gpu)]
                yield from (f"{op.name} {workload.name}: {text}" for text in wrong)


def build(folder: Path) -> Path:
    """The CUDA library for this machine's processor, in no hurry to run."""
    sources, objects = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/host/*.cpp")], []
    for source in sorted(sources):
        objects.append(folder / f"{source.stem}.o")
        command = [compiler(), "-std=gnu++17", "-O0", "-fPIC", "-w", "-x", "c++", "-c", str(source)]
        subprocess.run([*command, "-o", str(objects[-1])], check=True)
    library = folder / "libblip3o_cuda_launches.so"
    subprocess.run([compiler(), "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


def main() -> None:
    known = [op.name for op in OPS if op.name in native.ON_CUDA]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="all that have CUDA kernels if none is given")
    options = parser.parse_args()
    if set(options.ops) - set(known):
        parser.error(f"ops: expected some of {', '.join(known)}, got {' '.join(options.ops)}")
    codes: dict[str, Any] = cuda_code.read()["code"]
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(build(Path(folder)))
        wrong, kernels = dict[str, None](), set[str]()
        with as_on_a_gpu(recorder):
            for gpu in GPUS:
                recorder.become(gpu)
                for op in (op for op in OPS if op.name in (options.ops or known)):
                    start = len(recorder.calls)
                    wrong |= dict.fromkeys(of_samples(op, recorder, codes, gpu))
                    kernels |= {kernel for made in recorder.calls[start:] for kernel in made.kernels}
                    wrong |= dict.fromkeys(of_workloads(op, recorder, codes, gpu))
    if not options.ops:
        print(*(f"no sample launches {kernel}" for kernel in codes if kernel not in kernels), sep="\n")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(recorder.calls)} calls, {len(kernels)} of {len(codes)} kernels by samples, {len(wrong)} objections")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
