"""Wrong arguments of every op: ValueError or TypeError that begins with the argument's name, the same on every backend.

Each argument of each sample is replaced in turn. An argument whose size sets that of others may be reported as theirs.
A target outside the vocabulary is an IndexError, as in torch.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from conformance import bound, outputs_of, variants
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip3o_kernels import OPS, BackendError, attention, dispatch, ops, rms_norm, swiglu, use
from blip3o_kernels.dispatch import Op

MODES = ("", "reference", "native")
SETS_SIZE_OF = {"key": ("value", "key_weight", "key_bias"), "cos": ("sin",), "weight": ("target",)}  # x: of all
NO_TENSORS = ([1.0], "a", 1j, {})
NO_OPTIONS = ("a", 1j, {}, math.nan, 1e300, torch.ones(2), torch.ones((), device="meta"))


def outcome(op: Op, mode: str, arguments: dict[str, object]) -> object:
    """The error, or the outputs' shapes and dtypes."""
    with use(mode) if mode else nullcontext():
        try:
            outputs = outputs_of(op.function(**arguments)).values()
        except (ValueError, TypeError, IndexError, BackendError) as error:
            return error
    return [(y.shape, y.dtype, y.device) for y in outputs]


def never(name: str, parameter: inspect.Parameter, given: object) -> Iterator[object]:
    """What the argument cannot be, whatever the others are."""
    if "Tensor" not in parameter.annotation:
        yield from NO_OPTIONS
    elif given is not None:
        yield from NO_TENSORS
        if isinstance(given, Tensor):
            yield from (given.to(dtype) for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint8))
            yield from (given.float().numpy(), given.to_sparse())
        if "None" not in parameter.annotation:
            yield None


def perhaps(x: Tensor) -> Iterator[Tensor]:
    """What depends on the others."""
    yield from (x.to("meta"), x.unsqueeze(0), x.unsqueeze(-1), x[0], x.flatten(), x.new_zeros(()), x.new_zeros(0))
    yield from (x.double(), x.half(), x.long(), x > 0)
    for i in range(x.dim()):
        yield from (torch.cat([x, x.narrow(i, 0, 1)], i), x.narrow(i, 0, x.shape[i] - 1), x.narrow(i, 0, 0))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_arguments(op: Op) -> None:
    parameters = inspect.signature(op.function).parameters
    leading = next(iter(parameters))
    for sample in variants(op):
        arguments = bound(op, sample)
        for name, parameter in parameters.items():
            given = arguments.get(name)
            for wrong in never(name, parameter, given):
                for mode in MODES:
                    error = outcome(op, mode, {**arguments, name: wrong})
                    assert isinstance(error, (ValueError, TypeError)), f"{sample.name}: {name}={wrong!r} on {mode!r}"
                    assert str(error).startswith(f"{name}: expected "), f"{sample.name}: {name}={wrong!r}: {error}"
            for wrong in perhaps(given) if isinstance(given, Tensor) else ():
                plain, *others = (outcome(op, mode, {**arguments, name: wrong}) for mode in MODES)
                what = f"{sample.name}: {name} {list(wrong.shape)} {wrong.dtype} {wrong.device}"
                for other in others:
                    served = isinstance(plain, list) and isinstance(other, BackendError)  # forced, on meta or float64
                    assert served or repr(other) == repr(plain), f"{what}: {other!r} for {plain!r}"
                if isinstance(plain, Exception):
                    named = parameters if name in (leading, "x") else (name, *SETS_SIZE_OF.get(name, ()))
                    assert str(plain).partition(": expected ")[0] in named, f"{what}: {plain}"


def test_modes_do_not_hide_wrong_ends() -> None:
    x, ends = torch.randn(1, 2, 8, 16), torch.tensor([0, 9, 8], dtype=torch.int32)
    for mode in MODES:
        with use(mode) if mode else nullcontext(), FlopCounterMode(display=False):
            with pytest.raises(ValueError, match=r"cu_seqlens_q: expected ascending from 0 to 8, got \[0, 9, 8\]"):
                attention(x, x, x, cu_seqlens_q=ends)


def test_empty_widths() -> None:
    x, condition = torch.zeros(2, 3, 0), torch.zeros(2, 0)
    for mode in MODES:
        with use(mode) if mode else nullcontext():
            for call in (
                lambda: ops.modulate.modulate(x, condition),
                lambda: ops.gated_residual.gated_residual(x, x, condition),
                lambda: rms_norm(x),
                lambda: attention(*[torch.zeros(1, 2, 3, 0)] * 3),
                lambda: attention(*[torch.zeros(1, 0, 3, 4)] * 3),
            ):
                with pytest.raises(ValueError, match=r"(x|query): expected shape .* > 0"):
                    call()


@pytest.mark.parametrize("call", [rms_norm, swiglu], ids=["rms_norm", "swiglu"])
def test_second_derivative_is_not_silently_missing(call: object) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    with use("native"):
        (dx,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dx.square().sum().backward()


def test_blocks_of_threads_may_end_in_any_order() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with use("native"):
            entered.set()
            left.wait()

    before = dispatch.forced
    thread = threading.Thread(target=other)
    with use("reference"):
        thread.start()
        entered.wait()
    assert dispatch.forced == dispatch.Forced("native")
    left.set()
    thread.join()
    assert dispatch.forced == before
