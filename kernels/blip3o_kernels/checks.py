"""Argument checks. Each names the argument, what was expected and what was got, and costs well under a microsecond."""

from __future__ import annotations

from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGERS = frozenset({torch.int64, torch.int32})
STRIDED = torch.strided
TINY = torch.finfo(torch.float32).tiny  # the least positive number that is asked for where 0 is none
LARGEST = torch.finfo(torch.float32).max  # the native and Triton bodies take numbers as float32


def fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def mistyped(argument: str, expected: str, got: object) -> NoReturn:
    """TypeError that says what `got` is: a tensor's dtype, and its layout if it is not the usual one, or a type."""
    if isinstance(got, Tensor):
        kind = str(got.dtype) if got.layout is STRIDED else f"{got.dtype} in the layout {got.layout}"
    else:
        kind = "None" if got is None else type(got).__name__
    raise TypeError(f"{argument}: expected {expected}, got {kind}")


def floating(argument: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not STRIDED:
        mistyped(argument, "a floating-point tensor", x)


def integer(argument: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in INTEGERS or x.layout is not STRIDED:
        mistyped(argument, "an int64 or int32 tensor", x)


def of(dtype: torch.dtype, argument: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype is not dtype or x.layout is not STRIDED:
        mistyped(argument, f"an {str(dtype).removeprefix('torch.')} tensor", x)


def same_dtype(argument: str, x: Tensor, other: str, y: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype is not y.dtype or x.layout is not STRIDED:
        mistyped(argument, f"the dtype of {other}, {y.dtype}", x)


def shape(argument: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        fail(argument, f"shape {list(expected)}", list(x.shape))


def like(argument: str, x: Tensor, other: str, y: Tensor) -> None:
    """`x` has the shape, dtype and device of `y`."""
    if not isinstance(x, Tensor) or x.dtype is not y.dtype or x.layout is not STRIDED:
        same_dtype(argument, x, other, y)
    if x.shape != y.shape:
        fail(argument, f"the shape of {other}, {list(y.shape)}", list(x.shape))
    if not (x.is_cpu and y.is_cpu) and x.device != y.device:
        fail(argument, f"the device of {other}, {y.device}", x.device)


def same_device(argument: str, x: Tensor, other: str, y: Tensor) -> None:
    if not (x.is_cpu and y.is_cpu) and x.device != y.device:
        fail(argument, f"the device of {other}, {y.device}", x.device)


def parameter(argument: str, p: Tensor, expected: tuple[int, ...], other: str, y: Tensor) -> None:
    """`p` is floating-point, of that shape and on the device of `y`."""
    if not isinstance(p, Tensor) or p.dtype not in FLOATING or p.layout is not STRIDED:
        floating(argument, p)
    if p.shape != expected:
        shape(argument, p, expected)
    if not (p.is_cpu and y.is_cpu):
        same_device(argument, p, other, y)


def number(
    argument: str, x: float, least: float = -LARGEST, expected: str = "a finite number, of float32's range"
) -> float:
    """`x` as a float in [least, LARGEST]. A tensor is none: its gradient would be lost."""
    if type(x) is float and least <= x <= LARGEST:
        return x
    if isinstance(x, bool) or not isinstance(x, (float, int, torch.SymFloat, torch.SymInt, Real)):
        mistyped(argument, expected, x)
    if not least <= x <= LARGEST:
        fail(argument, expected, x)
    return float(x)


def eps(x: float) -> float:
    return number("eps", x, 0.0, "a finite number >= 0, of float32's range")


def whole(argument: str, x: int) -> None:
    """An int of 64 bits."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        mistyped(argument, "an int", x)
    if not -(2**63) <= x < 2**63:
        fail(argument, "an int of 64 bits", x)


def flag(argument: str, x: bool) -> None:
    if x is not True and x is not False and not isinstance(x, torch.SymBool):
        mistyped(argument, "True or False", x)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32, or float64 for float64 inputs, so that float64 really is the truth."""
    return torch.promote_types(dtype, torch.float32)
