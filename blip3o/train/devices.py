"""One process or many: which rows each one trains on, where the weights lie, and how the processes agree.

Alone, nothing of torch.distributed is started and every call is the plain one. Under torchrun each process starts the
same program with its own rank; gloo carries what CPUs say to each other, NCCL what GPUs do. Rows are shared out, and
gradients are summed, not averaged: of a loss that is divided by the weight of the whole batch, the sum is the gradient
of one large batch, however many processes and parts it was cut into.

    ddp    every process holds all weights; gradients are summed while the backward pass runs
    fsdp   what trains, its gradients and the optimiser's moments are cut into one piece a process (FSDP2); a block's
           weights are whole while the block runs
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from blip3o.dit import DitBlock
from blip3o.train.batch import Stage

Parallel = Literal["ddp", "fsdp"]
Frozen = Literal["replicated", "sharded"]
Losses = tuple[Tensor, dict[str, Tensor]]
Loss = Callable[[Any, bool], Losses]
LEAVE_SECONDS = 5.0  # that a process which fails waits for the others to do so too


class Objective(nn.Module):
    """A model and its loss as one module, so that all that the loss does with the model is one forward pass."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model = stage.model
        self._loss = stage.loss

    def forward(self, batch: Any) -> Losses:
        return self._loss(batch)


class ShardedObjective(Objective):
    """Under FSDP gradients are summed group by group, of the weights that have one. Which do must be the same on all
    processes, or they wait for ever: so a weight outside the blocks that only some of them used gets zeros on the rest.
    """

    def __init__(self, stage: Stage, group: dist.ProcessGroup) -> None:
        super().__init__(stage)
        self._group = group
        self._outside: list[tuple[nn.Module, str]] = []  # owner and name: the parameter itself changes with each step

    def find_outside(self) -> None:
        """Remember the weights outside the blocks; to be called when all blocks are sharded, and before the rest is."""
        inside = {p for module in self.model.modules() if isinstance(module, FSDPModule) for p in module.parameters()}
        self._outside = [
            (module, name)
            for module in self.model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and parameter not in inside
        ]

    def forward(self, batch: Any) -> Losses:
        loss, sums = self._loss(batch)
        if loss.requires_grad:
            loss.register_hook(self._at_the_end)
        return loss, sums

    def _at_the_end(self, gradient: Tensor) -> Tensor:
        """Of the backward pass, before what FSDP, whose hooks come after this one, has to do there."""
        torch.autograd.Variable._execution_engine.queue_callback(self._even)
        return gradient

    def _even(self) -> None:
        weights = [module.get_parameter(name) for module, name in self._outside]
        used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX, self._group)
        for weight, anywhere in zip(weights, used.tolist(), strict=True):
            if anywhere and weight.grad is None:
                weight.grad = torch.zeros_like(weight)


class Devices:
    """This process among those that train together.

    rank, world   which one it is, of how many; rank 0 writes files and speaks
    device        where its model and batches belong
    group         for what they tell each other beside gradients; None for a process alone
    background    the same processes, for a thread beside training, whose messages must not mix with the others
    """

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        background: "Devices | None" = None,
    ) -> None:
        self.rank, self.world, self.device, self.group = rank, world, device, group
        self.background = background or self

    def wrap(
        self,
        stage: Stage,
        parallel: Parallel = "ddp",
        frozen: Frozen = "replicated",
        dtype: torch.dtype | None = None,
    ) -> Loss:
        """The stage's loss, to be called at every step as `loss(batch, last)`.

        `last` is False for all but the last part of a step's batch: only then must gradients be exchanged. Processes
        must run the same blocks in a step; of the weights outside the blocks each may use others.

        Blocks must be compiled before. FSDP puts other parameters into the model: ask the stage for those that train,
        and build the optimiser, afterwards.

        frozen   fsdp: whether each process holds all that does not train, or of the language model a piece
        dtype    fsdp: of the weights while a block runs, and when they are sent; None: as they are stored. Gradients
                 are summed in float32

        Raises ValueError if something trains that is no part of the stage's model, or is not what FSDP put there.
        """
        if self.group is None:
            return lambda batch, last: stage.loss(batch)
        trainable, parameters = stage.trainable(), set(stage.model.parameters())
        strange = [name for name, parameter in trainable.items() if parameter not in parameters]
        if strange:
            raise ValueError(f"on several processes all that trains must be in the stage's model, got {strange}")
        learning = set(trainable.values())
        for parameter in parameters:
            parameter.requires_grad_(parameter in learning)
        if parallel == "ddp":
            return _replicated(Objective(stage))
        objective = ShardedObjective(stage, self.group)
        _shard(objective, init_device_mesh(self.device.type, (self.world,)), frozen, dtype)
        whole = [name for name, parameter in stage.trainable().items() if not isinstance(parameter, DTensor)]
        if whole:
            raise ValueError(
                f"trainable() of stage {stage.name} must give the model's parameters as they are now, got "
                f"those from before FSDP put its own there: {whole[:3]}"
            )
        return lambda batch, last: objective(batch)  # summed part by part: whole gradients would need the memory

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes in float64; the same bits on all of them."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        return self.sum(flag)[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """What each process has as `value`, in order of rank, on all of them. It goes as JSON."""
        if self.group is None:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self.group)
        texts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, nn.functional.pad(text, (0, len(texts[0]) - len(text))), group=self.group)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]

    def agree(self, name: str, value: Any) -> None:
        """Raise ValueError, which names what each rank has, unless `value` is the same on all processes."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            found = ", ".join(f"{other} on rank {rank}" for rank, other in enumerate(values))
            raise ValueError(f"{name} must be the same on all processes, got {found}")

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in one piece in the CPU's memory on rank 0; nothing on the others. All must call it."""
        found = {}
        for name, tensor in tensors.items():
            complete = tensor.detach()
            if isinstance(complete, DTensor):
                complete = complete.full_tensor()
            if self.rank == 0:
                found[name] = complete.cpu()
        return found


