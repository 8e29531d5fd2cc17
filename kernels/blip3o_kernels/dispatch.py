"""Which backend runs an op, how to force one, and why it was chosen.

The backends are three words: `reference` (plain PyTorch, every op has it), `native` (C++ on a CPU, CUDA on a GPU) and
`triton`. What an op has beside its reference is written down in the op's own file as a tuple of `Body`. Choosing is
plain Python on facts that are constants once the package is imported.

A forced backend never falls back: it runs, or it raises `BackendError` and says why. Three ways to force one:

    with use("native"): ...             a block
    with use("native:avx2"): ...        a block, with one instruction set of the CPU library
    BLIP3O_BACKEND=native python ...    a process

The choice is process-wide, not per thread: the backward pass of a GPU runs on another thread than its forward pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from .samples import Sample

_PLAIN = (Tensor, Parameter)
BACKENDS = ("reference", "native", "triton")
INSTRUCTION_SETS = {
    "": 0,
    "portable": 1,
    "avx2": 2,
    "avx512": 3,
    "avx512_bf16": 4,
    "amx": 5,
}  # the codes of csrc/blip3o.h; "" is the chip's best


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


@dataclass(frozen=True)
class Body:
    """One implementation of an op beside its reference.

    backend: "native" or "triton".  device: the device type it runs on.  dtypes: those of the leading input.
    backward: whether it has its own backward pass.  missing: why it cannot run in this process, "" if it can.
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    backward: bool
    missing: str = ""


