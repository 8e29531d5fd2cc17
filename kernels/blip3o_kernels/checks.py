"""Argument checks. Each names the argument, what was expected and what was got, and costs well under a microsecond."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGERS = frozenset({torch.int64, torch.int32})


def fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def floating(argument: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{argument}: expected a floating-point tensor, got {x.dtype}")


def integer(argument: str, x: Tensor) -> None:
    if x.dtype not in INTEGERS:
        raise TypeError(f"{argument}: expected an int64 or int32 tensor, got {x.dtype}")


def shape(argument: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        fail(argument, f"shape {list(expected)}", list(x.shape))


def like(argument: str, x: Tensor, other: str, y: Tensor) -> None:
    """`x` has the shape, dtype and device of `y`."""
    if x.shape != y.shape:
        fail(argument, f"the shape of {other}, {list(y.shape)}", list(x.shape))
    if x.dtype is not y.dtype:
        raise TypeError(f"{argument}: expected the dtype of {other}, {y.dtype}, got {x.dtype}")
    if x.device != y.device:
        fail(argument, f"the device of {other}, {y.device}", x.device)


def same_device(argument: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        fail(argument, f"the device of {other}, {y.device}", x.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32, or float64 for float64 inputs, so that float64 really is the truth."""
    return torch.promote_types(dtype, torch.float32)
