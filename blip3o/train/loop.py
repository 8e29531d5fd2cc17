"""The training loop. One serves every stage: a stage says what to train, its batches and their loss, no more.

The batch of step k is a function of (seed, k) alone, so a run that was stopped goes on with the very batches it would
have had: its state is the weights, the optimiser's moments and one integer.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from blip3o.layers import keep_casts
from blip3o.train.bad_numbers import suspects
from blip3o.train.batch import Batch, Stage, ahead, micro_batches
from blip3o.train.blocks import prepared_blocks, training_blocks
from blip3o.train.devices import Devices, Loss
from blip3o.train.flops import peak_flops, step_flops
from blip3o.train.log import BAD_BATCHES, Log
from blip3o.train.optimizer import Ema, Training, descend, learning_rate, optimizer_for
from blip3o.train.recipe import Recipe
from blip3o.train.trackers import Tracker

LOG_EVERY = 10  # steps
# Whether the chip has tiles for products of bfloat16: on a Xeon with AMX they are 4 to 9 times as fast as float32 at
# nano's sizes. Without them products stay in float32, the faster one of the two in a try-out on Zen 4.
BFLOAT16_PRODUCTS: bool = torch.cpu._is_amx_tile_supported()


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; the state up to `step`, it may be the stage's last, was handed to `save`."""

    def __init__(self, stage: str, step: int, number: int) -> None:
        super().__init__(f"stopped in stage {stage} after step {step}")
        self.stage, self.step, self.signal = stage, step, number


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the step was not applied."""


def uses_bfloat16(recipe: Recipe) -> bool:
    """Whether products are of bfloat16; weights, moments and norms are float32 all the same."""
    return BFLOAT16_PRODUCTS if recipe.dtype == "auto" else recipe.dtype == "bfloat16"


@contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
    """Within the block, SIGINT and SIGTERM only leave their number, which the loop asks for between two steps.

    Only the main thread can change how a process takes signals; in another one there are no stop requests.
    """
    asked = 0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    stage: Stage,
    devices: Devices,
    *,
    folder: Path,
    save: Callable[[Training, int, bool], None],
    restore: Callable[[Training], int] = lambda training: 0,
    draw: Callable[[Training, int], None] | None = None,
    trackers: Sequence[Tracker] = (),
    save_every_seconds: float = 120.0,
) -> None:
    """Run `stage` from the step that `restore` returns to its recipe's last. Rank 0 alone keeps the log.

    folder    where log.jsonl and bad_batches.jsonl are, see `Log`; lines of steps that are done again are dropped
    save      called with what training holds besides the weights, the number of finished steps and whether a stop
              follows: now and then, at a stop, and at the end
    restore   loads what `save` wrote and returns the number of finished steps
    draw      called like `save` every `sample_every` steps, to draw pictures with the weights as they are then
    trackers  are told what the log is

    Raises Interrupted after a clean stop, NonFiniteLoss where more steps than `max_bad_batches` have bad numbers.
    """
    recipe = stage.recipe
    parts = micro_batches(stage, devices.rank, devices.world)
    kept = torch.bfloat16 if uses_bfloat16(recipe) else None

    def make(step: int) -> list[Batch]:
        return [stage.batch(step, rows).to(devices.device) for rows in parts]

    with _stop_requests() as stop_asked, keep_casts(), prepared_blocks(training_blocks(stage), recipe):
        loss_of = devices.wrap(stage, recipe.parallel, recipe.frozen, kept)  # FSDP makes other parameters: before these
        parameters = stage.trainable()
        training = Training(optimizer_for(parameters, recipe), Ema(parameters, recipe.ema) if recipe.ema else None)
        start = restore(training)
        saved = time.perf_counter()
        with (
            ahead(make, range(start, recipe.steps)) as batches,
            Log(folder if devices.rank == 0 else None, stage.name, recipe, start, trackers) as log,
        ):
            for step, micro in batches:
                if step == start:
                    log.mfu = mfu(stage, micro, devices, loss_of)
                rate = learning_rate(recipe, step)
                for group in training.optimizer.param_groups:
                    group["lr"] = rate
                sums, losses = gradients(stage, micro, devices, loss_of)
                norm = descend(training.optimizer, sums["loss"], recipe.clip_norm)
                sound = math.isfinite(sums["loss"] + norm)
                if sound and training.ema:
                    training.ema.update()
                elif not sound:
                    what, ids = suspects(micro, losses, parameters, devices)
                    training.optimizer.zero_grad(set_to_none=True)
                    training.bad_batches += 1
                    log.bad(step + 1, what, ids)
                    if training.bad_batches > recipe.max_bad_batches:
                        raise NonFiniteLoss(
                            f"stage {stage.name}: step {step} was not applied, its loss is {sums['loss']}, "
                            f"its gradient norm {norm}; bad: {what}, of {len(ids)} samples that "
                            f"{folder / BAD_BATCHES} names; max_bad_batches is {recipe.max_bad_batches}"
                        )
                done, last = step + 1, step + 1 == recipe.steps
                log.bar.update()
                if sound and (done % LOG_EVERY == 0 or last):
                    log.row(done, {**sums, "grad_norm": norm, "learning_rate": rate}, batches.waiting)
                    batches.waiting = 0.0
                if last:
                    if training.ema:
                        training.ema.replace_weights()
                    stage.finish()
                if draw is not None and done % recipe.sample_every == 0:
                    draw(training, done)
                asked, due = stop_asked(), devices.rank == 0 and time.perf_counter() - saved > save_every_seconds
                stops, terminations, saves = devices.sum(asked > 0, asked == signal.SIGTERM, due)  # all at one step
                if stops or saves or last:
                    save(training, done, stops > 0)
                    saved = time.perf_counter()
                if stops:
                    raise Interrupted(stage.name, done, signal.SIGTERM if terminations else signal.SIGINT)


def gradients(
    stage: Stage, batches: list[Batch], devices: Devices, loss_of: Loss
) -> tuple[dict[str, float], list[Tensor]]:
    """Add up the gradients of a step's micro-batches, on all processes: of the sum of their losses over the sum of
    their weights, which is what the whole batch would give.

    Returns the loss, and what else the stage logs, of the step; and the part of this loss from each micro-batch here.
    """
    (weight,) = devices.sum(sum(batch.weight for batch in batches))
    found: dict[str, float] = {}
    losses = []
    for batch in batches:
        with torch.autocast(devices.device.type, torch.bfloat16, enabled=uses_bfloat16(stage.recipe)):
            loss, more = loss_of(batch, batch is batches[-1])
        mean = loss / weight
        mean.backward()
        losses.append(mean.detach())
        for name, value in {"loss": losses[-1], **{name: x / weight for name, x in more.items()}}.items():
            found[name] = found.get(name, 0.0) + value.float().item()
    return dict(zip(found, devices.sum(*found.values()), strict=True)), losses


def mfu(stage: Stage, batches: list[Batch], devices: Devices, loss_of: Loss) -> float:
    """The MFU of this process at one sample a second of all, by the FLOPs of these batches; 0 where it is unknown."""
    flops = step_flops(lambda: gradients(stage, batches, devices, loss_of))
    for parameter in stage.trainable().values():
        parameter.grad = None
    peak = peak_flops(devices.device, torch.bfloat16 if uses_bfloat16(stage.recipe) else torch.float32) if flops else 0
    return flops / (stage.recipe.batch_size * peak) if peak else 0.0