def clip(parameters: Sequence[nn.Parameter], clip_norm: float) -> float:
    """The norm of all gradients, whole or sharded: the same on every process. Larger ones are scaled to `clip_norm`.

    It is infinite or NaN if a gradient is, on whatever process; then all stay as they are, so that it can be found.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if whole.isfinite():
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, whole)
    return whole.item()


def _replicated(objective: Objective) -> Loss:
    """Under DDP. A weight that no process used in a step keeps no gradient, as on one process."""
    replicas = DistributedDataParallel(
        objective, init_sync=False, find_unused_parameters=True, gradient_as_bucket_view=True
    )
    replicas.register_comm_hook(dist.group.WORLD, _summed)

    def loss(batch: Any, last: bool) -> Losses:
        replicas.require_backward_grad_sync = last
        found: Losses = replicas(batch)
        return found

    return loss


def _summed(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum of a bucket of gradients over the processes; DDP by itself takes the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _shard(objective: ShardedObjective, mesh: dist.DeviceMesh, frozen: Frozen, dtype: torch.dtype | None) -> None:
    """Cut the weights: each block one group, exchanged in one message, and all the rest one more."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    cut = {
        parameter
        for name, parameter in objective.model.named_parameters()
        if parameter.requires_grad or (frozen == "sharded" and name.startswith("llm."))
    }
    kept = set(objective.model.parameters()) - cut
    groups: list[nn.Module | list[nn.Module]] = []
    for module in objective.model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(parameter in cut for parameter in block.parameters()):
                    groups += [*_apart(block), block]
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy, ignored_params=kept)
    objective.find_outside()
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=kept)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _apart(block: nn.Module) -> list[nn.Module | list[nn.Module]]:
    """Parts of a block that run outside its forward pass, and so must be groups of their own."""
    if not isinstance(block, DitBlock):
        return []
    attention = block.attention  # its keys and values of the condition: before all blocks, as is the modulation
    return [block.modulation, [attention.condition_norm, attention.cross_kv, attention.cross_key_norm]]


def alone(device: str = "cpu") -> Devices:
    return Devices(0, 1, torch.device(device), None)


@contextmanager
def start(device: str = "cpu", seconds: float = 1800.0) -> Iterator[Devices]:
    """Join the processes that torchrun started, or be alone where it did not; leave them at the end.

    device    "cpu", or "cuda": each process its own GPU
    seconds   how long a process waits for another before it gives up
    """
    if "WORLD_SIZE" not in os.environ:
        yield alone(device)
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=limit)
    rank, world = dist.get_rank(), dist.get_world_size()
    group, other = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
    together = False
    try:
        yield Devices(rank, world, place, group, Devices(rank, world, place, other))
        together = True
    finally:
        _leave(group, limit if together else timedelta(seconds=LEAVE_SECONDS), together)


def _leave(group: dist.ProcessGroup, limit: timedelta, together: bool) -> None:
    """Without a barrier before it, the end of a process group aborts FSDP2 on gloo in 1 of 8 runs.

    What made this process fail may have made all of them fail, or it alone: then the others do not come.
    """
    try:
        dist.monitored_barrier(group, limit)
    except RuntimeError:
        if together:
            raise
    else:
        dist.destroy_process_group()
