"""The shortest way from a call of an op to its C++: csrc/cpu/shortcut.cpp checks, allocates and computes in one step.

At decode shapes the call is the cost: what ops/ and native_ops/ ask of a tensor, attribute by attribute, takes four
times as long as the op itself. A shortcut takes the ordinary case alone: plain CPU tensors of the dtypes and layouts
that need no conversion, no gradient wanted, no mode and no transform active. For everything else, errors included, it
returns None without having done anything, and the op goes its ordinary way, which gives the same bits. Of some ops it
returns False where all is ordinary but for a gradient, which saves the checks.

It reads tensors through the table of C functions that torch offers to everybody (DLPack's exchange interface), and asks
Python's objects for what is not in there; where either is missing there are no shortcuts.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import memory, native

_TABLE = "__dlpack_c_exchange_api__"
# In the order of shortcut.cpp's Handles, where the table of functions comes before them.
_OBJECTS: tuple[object, ...] = (
    *(None, True, False, int, float, Tensor, Parameter),
    *("requires_grad", "_current_level"),
    *(_len_torch_dispatch_stack, _len_torch_function_stack, _is_tracing, peek_interpreter_stack, forward_ad),
    *(torch.is_grad_enabled, torch.get_num_threads, Tensor.is_neg),
    *(torch.empty_like, memory.empty_like, Tensor.new_empty, memory.tokens_first, torch.empty, memory.scratch),
    {"dtype": torch.float32},
    *map(sys.intern, ("rms", "layer", "uniform", "logit_normal", "head", "width")),
)


def _handles() -> Any:
    """The address of the table, then those of the objects; None without such a table."""
    if not hasattr(Tensor, _TABLE):
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    table = pointer(getattr(Tensor, _TABLE), b"dlpack_exchange_api")
    return (ctypes.c_void_p * (1 + len(_OBJECTS)))(table, *map(id, _OBJECTS))


_HANDLES = _handles()
_new_function = ctypes.pythonapi.PyCFunction_NewEx
_new_function.argtypes, _new_function.restype = [ctypes.c_void_p] * 3, ctypes.py_object


def shortcut(op: str) -> Callable[..., Any]:
    """Takes the instruction set and the arguments of `op`, all by position; its result, or None or False: not so.

    An op's backward pass, "<op>_backward", takes what native_ops/<op>.py's does. One argument more than the op has, for
    ops that need it: the result comes with what the backward pass wants saved.
    """
    find = native.shortcut_function()
    method = find(op.encode(), _HANDLES) if find is not None and _HANDLES is not None else None
    return _new_function(method, None, None) if method else _none


def _none(*_: object) -> None:
    return None
