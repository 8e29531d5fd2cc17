"""The self-check: a model's outputs before and after, on a small input, and how far they may differ.

How much rounding moves the outputs is measured on the model itself: it runs again while every module that will be
patched has its result changed by up to one rounding unit, at random. Patched outputs may differ from the model's own by
ALLOWED times as much as that does, and by two units in the last place of the largest output; their root mean square
likewise. A forgotten mask, another eps or a wrong sign are far outside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .small import small_inputs
from .swap import PatchError

ALLOWED = 2.0
PROBES = 4


@dataclass
class Before:
    """What `inner`, the model that is run, gave before it was patched; how far rounding moves each output, at most and
    root mean square."""

    inner: nn.Module
    inputs: Mapping[str, Any]
    outputs: dict[str, Tensor]
    moved: dict[str, tuple[float, float]]


def stock_outputs(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any] | None) -> Before:
    """Run `model` as it is, and with rounding noise in the results of the modules `paths`."""
    inner, given = small_inputs(model) if inputs is None else (model, inputs)
    outputs = run(inner, given)
    for name, x in outputs.items():
        if not x.isfinite().all():
            raise PatchError(f"{name} of {type(inner).__name__}: expected finite numbers before it is patched")
    moved = dict.fromkeys(outputs, (0.0, 0.0))
    for seed in range(PROBES):
        with noise(model, paths, seed):
            for name, x in run(inner, given).items():
                most, typical = distance(x, outputs[name])
                moved[name] = max(moved[name][0], most), max(moved[name][1], typical)
    # One number, such as a loss, may stand still by luck: it may move by what is typical of the others.
    typical = max((moved[name][1] for name, x in outputs.items() if x.dim()), default=0.0)
    for name, x in outputs.items():
        if not x.dim():
            moved[name] = max(moved[name][0], typical), max(moved[name][1], typical)
    return Before(inner, given, outputs, moved)


def agreed(before: Before) -> dict[str, tuple[float, float]]:
    """The largest difference of each output now and what is allowed. Raises PatchError if one is larger, or
    where the outputs are others."""
    outputs = run(before.inner, before.inputs)
    if outputs.keys() != before.outputs.keys():
        raise PatchError(
            f"{type(before.inner).__name__}: patched, expected the outputs {sorted(before.outputs)}, got"
            f" {sorted(outputs)}. The model is as it was"
        )
    found, wrong = {}, []
    for name, x in outputs.items():
        y = before.outputs[name]
        most, typical = distance(x, y)
        last_place = float(y.abs().max()) * torch.finfo(y.dtype).eps
        allowed, allowed_typical = (ALLOWED * limit + 2 * last_place for limit in before.moved[name])
        found[name] = most, allowed
        if not (most <= allowed and typical <= allowed_typical):
            wrong.append(
                f"{name} differs by {most:.3g} (root mean square {typical:.3g}), where rounding explains"
                f" {allowed:.3g} ({allowed_typical:.3g}); its largest value is {float(y.abs().max()):.3g}"
            )
    if wrong:
        raise PatchError(f"{type(before.inner).__name__}: patched, {'; '.join(wrong)}. The model is as it was")
    return found


def run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating-point tensors in the model's output, by name, without what belongs to padding.

    What is compiled runs eagerly: compiled code does not look at hooks that come later, which `noise` needs.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with torch.no_grad(), eager:
            outputs = model(**inputs)
    finally:
        for module in training:
            module.training = True
    named = outputs.items() if isinstance(outputs, Mapping) else enumerate(_sequence(outputs))
    tensors = {str(name): x for name, x in named if isinstance(x, Tensor) and x.is_floating_point()}
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return {name: x[mask.bool()] if x.shape[:2] == mask.shape else x for name, x in tensors.items()}
    return tensors


def _sequence(outputs: object) -> Sequence[object]:
    return outputs if isinstance(outputs, (tuple, list)) else [outputs]


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Between x and y: at most, and root mean square."""
    difference = x.double() - y.double()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


@contextmanager
def noise(model: nn.Module, paths: Sequence[str], seed: int) -> Iterator[None]:
    """In the block, results of the modules `paths` are multiplied by 1 + eps u, u uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def shaken(x: object) -> object:
        if isinstance(x, tuple):
            return tuple(shaken(part) for part in x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        unit = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device) * torch.finfo(x.dtype).eps
        return (x.float() * (1 + unit)).to(x.dtype) if x.itemsize < 4 else x * (1 + unit)

    hooks = [
        model.get_submodule("" if path == "model" else path).register_forward_hook(lambda _, __, y: shaken(y))
        for path in paths
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