@dataclass(frozen=True)
class Op:
    """Everything the tests and benchmarks need to know of an op.

    name: the one word.  function: the public function.  reference: the specification, same arguments.
    samples: `samples(dtype, device)` yields inputs.  differentiable: arguments with a gradient.  bodies: the other
    backends.
    """

    name: str
    function: Callable[..., object]
    reference: Callable[..., object]
    samples: Callable[..., Iterator[Sample]]
    differentiable: tuple[str, ...]
    bodies: tuple[Body, ...] = ()
    table: dict[tuple[str, torch.dtype], str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for body in reversed(self.bodies):  # the first body in the tuple is preferred
            interpreted = body.backend == "triton" and body.device == "cpu"  # for tests, far slower than the reference
            if not body.missing and not interpreted:
                self.table.update({(body.device, dtype): body.backend for dtype in body.dtypes})


@dataclass(frozen=True)
class Forced:
    """A backend asked for by name; `instruction_set` is a code of INSTRUCTION_SETS."""

    backend: str
    instruction_set: int = 0


def _parse(text: str, source: str) -> Forced:
    backend, _, instruction_set = text.partition(":")
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {text!r}")
    if instruction_set not in INSTRUCTION_SETS or (":" in text and (backend != "native" or not instruction_set)):
        known = ", ".join(f"native:{name}" for name in INSTRUCTION_SETS if name)
        raise ValueError(f"{source}: an instruction set is one of {known}, got {text!r}")
    return Forced(backend, INSTRUCTION_SETS[instruction_set])


_variable = os.environ.get("BLIP3O_BACKEND", "")
_blocks = [_parse(_variable, "BLIP3O_BACKEND") if _variable else None]  # the process's, then each open block's
_blocks_lock = threading.Lock()
forced: Forced | None = _blocks[0]


def _shortcut() -> int:
    if forced is None:
        return 0
    return forced.instruction_set if forced.backend == "native" else -1


shortcut = _shortcut()  # the instruction set that shortcut.py's functions take now; -1: another backend is forced


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the block on `backend`: "reference", "native", "triton", or "native:avx2" and its like.

    Raises ValueError for an unknown word. An op that the backend does not have raises BackendError when it is called.
    """
    global forced, shortcut
    mine = _parse(backend, "use")
    with _blocks_lock:
        _blocks.append(mine)
        forced = mine
        shortcut = _shortcut()
    try:
        yield
    finally:
        with _blocks_lock:  # blocks of several threads may end in any order
            del _blocks[next(i for i, block in enumerate(_blocks) if block is mine)]
            forced = _blocks[-1]
            shortcut = _shortcut()


def choose(op: Op, x: Tensor) -> str:
    """The backend that runs `op` for an input like `x`. Raises BackendError if a forced backend cannot."""
    if forced is None:
        return op.table.get(("cpu" if x.is_cpu else x.device.type, x.dtype), "reference")
    if forced.backend != "reference":
        why_not = refusal(op, forced.backend, x.device.type, x.dtype)
        if why_not:
            raise BackendError(f"{op.name}: the backend {forced.backend!r} was asked for, but {why_not}")
    return forced.backend


def instruction_set() -> int:
    """The instruction set the CPU library shall use: a code of INSTRUCTION_SETS, 0 unless one was asked for."""
    return 0 if forced is None else forced.instruction_set


def transformed() -> bool:
    """Whether a functorch transform, forward-mode differentiation or torch.jit.trace is active: these need the
    reference's formula."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or _is_tracing()


def direct(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> bool:
    """Whether a C function may read the memory of `x` (and `y` and `z`) right now.

    It may not if one is a subclass (fake, distributed, ...), negated lazily or zeros without memory, or if a mode, a
    functorch transform, forward-mode differentiation or torch.jit.trace is active: all of these must see the call, so
    it goes through the registered op instead.
    """
    return (
        type(x) in _PLAIN
        and not (x.is_neg() or x._is_zerotensor())
        and (y is None or (type(y) in _PLAIN and not (y.is_neg() or y._is_zerotensor())))
        and (z is None or (type(z) in _PLAIN and not (z.is_neg() or z._is_zerotensor())))
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not _is_tracing()
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether all of `tensors` hold their values in their own memory; `direct` asks more, of up to three."""
    for x in tensors:  # a generator expression costs twice as much
        if x is not None and (type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor()):
            return False
    return True


def wanted(*tensors: Tensor | None) -> bool:
    """Whether one of `tensors` has a gradient."""
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    return False


def refusal(op: Op, backend: str, device: str, dtype: torch.dtype) -> str:
    """Why `backend` cannot run `op` on this device and dtype; "" if it can."""
    bodies = [body for body in op.bodies if body.backend == backend]
    if not bodies:
        return f"this op has no {backend} body"
    bodies = [body for body in bodies if body.device == device]
    if not bodies:
        return f"its {backend} body does not run on {device} tensors"
    for body in bodies:
        if dtype in body.dtypes:
            return body.missing
    return f"its {backend} body on {device} does not take {dtype}"


def explain(op: Op | str | Callable[..., object], *inputs: Tensor) -> str:
    """What would run `op` for these inputs, and why every other backend would not.

    op: an Op, its name, or its public function.  inputs: the leading tensor decides (device and dtype).
    """
    from . import OPS

    found = [known for known in OPS if op in (known, known.name, known.function)]
    if not found:
        raise ValueError(f"op: expected one of {', '.join(known.name for known in OPS)}, got {op!r}")
    if not inputs or not isinstance(inputs[0], Tensor):
        raise ValueError("inputs: expected at least the op's leading tensor")
    known, x = found[0], inputs[0]
    if not x.is_floating_point() and all(x.dtype not in body.dtypes for body in known.bodies):
        x = torch.empty(0, device=x.device)  # integers that an op takes beside numbers become float32 first
    device = x.device.type
    reason = "asked for by use() or BLIP3O_BACKEND" if forced is not None else "the fastest it has here"
    lines = [f"{known.name} on {device} {x.dtype}: {choose(known, x)} ({reason})"]
    for backend in BACKENDS[1:]:
        lines.append(f"  {backend}: {refusal(known, backend, device, x.dtype) or 'can run'}")
    return "\n".join(lines)
