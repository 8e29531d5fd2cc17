"""What a run tells while it trains: a line of JSON every few steps, the same to trackers, and a bar."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from blip3o.train.recipe import Recipe
from blip3o.train.trackers import Tracker

LOG, BAD_BATCHES = "log.jsonl", "bad_batches.jsonl"


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


class Log:
    """The rows of one stage, from step `start` on.

    RUN/log.jsonl           stage, step, loss and what else the stage logs, grad_norm, learning_rate,
                            samples_per_second, mfu, waiting (share of the time that the loop waited for a batch) and
                            seconds since this process began the stage
    RUN/bad_batches.jsonl   stage, step, ids of the samples, and what was wrong

    folder   RUN; None: nothing is told, as by all processes but one
    mfu      the MFU at one sample a second; 0: not known, then rows have none
    """

    def __init__(
        self, folder: Path | None, stage: str, recipe: Recipe, start: int, trackers: Sequence[Tracker]
    ) -> None:
        self.folder, self.stage, self.recipe, self.trackers = folder, stage, recipe, trackers
        self.began = self.logged = time.perf_counter()
        self.step = start  # of the last row
        self.mfu = 0.0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (LOG, BAD_BATCHES):
                rewind_log(folder / name, stage, start)
        self.lines = (Path(os.devnull) if folder is None else folder / LOG).open("a", encoding="utf-8")
        self.bar = tqdm(
            total=recipe.steps, initial=start, desc=f"{stage:>13}", unit="step", dynamic_ncols=True,
            disable=folder is None,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()
        self.lines.close()

    def row(self, step: int, values: Mapping[str, float], waiting: float) -> None:
        """Write what holds after `step` finished steps. waiting: seconds since the last row."""
        now = time.perf_counter()
        seconds = max(now - self.logged, 1e-9)
        rate = self.recipe.batch_size * (step - self.step) / seconds
        numbers = {**values, "samples_per_second": rate, "waiting": waiting / seconds}
        if self.mfu:
            numbers["mfu"] = self.mfu * rate
        numbers["seconds"] = now - self.began
        self.lines.write(json.dumps({"stage": self.stage, "step": step, **numbers}) + "\n")
        self.lines.flush()
        for tracker in self.trackers:
            tracker.log(self.stage, step, numbers)
        share = f"  MFU {100 * self.mfu * rate:.1f} %" if self.mfu else ""
        self.bar.set_postfix_str(
            f"loss {values['loss']:.3f}  norm {values['grad_norm']:.2f}  {rate:.0f} samples/s{share}", refresh=False
        )
        self.logged, self.step = now, step

    def bad(self, step: int, what: str, ids: Sequence[str]) -> None:
        """Write down that `step`, counted from 1 as in rows, was left out."""
        if self.folder is None:
            return
        with (self.folder / BAD_BATCHES).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"stage": self.stage, "step": step, "what": what, "ids": list(ids)}) + "\n")
        self.bar.write(f"stage {self.stage}: step {step} was left out: {what}")
