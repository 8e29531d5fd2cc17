"""Several processes: they train as one does on one large batch, agree, and end together."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from on_processes import STAGES, on_processes, share, tiny_model
from torch import Tensor, nn

from blip3o.train import devices as module
from blip3o.train.devices import Devices, Frozen, Parallel, clip, start

STEPS = 4
WAYS: dict[int, tuple[tuple[Parallel, int, Frozen], ...]] = {  # by processes: parallel, accumulate, frozen
    2: (("ddp", 1, "replicated"), ("ddp", 2, "replicated"), ("fsdp", 2, "sharded")),
    4: (("ddp", 1, "replicated"), ("fsdp", 1, "replicated")),
}
Trained = tuple[list[float], list[float], dict[str, Tensor]]


def trained(
    devices: Devices,
    kind: str,
    parallel: Parallel = "fsdp",
    accumulate: int = 1,
    frozen: Frozen = "replicated",
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Trained:
    """The loss of each step, the norms of its gradients and, on rank 0, the weights after the last."""
    losses, norms = [], []
    stage = STAGES[kind](tiny_model())
    if compiled:
        for block in stage.model.dit.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    loss_of = devices.wrap(stage, parallel, frozen, dtype)
    parameters = list(stage.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    mixed = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    for step in range(STEPS):
        parts = [stage.batch(step, share(devices, part, accumulate)) for part in range(accumulate)]
        (weight,) = devices.sum(sum(batch.weight for batch in parts))
        total = 0.0
        for part, batch in enumerate(parts):
            with mixed:
                loss, _ = loss_of(batch, part == accumulate - 1)
            (loss / weight).backward()
            total += loss.item()
        norms.append(clip(parameters, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(devices.sum(total)[0] / weight)
    return losses, norms, devices.whole(stage.trainable())


def in_all_ways(kind: str, world: int) -> list[Trained]:
    found = []
    with start() as devices:
        for parallel, accumulate, frozen in WAYS[world]:
            found.append(trained(devices, kind, parallel, accumulate, frozen))
    return found


@pytest.fixture
def alone(one_thread: None) -> Devices:
    return module.alone()


@pytest.mark.parametrize("world", WAYS)
@pytest.mark.parametrize("kind", STAGES)
def test_processes_train_as_one(kind: str, world: int, alone: Devices) -> None:
    """Also where one process has pictures and another has none, and where nobody has any."""
    losses, norms, weights = trained(alone, kind)
    for found in on_processes(world, in_all_ways, kind, world):
        for other_losses, other_norms, other_weights in found:
            assert other_losses == pytest.approx(losses, rel=1e-6)
            assert other_norms == pytest.approx(norms, rel=1e-6)
            for name, weight in other_weights.items():  # each is moved by up to 1e-3 a step
                torch.testing.assert_close(weight, weights[name], rtol=0, atol=3e-4)


def otherwise() -> tuple[Trained, Trained, list[float]]:
    with start() as devices:
        compiled = trained(devices, "generation", compiled=True)
        rounded = trained(devices, "generation", dtype=torch.bfloat16)
        norms = [spoiled(devices, parallel) for parallel in ("ddp", "fsdp")]
    return compiled, rounded, norms


def spoiled(devices: Devices, parallel: Parallel) -> float:
    """The norm of the gradients when one process alone has a NaN."""
    stage = STAGES["generation"](tiny_model())
    loss_of = devices.wrap(stage, parallel)
    batch = stage.batch(0, share(devices))
    assert batch.x is not None
    if devices.rank == 1:
        batch.x[0, 0, 0] = math.nan
    loss_of(batch, True)[0].backward()
    return clip(list(stage.trainable().values()), 1.0)


def test_compiled_blocks_bfloat16_and_a_nan_on_one_process(alone: Devices) -> None:
    losses, _, _ = trained(alone, "generation")
    for compiled, rounded, norms in on_processes(2, otherwise):
        assert compiled[0] == pytest.approx(losses, rel=1e-6)
        assert rounded[0] == pytest.approx(losses, rel=0.02)
        assert rounded[0] != pytest.approx(losses, rel=1e-5)
        assert all(math.isnan(norm) for norm in norms)


def agreement() -> tuple[list[float], bool, bool, list[object], str]:
    with start() as devices:
        rank = devices.rank
        try:
            devices.agree("seed", 7)
            devices.agree("seed", [rank, "ü" * rank])
        except ValueError as error:
            return (
                devices.sum(rank, 0.1),
                devices.any(rank == 1),
                devices.any(False),
                devices.gather({"a": rank}),
                str(error),
            )
    raise AssertionError("processes that differ agreed")


def test_agreement() -> None:
    for sums, some, none, gathered, message in on_processes(2, agreement):
        assert (sums, some, none, gathered) == ([1.0, 0.2], True, False, [{"a": 0}, {"a": 1}])
        assert message == "seed must be the same on all processes, got [0, ''] on rank 0, [1, 'ü'] on rank 1"


def test_alone_every_call_is_the_plain_one(alone: Devices) -> None:
    assert alone.sum(2, 0.1) == [2, 0.1] and alone.any(True) and not alone.any(False)
    assert alone.gather({"a": None}) == [{"a": None}]
    alone.agree("seed", 7)
    with start() as devices:
        assert (devices.rank, devices.world, devices.group, devices.background) == (0, 1, None, devices)


def refused() -> list[str]:
    found = []
    with start() as devices:
        for parallel, parameters in (
            ("ddp", lambda stage: {"head.weight": nn.Parameter(torch.zeros(2))}),
            ("fsdp", lambda stage: {"queries": stage.model.queries}),
        ):
            stage = STAGES["generation"](tiny_model())
            remembered = parameters(stage)
            stage.trainable = lambda remembered=remembered: remembered  # type: ignore[method-assign]
            try:
                devices.wrap(stage, parallel)
            except ValueError as error:
                found.append(str(error))
    return found


def test_stages_that_cannot_be_shared_out() -> None:
    outside, remembered = on_processes(1, refused)[0]
    assert outside == "on several processes all that trains must be in the stage's model, got ['head.weight']"
    assert remembered.startswith("trainable() of stage generation must give the model's parameters as they are now")
