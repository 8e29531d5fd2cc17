"""How a module gets another forward: it becomes an instance of a subclass of its class, and later of its class again.

The subclass is made of a mixin, which has the forward, and the module's own class. So parameters, names, hooks,
`isinstance` and what the class does around its forward (gradient checkpointing) stay; nothing is changed on a class
that other models use. It keeps the class's name, which FSDP, PEFT and transformers look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from types import FunctionType
from typing import Any

from torch import nn

STOCK = "_blip3o_stock"  # where a class made here, or a processor, has what it stands in for
RECORD = "_blip3o_patch"  # where a patched model keeps its record: with the model, so that a copy has a copy of it


class PatchError(ValueError):
    """A model that cannot be patched, or whose outputs differ once it is. The message names the module."""


@dataclass(frozen=True)
class Part:
    """What becomes of modules of one class.

    mixin: the class with the new forward; for diffusers' attention what makes its new processor.  ops: what it runs.
    verify(module): "" if the module is as the mixin needs it, else what was expected and what it is: an error.
    keep(module): "" if it can be served, else why it stays as it is, which the table tells.
    """

    mixin: type | Callable[[Any], object]
    ops: str
    verify: Callable[[Any], str] | None = None
    keep: Callable[[Any], str] | None = None


@dataclass
class Record:
    """What was done to a model.

    served: path of each module that was changed -> the ops it runs.  kept: classes of modules that stay as they are ->
    why.  configs: transformers' configurations with the attention they had.  checked: output -> the largest difference
    that the self-check found, and what was allowed.
    """

    served: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    configs: list[tuple[Any, str | None]] = field(default_factory=list)
    checked: dict[str, tuple[float, float]] = field(default_factory=dict)


def hooked(module: nn.Module) -> bool:
    """Whether somebody waits for the module to be called, so that it must not be fused with its neighbour."""
    forwards, backwards = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forwards or backwards or module._backward_pre_hooks)


def fusible(kind: type | tuple[type, ...], *modules: nn.Module | None) -> bool:
    """Whether a neighbour may do the modules' work: they are still of that kind, and nobody waits for their calls."""
    return all(module is not None and isinstance(module, kind) and not hooked(module) for module in modules)


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _signed(function: Any, like: Any) -> Any:
    """A copy of `function`, with the signature, name and docstring of `like`. A wrapper would cost every call more."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return wraps(like)(copy)


@cache
def subclass(mixin: Any, stock: Any) -> type:
    """The class that a module of class `stock` becomes; its forward has the signature of stock's."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__, STOCK: stock}
    return type(stock.__name__, (mixin, stock), {**names, "forward": _signed(mixin.forward, stock.forward)})


def swapped(module: nn.Module) -> bool:
    return STOCK in vars(type(module)) or hasattr(vars(module).get("processor"), STOCK)


def fit(path: str, module: nn.Module, part: Part) -> str:
    """Why a module stays as it is, or "" for one that is served. Raises PatchError if it is not as expected."""
    name = type(module).__name__
    if swapped(module):
        raise PatchError(f"{path} ({name}): expected a module that is not patched already, with another model")
    if "forward" in vars(module):
        raise PatchError(
            f"{path} ({name}): expected its class's forward, but the module has one of its own"
            " (a hook of accelerate, or another patch): patch before that is put on"
        )
    reason = part.keep(module) if part.keep else ""
    problem = part.verify(module) if part.verify and not reason else ""
    if problem:
        raise PatchError(f"{path} ({name}): {problem}")
    return reason


def swap(path: str, module: nn.Module, part: Part, record: Record) -> None:
    """Give `module` its new forward, and write that down."""
    if isinstance(part.mixin, type):
        kind: Any = type(module)
        module.__class__ = subclass(part.mixin, kind)
        record.served[path] = part.ops
    else:
        attention: Any = module
        new: Any = part.mixin(module)
        vars(new)[STOCK], attention.processor = attention.processor, new
        record.served[path] = new.ops


def restore(model: nn.Module, record: Record) -> None:
    """Undo `swap` for all modules of `model`, copies that others have made of them included.

    Raises PatchError, before anything is changed, for a module whose class has been replaced since (by FSDP).
    """
    for path, module in model.named_modules():
        kind = type(module)
        if hasattr(kind, STOCK) and STOCK not in vars(kind):
            raise PatchError(f"{path} ({kind.__name__}): expected the class that it was patched to, got one made of it")
    for module in model.modules():
        processor = vars(module).get("processor")
        if STOCK in vars(type(module)):
            module.__class__ = vars(type(module))[STOCK]
        elif hasattr(processor, STOCK):
            vars(module)["processor"] = vars(processor)[STOCK]
    for config, implementation in record.configs:
        config._attn_implementation_internal = implementation
