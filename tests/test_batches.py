"""Batches: their parts add up to the whole, and the next one is made meanwhile."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import copied, log_of, quiet, train

from blip3o.train.batch import ahead, micro_batches
from blip3o.train.recipe import STAGES, Recipe
from blip3o.train.run import Run


@pytest.mark.parametrize(("stage", "parts"), [("understanding", 4), ("generation", 4), ("decoder", 8)])
def test_accumulation_equals_the_large_batch(
    tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path, stage: str, parts: int
) -> None:
    """Whatever its parts weigh: the same losses, but for the rounding of sums in another order."""
    before = STAGES[STAGES.index(stage) - 1]
    found = []
    for accumulate in (1, parts):
        folder = copied(snapshots, before, tmp_path / str(accumulate))
        train(folder, {stage: replace(tiny[stage], accumulate=accumulate)}, stage)
        found.append([row for row in log_of(folder) if row["stage"] == stage])
    for whole, taken_apart in zip(*found, strict=True):
        for name in ("loss", "grad_norm"):
            assert taken_apart[name] == pytest.approx(whole[name], rel=2e-4), (whole, taken_apart)


def test_the_parts_of_a_batch_are_its_rows(tiny: dict[str, Recipe], snapshots: Path) -> None:
    """Of every tensor, in every stage: joined, what processes and micro-batches get is the whole batch."""
    run = Run(snapshots / "decoder", "tiny")
    for name in STAGES[1:]:
        stage = run._stage(name, replace(tiny[name], accumulate=2))
        for step in range(8):
            whole = stage.batch(step, range(8))
            parts = [stage.batch(step, rows) for rank in range(2) for rows in micro_batches(stage, rank, 2)]
            assert sum(part.weight for part in parts) == whole.weight
            assert [one for part in parts for one in part.ids] == whole.ids
            for key, tensor in whole.tensors().items():
                own = [part.tensors()[key] for part in parts if key in part.tensors()]
                assert torch.equal(torch.cat(own), tensor), (name, step, key)
    run.model.requires_grad_(True)


def test_what_stays_together_is_not_taken_apart(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    run = Run(copied(snapshots, "understanding", tmp_path / "run"), "tiny")
    message = r"batch_size of stage generation must be a multiple of 1 processes x accumulate 3 x 2 rows .*, got 8"
    with pytest.raises(ValueError, match=message):
        run.run_stage("generation", replace(tiny["generation"], accumulate=3), quiet)
    with pytest.raises(ValueError, match="accumulate must be 1 on one process in stage clip, whose loss compares"):
        Run(tmp_path / "clip", "tiny").run_stage("clip", replace(tiny["clip"], accumulate=2), quiet)


def test_the_next_batch_is_made_meanwhile() -> None:
    """In one thread, one step ahead and no more; what it raises arrives when the step does."""
    made: list[int] = []

    def make(step: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        made.append(step)
        if step == 5:
            raise OSError("the shard is gone")
        time.sleep(0.02)
        return step * step

    with pytest.raises(OSError, match="the shard is gone"), ahead(make, range(3, 9)) as batches:
        for step, square in batches:
            assert square == step * step
            time.sleep(0.1)
            assert made == list(range(3, step + 2))
    assert made == [3, 4, 5] and 0.01 < batches.waiting < 0.08
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
