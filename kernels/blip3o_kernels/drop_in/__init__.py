"""The ops inside other people's models: transformers' language models and diffusers' transformers.

    from blip3o_kernels import patch, unpatch

    model = LlamaForCausalLM.from_pretrained(...)
    patch(model)            # every layer's norms, rotation, attention, MLP; the loss without logits
    ...                     # train, generate, compile, save: as before
    unpatch(model)          # the very functions it had

    with patch(model): ...  # the same for a block

`python -m blip3o_kernels.drop_in` prints what becomes of which model. Attention alone, for any of transformers' models:
`register_attention()`, then `attn_implementation="blip3o"`. transformers and diffusers are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from threading import RLock
from types import TracebackType
from typing import Any

from torch import nn

from .interface import register_attention
from .swap import RECORD, Part, PatchError, Record, fit, qualified, restore, swap

LOCK = RLock()  # one thread at a time changes classes of modules, which models may share

__all__ = ["PatchError", "patch", "register_attention", "unpatch"]


def patch(model: nn.Module, *, check: bool = True, inputs: Mapping[str, Any] | None = None) -> Patched:
    """Let the ops of this package do the work of `model`; the result says what was done, and as a context undoes it.

    model: one of transformers' or diffusers' that `python -m blip3o_kernels.drop_in` lists, or one that has such models
    as parts, whole or wrapped by PEFT; on its device and in its dtype. Parameters, names and hooks stay.
    check: run a small input through the model before and after; outputs that differ by more than rounding allows raise
    PatchError with the numbers, and the model is as it was. inputs: that input, for a model whose own are not known.
    Raises PatchError, naming the module and what was expected, for a model or a module that cannot be patched.
    """
    with LOCK:
        return _patch(model, check, inputs)


def _patch(model: nn.Module, check: bool, inputs: Mapping[str, Any] | None) -> Patched:
    from .agreement import agreed, stock_outputs

    parts = _parts(model)
    if _record(model) is not None:
        raise PatchError(f"model ({type(model).__name__}): expected one that is not patched already")
    record, served = Record(), []
    for path, module, part in parts:
        reason = fit(path, module, part)
        if reason:
            record.kept[type(module).__name__] = reason
        else:
            served.append((path, module, part))
    before = stock_outputs(model, [path for path, _, _ in served], inputs) if check else None
    with ExitStack() as failed:
        failed.callback(restore, model, record)
        for path, module, part in served:
            swap(path, module, part, record)
        if any(qualified(type(module)).startswith("transformers.") for module in model.modules()):
            from .language import choose_attention

            choose_attention(model, record)
        if before is not None:
            record.checked = agreed(before)
        failed.pop_all()
    vars(model)[RECORD] = record
    return Patched(model, record)


def unpatch(model: nn.Module) -> None:
    """Give a patched model its own functions back. Raises PatchError if it is not patched."""
    with LOCK:
        record = _record(model)
        if record is None:
            raise PatchError(f"model ({type(model).__name__}): expected a patched model")
        restore(model, record)
        for module in model.modules():
            vars(module).pop(RECORD, None)


class Patched:
    """What `patch` did to `model`; as a context, it is undone at the end of the block.

    replaced: op -> how many modules run it.  kept: class of a module that stayed as it is -> why.  differences: output
    -> the largest difference that the self-check saw, and the largest that it would have accepted.
    """

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model = model
        self.replaced: dict[str, int] = {}
        for ops in record.served.values():
            for op in ops.split(", "):
                self.replaced[op] = self.replaced.get(op, 0) + 1
        self.modules = len(record.served)
        self.kept, self.differences = dict(record.kept), dict(record.checked)

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unpatch(self.model)

    def __repr__(self) -> str:
        lines = [f"{type(self.model).__name__}: {self.modules} modules patched"]
        lines += [f"  {op}: {count}" for op, count in self.replaced.items()]
        lines += [f"  kept {name}: {why}" for name, why in self.kept.items()]
        for name, (difference, allowed) in self.differences.items():
            lines.append(f"  {name}: differs by at most {difference:.2e}, of {allowed:.2e} that rounding explains")
        return "\n".join(lines)


def _record(model: nn.Module) -> Record | None:
    """The record of a patched model, which may have been wrapped since."""
    records = [vars(module)[RECORD] for module in model.modules() if RECORD in vars(module)]
    return records[0] if records else None


def _parts(model: nn.Module) -> list[tuple[str, nn.Module, Part]]:
    """The modules of `model` that get another forward."""
    from . import diffusion, language

    if not isinstance(model, nn.Module):
        raise PatchError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    table = language.PARTS | diffusion.PARTS
    found = []
    for path, module in model.named_modules():
        part = table.get(qualified(type(module)))
        if part is not None:
            found.append((path or "model", module, part))
    if not any("attention" in part.ops for _, _, part in found):
        named = [(path, module) for path, module in model.named_modules() if "ttention" in type(module).__name__]
        path, module = named[0] if named else ("model", model)
        known = sorted(name.rpartition(".")[2] for name, part in table.items() if "attention" in part.ops)
        raise PatchError(f"{path} ({qualified(type(module))}): expected an attention of {', '.join(known)}")
    return found
