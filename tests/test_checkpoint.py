"""The checkpoint: whole or absent, checked at every load, cut anew for any number of processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from on_processes import ROWS, Drawing, on_processes, tiny_model

from blip3o.train import devices
from blip3o.train.checkpoint import Checkpoint


def trained(folder: Path, parallel: devices.Parallel, steps: int, behind: bool = False) -> list[float]:
    """Train up to step `steps`, from the checkpoint if there is one, and save. Returns the losses."""
    losses = []
    with devices.start(parallel, "cpu") as group:
        checkpoint = Checkpoint(folder / "checkpoint", group)
        stage = Drawing(tiny_model())
        loss_of = group.wrap(stage)
        parameters = stage.trainable()
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True)
        for parameter in parameters.values():
            optimizer.state[parameter] = {
                "step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }  # fmt: skip
        tensors = {f"model.{name}": tensor for name, tensor in stage.model.state_dict().items()}
        for name, parameter in parameters.items():
            tensors |= {f"{key}.{name}": tensor for key, tensor in optimizer.state[parameter].items()}
        start = 0
        if checkpoint.exists():
            start = checkpoint.read_state()["step"]
            checkpoint.read_tensors(tensors)
        for step in range(start, steps):
            batch = stage.batch(step, group.rows(ROWS))
            (weight,) = group.sum(batch.weight)
            loss, _ = loss_of(batch)
            (loss / weight).backward()
            group.clip(list(parameters.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(group.sum(loss.item())[0] / weight)
        t = time.perf_counter()
        snapshot = checkpoint.snapshot(tensors, {"step": steps})
        t2 = time.perf_counter()
        (checkpoint.write_behind if behind else checkpoint.write)(snapshot)
        checkpoint.wait()
        print(group.rank, "snapshot", t2 - t, "write", time.perf_counter() - t2, flush=True)
    return losses


def test_saved_on_four_resumed_on_any(tmp_path: Path, one_thread: None) -> None:
    first = on_processes(4, trained, tmp_path / "4", "fsdp", 3)
    print(sorted(p.name for p in (tmp_path / "4" / "checkpoint").iterdir()))
    import shutil
    for world in (1, 2, 8):
        shutil.copytree(tmp_path / "4", tmp_path / str(world))
        if world == 1:
            print(trained(tmp_path / "1", "ddp", 5))
        else:
            print(on_processes(world, trained, tmp_path / str(world), "fsdp", 5, True)[0])
    print(trained(tmp_path / "alone", "ddp", 5), first[0])
