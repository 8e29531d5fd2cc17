"""How a module gets another forward: it becomes an instance of a subclass of its class, and later of its class again.

The subclass is made of a mixin, which has the forward, and the module's own class. So parameters, names, hooks,
`isinstance` and what the class does around its forward (gradient checkpointing) stay; nothing is changed on a class
that other models use. It keeps the class's name, which FSDP, PEFT and transformers look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

from torch import nn

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
class Swap:
    """One module that was changed: its path, class, ops; for diffusers' attention its former processor."""

    path: str
    module: nn.Module
    stock: type
    ops: str
    processor: Any = None


@dataclass
class Record:
    """All that `unpatch` needs, and what the table tells.

    kept: classes of modules that stay as they are, with the reason.  configs: transformers' configurations with the
    attention they had.  checked: the largest difference that the self-check found and what was allowed, by output.
    """

    swaps: list[Swap] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    configs: list[tuple[Any, str | None]] = field(default_factory=list)
    checked: dict[str, tuple[float, float]] = field(default_factory=dict)


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def subclass(mixin: type, stock: type) -> type:
    """The class that a module of class `stock` becomes; its forward has the signature of stock's."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    forward: Any = wraps(stock.forward)(mixin.forward)  # type: ignore[attr-defined]
    return type(stock.__name__, (mixin, stock), {**names, "forward": forward})


def fit(path: str, module: nn.Module, part: Part) -> str:
    """Why a module stays as it is, or "" for one that is served. Raises PatchError if it is not as expected."""
    name = type(module).__name__
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
    stock: Any = type(module)
    if isinstance(part.mixin, type):
        module.__class__ = subclass(part.mixin, stock)
        record.swaps.append(Swap(path, module, stock, part.ops))
    else:
        attention: Any = module
        former, attention.processor = attention.processor, part.mixin(module)
        record.swaps.append(Swap(path, module, stock, attention.processor.ops, former))


def restore(record: Record) -> None:
    """Undo `swap` for all modules of `record`, and give the configurations their attention back."""
    for done in record.swaps:
        if done.processor is not None:
            done.module.processor = done.processor
        elif issubclass(type(done.module), done.stock):
            done.module.__class__ = done.stock
    for config, implementation in record.configs:
        config._attn_implementation_internal = implementation
