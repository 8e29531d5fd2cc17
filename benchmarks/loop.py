"""What the training loop costs: all of a step that is not forward, backward and optimiser.

    python benchmarks/loop.py [--stages clip ...] [--steps N] [--threads N]

Each stage of nano with its recipe's batches, and the diffusion transformer of 4b cut to two blocks. In a run of the
loop itself (batches made ahead in a thread, signals, log, bar; nothing is saved) two things are timed at each step: the
step, and within it what the model computes. The rest is the loop's own, by the medians over all steps. "by itself" is
what the same computations took without the loop, on batches made before: what the thread costs them is the difference.

The last two: how long a save stops training, beside a copy of the same tensors (weights and two moments of each that
trains) into memory that is there. What follows it, writing, happens in a thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip3o.dit import Dit
from blip3o.flow import TIMESTEPS, training_loss
from blip3o.presets import preset
from blip3o.train import loop
from blip3o.train.batch import Batch, Stage, micro_batches, summed
from blip3o.train.checkpoint import Checkpoint
from blip3o.train.devices import alone
from blip3o.train.optimizer import descend, optimizer_for
from blip3o.train.recipe import Recipe
from blip3o.train.recipe_files import load_recipe
from blip3o.train.run import Run

STAGES = ("clip", "understanding", "generation", "decoder", "4b dit")
PICTURES = 1024  # of a feature bank: how many there are does not change a step
ROWS = 4  # of 4b's batch
LIMITS = {"4b dit": 0.005}  # of the loop's share; nano's
LIMIT = 0.03


@dataclass(frozen=True)
class Rows(Batch):
    x: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Tensor


class DitStage:
    """4b's diffusion transformer, cut to two blocks, on random features and conditions."""

    name, unit = "4b dit", 1

    def __init__(self, recipe: Recipe) -> None:
        self.config = replace(preset("4b").dit, depth=2)
        self.model: Any = nn.ModuleDict({"dit": Dit(self.config)})
        self.recipe = replace(recipe, batch_size=ROWS, learning_rate=1e-6)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def batch(self, step: int, rows: range) -> Rows:
        draw = torch.Generator().manual_seed(step)
        shape = (len(rows), self.config.grid**2, self.config.in_channels)
        x, noise = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
        condition = torch.randn(len(rows), 64, self.config.condition_width, generator=draw)
        sigma = torch.rand(len(rows), generator=draw)
        return Rows(float(x.numel()), [f"{step}.{row}" for row in rows], x, noise, sigma, condition)

    def loss(self, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        dit = self.model["dit"]
        context = dit.context(dit.project(batch.condition))
        loss = training_loss(
            preset("4b").flow, lambda x, sigma: dit(x, sigma * TIMESTEPS, context), batch.x, batch.noise, batch.sigma
        )
        return summed(loss, batch.weight), {}

    def finish(self) -> None:
        pass


def stage_of(name: str, steps: int, folder: Path) -> Stage:
    recipes = load_recipe("nano", [f"steps={steps}", f"pictures={PICTURES}", "learning_rate=1e-6"]).stages
    if name == "4b dit":
        return DitStage(recipes["generation"])
    return Run(folder, "nano")._stage(name, recipes[name])


@dataclass
class Timed:
    """The clock before and after each call of a function."""

    function: Callable[..., Any]
    spans: list[tuple[float, float]]

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = self.function(*arguments)
        self.spans.append((began, time.perf_counter()))
        return result


def in_the_loop(stage: Stage, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each step from the third on, and of what is model compute in it."""
    kept = loop.gradients, loop.descend, loop.mfu
    down, up = Timed(loop.gradients, []), Timed(loop.descend, [])
    loop.gradients, loop.descend, loop.mfu = down, up, lambda *_: 0.0  # type: ignore[assignment]
    try:
        loop.train(stage, alone(), folder=folder, save=lambda *_: None, save_every_seconds=float("inf"))
    finally:
        loop.gradients, loop.descend, loop.mfu = kept
    begins = [began for began, _ in down.spans]
    steps = [later - began for began, later in pairwise(begins)]
    compute = [sum(end - began for began, end in pair) for pair in zip(down.spans, up.spans, strict=True)]
    return steps[2:], compute[2:-1]


def by_itself(stage: Stage, steps: int) -> list[float]:
    """Seconds of the same computations on batches made before, without a loop."""
    devices, parts = alone(), micro_batches(stage)
    loss_of = devices.wrap(stage)
    optimizer = optimizer_for(stage.trainable(), stage.recipe)
    batches = [[stage.batch(step, rows) for rows in parts] for step in range(steps)]
    found = []
    with loop.keep_casts():
        for micro in batches:
            began = time.perf_counter()
            sums, _ = loop.gradients(stage, micro, devices, loss_of)
            descend(optimizer, sums["loss"], stage.recipe.clip_norm)
            found.append(time.perf_counter() - began)
    return found[2:]


def saving(stage: Stage, folder: Path, times: int = 9) -> tuple[float, float]:
    """Seconds for which a save stops training, and of the copy alone; medians of turns."""
    moments = {
        f"{key}.{name}": torch.zeros_like(x) for name, x in stage.trainable().items() for key in ("first", "second")
    }
    tensors = dict(stage.model.state_dict()) | moments
    checkpoint = Checkpoint(folder / "checkpoint", alone())
    checkpoint.snapshot(tensors, {})  # whose memory the next ones use
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    stops, plain = [], []
    for _ in range(times):
        began = time.perf_counter()
        checkpoint.snapshot(tensors, {})
        between = time.perf_counter()
        for name, tensor in tensors.items():
            copies[name].copy_(tensor.detach())
        stops.append(between - began)
        plain.append(time.perf_counter() - between)
    return statistics.median(stops), statistics.median(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the training loop costs.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=200, help="of nano; a tenth of it of 4b (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| stage | step ms | compute ms | the loop's own | limit | compute ms, by itself | a save stops it ms "
        "| a copy ms |\n" + "|---" * 8 + "|"
    )
    for name in options.stages:
        steps = options.steps if name != "4b dit" else max(6, options.steps // 10)
        with tempfile.TemporaryDirectory() as folder:
            stage = stage_of(name, steps, Path(folder))
            alone_ms = 1e3 * statistics.median(by_itself(stage, steps))
            step, compute = in_the_loop(stage, Path(folder))
            stop, copied = saving(stage, Path(folder))
        own = statistics.median((whole - inner) / whole for whole, inner in zip(step, compute, strict=True))
        step_ms, compute_ms = 1e3 * statistics.median(step), 1e3 * statistics.median(compute)
        limit = LIMITS.get(name, LIMIT)
        print(
            f"| {name} | {step_ms:.1f} | {compute_ms:.1f} | {100 * own:.2f} % | {100 * limit} % | {alone_ms:.1f} "
            f"| {1e3 * stop:.1f} | {1e3 * copied:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
