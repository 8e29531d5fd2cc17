"""Many steps in one process: memory and open files."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import chaos_run
from chaos_process import Say, in_child
from chaos_run import STAGES, status_mb
from chaos_table import Line
from torch.optim.optimizer import register_optimizer_step_post_hook

WARM = 0.2  # share of a stage's steps before memory is taken for settled
MOST = 1.0  # MB that 1,000 steps may add
SAVE_EVERY = 0.5  # seconds: what a save leaks shows, too


def open_files() -> set[str]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{path.name} {path.readlink()}")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def watched(folder: Path, steps: int, say: Say) -> None:
    """Train both stages, `steps` each; says memory and open files where they are settled, and at the end."""
    done = 0

    def after_step(*_: object) -> None:
        nonlocal done
        done += 1
        if done in (int(WARM * steps), steps - 1):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free but kept for later is no leak
            say(f"memory {status_mb('RssAnon')}")
            say(f"files {'|'.join(sorted(open_files()))}")

    register_optimizer_step_post_hook(after_step)
    before = open_files()
    for stage in STAGES:
        done = 0
        chaos_run.train(folder, (stage,), steps=steps, save_every_seconds=SAVE_EVERY)
        say(f"closed {'|'.join(sorted(open_files() - before))}")


def measure(times: int, seed: int, folder: Path) -> list[Line]:
    """times: steps, half of them of each stage."""
    memory = Line(f"memory grows by less than {MOST:.0f} MB in 1,000 steps")
    files = Line("no file is opened and left open while it trains")
    after = Line("no file is left open after a stage")
    steps = times // 2
    run = chaos_run.begun(folder / "run")
    said = [line.split(" ", 1) for line in in_child(lambda say: watched(run, steps, say), folder / "run.err")]
    values = {word: [rest for kind, rest in said if kind == word] for word in ("memory", "files", "closed")}
    for number, stage in enumerate(STAGES):
        first, last = (float(text) for text in values["memory"][2 * number : 2 * number + 2])
        growth = (last - first) / (steps - 1 - int(WARM * steps)) * 1000
        memory.hold(growth < MOST, f"{stage}: {growth:.2f} MB in 1,000 steps, from {first:.1f} to {last:.1f} MB")
        memory.note += f"{stage} {growth:+.3f} MB  "
        early, late = (set(text.split("|")) for text in values["files"][2 * number : 2 * number + 2])
        files.hold(late <= early, f"{stage}: {sorted(late - early)}")
        after.hold(not values["closed"][number], f"{stage}: {values['closed'][number]}")
    return [memory, files, after]
