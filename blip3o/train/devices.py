"""One process or many: which rows each one trains on, where the weights lie, and how the processes agree.

Alone, nothing of torch.distributed is started and every call is the plain one. Under torchrun each process starts the
same program with its own rank; gloo carries what CPUs say to each other, NCCL what GPUs do. Rows, not batches, are
shared out, and gradients are summed, not averaged: divided by the weight of the whole batch, they are the gradient of
one large batch, however many processes and parts it was cut into.

    ddp    every process holds all weights; gradients are summed while the backward pass runs
    fsdp   what trains, its gradients and the optimiser's moments are cut into one piece a process (FSDP2); a block's
           weights are whole while the block runs
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Parallel = Literal["ddp", "fsdp"]
Frozen = Literal["replicated", "sharded"]


class Objective(nn.Module):
    """A model and its loss as one module, so that all that the loss does with the model is one forward pass.

    objective(batch, last) returns what the stage's `loss(batch)` does: the sum over the batch's elements, and sums to
    log. `last` is False for all but the last part of a step's batch: gradients need to be exchanged only then.

    Processes must use the same blocks in a step. Weights outside the blocks may be unused by some of them.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any, last: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch)


class Devices:
    """This process among those that train together.

    rank, world   which one it is, of how many; rank 0 writes files and speaks
    device        where its model and batches belong
    parallel      how the processes share the work; None for a process alone
    """

    def __init__(self, rank: int, world: int, device: torch.device, parallel: Parallel | None) -> None:
        self.rank, self.world, self.device, self.parallel = rank, world, device, parallel

    def rows(self, batch_size: int, unit: int = 1, accumulate: int = 1, part: int = 0) -> range:
        """This process's rows of a step's batch: part `part` of `accumulate`, of its 1 / world of 0..batch_size-1.

        Raises ValueError unless batch_size can be cut into world x accumulate parts of whole units.
        """
        raise NotImplementedError

    def wrap(
        self,
        model: nn.Module,
        loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
        *,
        frozen: Frozen = "replicated",
        dtype: torch.dtype | None = None,
    ) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """The objective to call at every step. What trains is what requires a gradient now.

        Blocks must be compiled before. FSDP puts other parameters into the model: ask for those that train, and build
        the optimiser, afterwards.

        frozen   replicated: every process holds all that does not train; sharded: of the language model a piece
        dtype    fsdp: of the weights while a block runs, and of their exchange; None: as they are stored. Gradients
                 are summed in float32
        """
        raise NotImplementedError

    def clip(self, parameters: Sequence[nn.Parameter], clip_norm: float) -> float:
        """The norm of all gradients, the same on every process; larger ones are scaled down to `clip_norm`.

        It is infinite or NaN if a gradient is, on whatever process.
        """
        raise NotImplementedError

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes in float64; the same bits on all of them."""
        raise NotImplementedError

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        """What each process has as `value`, in order of rank, on all of them. It goes as JSON."""
        raise NotImplementedError

    def agree(self, name: str, value: Any) -> None:
        """Raise ValueError, which names the ranks and what they have, unless `value` is the same on all processes."""
        raise NotImplementedError

    def wait(self) -> None:
        """Until all processes are here."""
        raise NotImplementedError

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in one piece in the CPU's memory on rank 0; nothing on the others. All must call it."""
        raise NotImplementedError


@contextmanager
def start(parallel: Parallel = "ddp", seconds: float = 600.0) -> Iterator[Devices]:
    """Join the processes that torchrun started, or be alone where none did; leave them at the end.

    seconds   how long a process waits for another before it gives up

    Raises ValueError for a `parallel` that is unknown.
    """
    raise NotImplementedError
    yield
