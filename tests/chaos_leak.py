"""Many steps in one process: memory and open files."""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chaos_run
from chaos_process import Say, in_child
from chaos_run import STAGES, status_mb
from chaos_table import Line
from torch.optim.optimizer import register_optimizer_step_post_hook

from blip3o.train import loop

LOOKS = 40  # at memory, in a stage
# Of those: after the first saves, if any, and at the end. In each the least counts: a save may be under way.
EARLY, LATE = slice(20, 28), slice(32, 40)
MOST = 1.0  # MB that 1,000 steps may add
SAVE_EVERY = 500  # steps: what a save takes comes and goes, 1 MB of it, which would hide what little is lost


def open_files() -> set[str]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{path.name} {path.readlink()}")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def watched(folder: Path, steps: int, say: Say) -> None:
    """Train both stages, `steps` each; says memory LOOKS times, and what files a stage has left open."""
    done = 0

    def after_step(*_: object) -> None:
        nonlocal done
        done += 1
        if done % (steps // LOOKS) == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free but kept for later is no leak
            say(f"memory {status_mb('RssAnon')}")
            say(f"files {len(open_files())}")

    gc.freeze()  # what is there already need not be looked through each time
    register_optimizer_step_post_hook(after_step)
    loop.time = SimpleNamespace(perf_counter=lambda: done)  # type: ignore[assignment]  # saves come by steps
    before = open_files()
    for stage in STAGES:
        done = 0
        chaos_run.train(folder, (stage,), steps=steps, save_every_seconds=SAVE_EVERY)
        say(f"open {'|'.join(sorted(open_files() - before))}")


def measure(times: int, seed: int, folder: Path) -> list[Line]:
    """times: steps, half of them of each stage."""
    memory = Line(f"memory grows by less than {MOST:.0f} MB in 1,000 steps")
    files = Line("it holds no more files at the end than at the beginning")
    after = Line("no file is left open after a stage")
    steps = max(times // 2, LOOKS) // LOOKS * LOOKS
    run = chaos_run.begun(folder / "run")
    said = [line.split(" ", 1) for line in in_child(partial(watched, run, steps), folder / "run.err")]
    looks = {word: [float(rest) for kind, rest in said if kind == word] for word in ("memory", "files")}
    left_open = [rest for kind, rest in said if kind == "open"]
    for number, stage in enumerate(STAGES):
        used, held = (looks[word][number * LOOKS : (number + 1) * LOOKS] for word in ("memory", "files"))
        growth = (min(used[LATE]) - min(used[EARLY])) / (steps * (LATE.start - EARLY.start) / LOOKS) * 1000
        memory.hold(growth < MOST, f"{stage}: {growth:.2f} MB in 1,000 steps: {[round(x, 1) for x in used]}")
        memory.note += f"{stage} {growth:+.3f} MB  "
        files.hold(min(held[LATE]) <= min(held[EARLY]), f"{stage}: {held}")
        after.hold(not left_open[number], f"{stage}: {left_open[number]}")
    return [memory, files, after]
