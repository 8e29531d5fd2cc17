"""Several processes: one large batch, however it is cut; agreement; and a clean end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_processes import ROWS, STAGES, on_processes, tiny_model
from torch import nn

from blip3o.train import devices


def trained(
    kind: str, parallel: devices.Parallel, steps: int, accumulate: int = 1, frozen: devices.Frozen = "replicated"
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and, on rank 0, weights."""
    losses, norms = [], []
    with devices.start(parallel, "cpu") as group:
        stage = STAGES[kind](tiny_model())
        loss_of = group.wrap(stage, frozen=frozen)
        parameters = list(stage.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        for step in range(steps):
            parts = [stage.batch(step, group.rows(ROWS, 1, accumulate, part)) for part in range(accumulate)]
            (weight,) = group.sum(sum(batch.weight for batch in parts))
            total = 0.0
            for part, batch in enumerate(parts):
                loss, _ = loss_of(batch, part == accumulate - 1)
                (loss / weight).backward()
                total += loss.item()
            norms.append(group.clip(parameters, 1.0))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(group.sum(total)[0] / weight)
        weights = group.whole({name: parameter for name, parameter in stage.trainable().items()})
    return losses, norms, weights


@pytest.mark.parametrize("kind", STAGES)
def test_processes_train_as_one(kind: str, one_thread: None) -> None:
    alone = trained(kind, "ddp", 5)
    for world, parallel, accumulate, frozen in (
        (2, "ddp", 1, "replicated"), (2, "ddp", 2, "replicated"), (2, "fsdp", 2, "sharded"), (4, "fsdp", 1, "replicated"),
    ):
        found = on_processes(world, trained, kind, parallel, 5, accumulate, frozen)
        print(kind, world, parallel, accumulate, frozen)
        for rank, (losses, norms, weights) in enumerate(found):
            print([abs(a / b - 1) for a, b in zip(losses, alone[0])], [abs(a / b - 1) for a, b in zip(norms, alone[1])])
            if rank == 0:
                print(max((w - alone[2][n]).abs().max().item() for n, w in weights.items()))
