"""Calls of an op that launch everything its workloads launch and compute nothing: for those who look at launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from blip3o_kernels import Op
from blip3o_kernels.samples import Sample


def call(op: Op, sample: Sample, trained: bool = True) -> None:
    """Everything the op launches for a sample: without gradients, and with them if it is trained."""
    bound = inspect.signature(op.function).bind(*sample.args, **sample.kwargs)
    with torch.no_grad():
        op.function(*bound.args, **bound.kwargs)
    if not trained:
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
def unread(module: ModuleType) -> Iterator[None]:
    """Inside the block nothing is computed in the body of an op that `module` holds, by itself or by torch."""

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
