"""What a stage gives the loop: batches and the sums of their losses; and the thread that makes the next batches."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from blip3o.model import Blip3o
from blip3o.train.recipe import Recipe

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """Some rows of a step's batch, ready for the loss. A stage adds its tensors in a class of its own.

    weight   how many elements the loss is summed over: tokens asked for, values of features
    ids      names of the samples, which the log shows when a number is bad
    """

    weight: float
    ids: list[str]

    def tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Self:
        """On that device; itself where it is there already."""
        tensors = self.tensors()
        if all(x.device == device for x in tensors.values()):
            return self
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return replace(self, **moved)


class Stage(Protocol):
    """What the loop asks of a stage.

    unit   the smallest number of rows of a batch that can be taken apart: those that share a prompt, or all of them
           where the loss is no sum over rows
    """

    name: str
    model: Blip3o
    unit: int

    @property
    def recipe(self) -> Recipe: ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser moves, by name: as they are now, since FSDP puts others into the model."""

    def batch(self, step: int, rows: range) -> Any:
        """The Batch of some rows, of 0..batch_size-1, of step `step`: a function of (seed, step, rows) alone.

        Called ahead of time in a thread, without gradients; no weight that trains may be read.
        """

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss SUMMED over the batch's elements, and more such sums to log; each divided by the step's weight.

        Where a mean comes first, `summed` makes the sum.
        """

    def finish(self) -> None:
        """What is to be done once after the last step, before the model is saved."""


def summed(mean: Tensor, weight: float) -> Tensor:
    """The sum behind a mean over `weight` elements; in float64, so that dividing it again gives the mean bit for bit,
    and with it the gradient."""
    return mean.double() * weight


def micro_batches(stage: Stage, rank: int = 0, processes: int = 1) -> list[range]:
    """The rows of each micro-batch of process `rank`: its equal share of the batch, in `accumulate` equal parts.

    ValueError where the batch cannot be taken apart that way.
    """
    size, parts = stage.recipe.batch_size, processes * stage.recipe.accumulate
    if parts > 1 and stage.unit == size > 1:
        raise ValueError(
            f"accumulate must be 1 on one process in stage {stage.name}, whose loss compares all rows of a batch with "
            f"each other; got accumulate {stage.recipe.accumulate}, {processes} processes"
        )
    if size % (parts * stage.unit):
        raise ValueError(
            f"batch_size of stage {stage.name} must be a multiple of {processes} processes x accumulate "
            f"{stage.recipe.accumulate} x {stage.unit} rows that stay together, got {size}"
        )
    rows = size // parts
    first = rank * stage.recipe.accumulate
    return [range(part * rows, (part + 1) * rows) for part in range(first, first + stage.recipe.accumulate)]


class Ahead(Generic[Made]):
    """Calls `make` for each of `steps` in turn, for the next one in a thread while its result is not yet asked for.

    waiting   seconds that whoever asked had to wait, since it was last set to 0
    """

    def __init__(self, make: Callable[[int], Made], steps: range, pool: ThreadPoolExecutor) -> None:
        self.make, self.steps, self.pool = make, steps, pool
        self.waiting = 0.0

    def __iter__(self) -> Iterator[tuple[int, Made]]:
        coming: Future[Made] | None = None
        for step in self.steps:
            began = time.perf_counter()
            made = (coming or self.pool.submit(self.make, step)).result()
            self.waiting += time.perf_counter() - began
            coming = self.pool.submit(self.make, step + 1) if step + 1 in self.steps else None
            yield step, made


@contextmanager
def ahead(make: Callable[[int], Made], steps: range) -> Iterator[Ahead[Made]]:
    """`Ahead`, whose thread has ended when the block has."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        yield Ahead(make, steps, pool)
