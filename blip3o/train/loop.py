"""The training loop. One serves every stage: a stage says what to train and what the loss of step k is, no more.

The batch of step k is a function of (seed, k) alone, so a run that was stopped goes on with the very batches it would
have had: its state is the weights, the optimiser's moments and one integer.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blip3o.layers import keep_casts
from blip3o.train.recipe import Recipe

LOG_EVERY = 10  # steps
# Whether the chip has tiles for products of bfloat16: on a Xeon with AMX they are 4 to 9 times as fast as float32 at
# nano's sizes. Without them products stay in float32, the faster one of the two in a try-out on Zen 4.
BFLOAT16_PRODUCTS: bool = torch.cpu._is_amx_tile_supported()


class Stage(Protocol):
    """What the loop asks of a stage."""

    name: str
    recipe: Recipe

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser moves, by name."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The scalar loss of step `step`'s batch, and what else to log."""

    def finish(self) -> None:
        """What is to be done once after the last step, before the model is saved."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; the state up to `step`, it may be the stage's last, was handed to `save`."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(f"stopped in stage {stage} after step {step}")
        self.stage, self.step = stage, step


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the step was not applied."""


def optimizer_for(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains and biases do not. `fused` is one C++ loop over all parameters."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float) -> float:
    """One step of the optimiser down the gradient of `loss`, clipped; returns the gradient's norm before that.

    Raises NonFiniteLoss, and changes no weight, if the loss or the gradient is infinite or NaN.
    """
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    if not math.isfinite(loss.item() + norm):
        raise NonFiniteLoss(f"its loss is {loss.item()}, its gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * cosine


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT and SIGTERM only raise a flag, which the loop reads between two steps.

    Only the main thread can change how a process takes signals; in another one there are no stop requests.
    """
    asked = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

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
    *,
    log: Path,
    save: Callable[[torch.optim.AdamW, int], None],
    restore: Callable[[torch.optim.AdamW], int] = lambda optimizer: 0,
    save_every_seconds: float = 120.0,
) -> None:
    """Run `stage` from the step that `restore` returns to its recipe's last.

    log      JSON lines, one every LOG_EVERY steps: stage, step, loss, learning_rate, grad_norm, samples_per_second and
             seconds; lines of steps that have to be done again are dropped
    save     called with the optimiser and the number of finished steps: now and then, at a stop, and at the end
    restore  loads what `save` wrote into the optimiser and returns the number of finished steps

    Raises Interrupted after a clean stop, NonFiniteLoss before a step that would have poisoned the weights.
    """
    recipe = stage.recipe
    parameters = stage.trainable()
    optimizer = optimizer_for(parameters, recipe)
    start = logged_step = restore(optimizer)
    began = saved = logged = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    rewind_log(log, stage.name, start)
    bar = tqdm(total=recipe.steps, initial=start, desc=f"{stage.name:>13}", unit="step", dynamic_ncols=True)
    with _stop_requests() as stop_asked, log.open("a") as lines, bar, keep_casts():
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16_PRODUCTS):
                loss, extra = stage.loss(step)
            try:
                norm = descend(loss, optimizer, recipe.clip_norm)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"stage {stage.name}: step {step} was not applied, {error}") from None
            bar.update()
            now = time.perf_counter()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
                rate = recipe.batch_size * (step + 1 - logged_step) / max(now - logged, 1e-9)
                row = {
                    "stage": stage.name, "step": step + 1, "loss": loss.item(), **extra, "grad_norm": norm,
                    "learning_rate": learning_rate(recipe, step), "samples_per_second": rate, "seconds": now - began,
                }  # fmt: skip
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                bar.set_postfix_str(f"loss {loss.item():.3f}  {rate:.0f} samples/s")
                logged, logged_step = now, step + 1
            if step + 1 == recipe.steps:
                stage.finish()
            if stop_asked() or now - saved > save_every_seconds or step + 1 == recipe.steps:
                save(optimizer, step + 1)
                saved = time.perf_counter()
            if stop_asked():
                raise Interrupted(stage.name, step + 1)
