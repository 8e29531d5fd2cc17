"""The training loop. One serves every stage: a stage says what to train, its batches and their loss, no more.

The batch of step k is a function of (seed, k) alone, so a run that was stopped goes on with the very batches it would
have had: its state is the weights, the optimiser's moments and one integer.
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from blip3o.layers import keep_casts
from blip3o.train.batch import Batch, Stage, ahead, micro_batches
from blip3o.train.devices import Devices, Loss
from blip3o.train.optimizer import descend, learning_rate, optimizer_for
from blip3o.train.recipe import Recipe

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


def rewind_log(log: Path, stage: str, step: int) -> None:
    """Drop what was logged of `stage` beyond `step`: a run that was killed has logged more than it saved.

    The last line may have been cut short. Raises ValueError, which names the line, for any other that is no row.
    """
    if not log.exists():
        return
    *lines, last = log.read_text(encoding="utf-8").split("\n")  # what follows the last newline: nothing, or a cut line
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            keep = row["stage"] != stage or row["step"] <= step
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{log}, line {number}: expected a row of the training log, got {line[:80]!r}") from None
        if keep:
            kept.append(line + "\n")
    if last or len(kept) < len(lines):
        shorter = log.with_name(log.name + ".new")
        shorter.write_text("".join(kept), encoding="utf-8")
        shorter.replace(log)


def train(
    stage: Stage,
    devices: Devices,
    *,
    log: Path,
    save: Callable[[torch.optim.AdamW, int, bool], None],
    restore: Callable[[torch.optim.AdamW], int] = lambda optimizer: 0,
    save_every_seconds: float = 120.0,
) -> None:
    """Run `stage` from the step that `restore` returns to its recipe's last. Rank 0 alone keeps the log.

    log      JSON lines, one every LOG_EVERY steps: stage, step, loss, learning_rate, grad_norm, samples_per_second,
             waiting (share of the time that the loop waited for batches) and seconds; lines of steps that have to be
             done again are dropped
    save     called with the optimiser, the number of finished steps and whether a stop follows: now and then, at a
             stop, and at the end
    restore  loads what `save` wrote into the optimiser and returns the number of finished steps

    Raises Interrupted after a clean stop, NonFiniteLoss before a step that would have poisoned the weights.
    """
    recipe, first = stage.recipe, devices.rank == 0
    parts = micro_batches(stage, devices.rank, devices.world)
    kept = torch.bfloat16 if uses_bfloat16(recipe) else None
    loss_of = devices.wrap(stage, recipe.parallel, recipe.frozen, kept)  # FSDP makes other parameters: before all else
    optimizer = optimizer_for(stage.trainable(), recipe)
    start = logged_step = restore(optimizer)
    began = saved = logged = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    if first:
        rewind_log(log, stage.name, start)
    bar = tqdm(
        total=recipe.steps, initial=start, desc=f"{stage.name:>13}", unit="step", dynamic_ncols=True, disable=not first
    )

    def make(step: int) -> list[Batch]:
        return [stage.batch(step, rows).to(devices.device) for rows in parts]

    with (
        _stop_requests() as stop_asked, (log if first else Path(os.devnull)).open("a") as lines, bar, keep_casts(),
        ahead(make, range(start, recipe.steps)) as batches,
    ):  # fmt: skip
        for step, micro in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            sums = gradients(stage, micro, devices, loss_of)
            loss = sums["loss"]
            norm = descend(optimizer, loss, recipe.clip_norm)
            if not math.isfinite(loss + norm):
                raise NonFiniteLoss(
                    f"stage {stage.name}: step {step} was not applied, its loss is {loss}, its gradient norm {norm}"
                )
            bar.update()
            now = time.perf_counter()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
                steps, seconds = step + 1 - logged_step, max(now - logged, 1e-9)
                rate = recipe.batch_size * steps / seconds
                row = {
                    "stage": stage.name, "step": step + 1, **sums, "grad_norm": norm,
                    "learning_rate": learning_rate(recipe, step), "samples_per_second": rate,
                    "waiting": batches.waiting / seconds, "seconds": now - began,
                }  # fmt: skip
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                bar.set_postfix_str(f"loss {loss:.3f}  {rate:.0f} samples/s")
                logged, logged_step, batches.waiting = now, step + 1, 0.0
            if step + 1 == recipe.steps:
                stage.finish()
            asked, due = stop_asked(), first and now - saved > save_every_seconds
            stops, terminations, due = devices.sum(asked > 0, asked == signal.SIGTERM, due)  # all after the same step
            if stops or due or step + 1 == recipe.steps:
                save(optimizer, step + 1, stops > 0)
                saved = time.perf_counter()
            if stops:
                raise Interrupted(stage.name, step + 1, signal.SIGTERM if terminations else signal.SIGINT)


def gradients(stage: Stage, batches: list[Batch], devices: Devices, loss_of: Loss) -> dict[str, float]:
    """Add up the gradients of a step's micro-batches, on all processes: of the sum of their losses over the sum of
    their weights, which is what the whole batch would give. Returns the loss, and what else the stage logs, of the
    step."""
    (weight,) = devices.sum(sum(batch.weight for batch in batches))
    found: dict[str, float] = {}
    for batch in batches:
        with torch.autocast(devices.device.type, torch.bfloat16, enabled=uses_bfloat16(stage.recipe)):
            loss, more = loss_of(batch, batch is batches[-1])
        mean = loss / weight
        mean.backward()
        for name, value in {"loss": mean.detach(), **{name: x / weight for name, x in more.items()}}.items():
            found[name] = found.get(name, 0.0) + value.float().item()
    return dict(zip(found, devices.sum(*found.values()), strict=True))
