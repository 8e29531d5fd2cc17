"""One row of the table of ops: its inputs, and what a contestant does with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property

import limits
import measure
import rows
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip3o_kernels import use
from blip3o_kernels.dispatch import Op, choose
from blip3o_kernels.samples import Draw

# Largest difference from the reference, relative to the largest value: a few roundings of the dtype. Gradients may be
# five times as far off: torch's own layer_norm adds the rows of a bfloat16 weight's gradient up to 7 % off.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PART = {"cpu": 2**18, "cuda": 2**24}  # elements that are compared at once: on a CPU they stay in its caches


def copied(x: object) -> object:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())


def listed(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def distance(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest value of y; in parts, since a gradient may be gigabytes."""
    parts = list(zip(x.reshape(-1).split(PART[x.device.type]), y.reshape(-1).split(PART[x.device.type]), strict=True))
    off = torch.stack([(a.float() - b.float()).abs().max() for a, b in parts]).max()
    return (off / torch.stack([b.abs().max().float() for _, b in parts]).max()).item()


class Contest:
    """One row of the table: the inputs in several copies, and what a contestant does with one of them."""

    def __init__(self, op: Op, case: rows.Case, dtype: torch.dtype, device: str, training: bool) -> None:
        self.op, self.training, self.tolerance = op, training, TOLERANCES[dtype]
        args, kwargs = case.make(Draw(dtype, device))
        arguments = dict(inspect.signature(op.function).bind(*args, **kwargs).arguments)
        total = sum(rows.size(x) for x in arguments.values() if isinstance(x, Tensor))
        self.copies = 1 if total < limits.CACHED else min(64, -(-limits.ROTATED // total))
        self.inputs = [(args, kwargs)]
        self.leaves = [self._leaves(args, kwargs)]
        self.leading = next(x for x in args if isinstance(x, Tensor))
        self.results = results = listed(op.reference(*args, **kwargs))
        self.upstream = [Draw(y.dtype, device, seed=1)(*y.shape) for y in results]
        self.work = rows.work(case, arguments, results, op.differentiable)["training" if training else "forward"]

    @cached_property
    def expected(self) -> list[Tensor]:
        return self._with_gradients(self.results, 0)

    @property
    def intensity(self) -> float | None:
        return (self.work.flops or self._operations()) / self.work.bytes or None

    def _operations(self) -> int:
        """By the FLOP formulas of the registered ops, which a body of ours must run for."""
        try:
            with FlopCounterMode(display=False) as counter, use(choose(self.op, self.leading)):
                self.run(self.op.function, 0)
        except measure.FAILURES:  # which is told where the body's result is checked
            return 0
        return counter.get_total_flops()

    def _leaves(self, args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
        if not self.training:
            return []
        arguments = inspect.signature(self.op.function).bind(*args, **kwargs).arguments
        wanted = (arguments.get(name) for name in self.op.differentiable)
        return [x.requires_grad_() for x in wanted if isinstance(x, Tensor)]

    def _copy_inputs(self) -> None:
        args, kwargs = self.inputs[0]
        while len(self.inputs) < self.copies:
            self.inputs.append((tuple(map(copied, args)), {name: copied(x) for name, x in kwargs.items()}))
            self.leaves.append(self._leaves(*self.inputs[-1]))

    def run(self, function: Callable[..., object], index: int) -> list[Tensor]:
        """The results, in training the gradients too."""
        args, kwargs = self.inputs[index % len(self.inputs)]
        return self._with_gradients(listed(function(*args, **kwargs)), index)

    def _with_gradients(self, results: list[Tensor], index: int) -> list[Tensor]:
        if not self.training:
            return results
        return [*results, *torch.autograd.grad(results, self.leaves[index % len(self.inputs)], self.upstream)]

    def timed(self, function: Callable[..., object]) -> measure.Call:
        """The same with as little as possible of our own around it."""
        self._copy_inputs()
        if self.training:
            return lambda index: self.run(function, index)
        inputs, copies = self.inputs, len(self.inputs)

        def call(index: int) -> None:
            args, kwargs = inputs[index % copies]
            function(*args, **kwargs)

        return call

    def wrong(self, function: Callable[..., object], random: bool) -> str:
        """What is wrong with a contestant's results; "" if nothing is."""
        wanted = self.expected
        found = wanted if function is self.op.reference else self.run(function, 0)  # the reference has run
        if len(found) != len(wanted):
            return f"{len(found)} results, expected {len(wanted)}"
        for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
            if x.shape != y.shape:
                return f"result {i} has shape {list(x.shape)}, expected {list(y.shape)}"
            if random or not y.numel():
                continue
            allowed = self.tolerance * (5 if i >= len(self.upstream) else 1)
            off = distance(x.detach(), y.detach())
            if not off <= allowed:
                return f"result {i} is off by {off:.1g} of the largest value, allowed is {allowed:g}"
        return ""
