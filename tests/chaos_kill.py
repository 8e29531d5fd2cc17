"""A run that is cut by kill -9 again and again, beside one that is not: every checkpoint, log and file of the two."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import chaos_run
from chaos_process import Child, Say, in_child, tail
from chaos_run import STAGES, digest, leftovers, log_of
from chaos_table import Line
from torch.optim.optimizer import register_optimizer_step_pre_hook

from blip3o.weights import CorruptModel, check_folder

STEPS = 12  # of each stage
AHEAD = 4  # saves that a process makes before it is killed, at most
SAVED = ("checkpoint", "model")


@dataclass(frozen=True)
class Uncut:
    """The run that nobody kills. commits: digests of its checkpoints in order, the one that it began with first."""

    commits: list[str]
    model: str  # digest of its last model folder
    log: list[dict[str, object]]
    events: int  # that a save consists of
    seconds: float  # between two saves


class Synced:
    """Which files and folders have been synced to disk, as they are now."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], int] = {}
        sync = os.fsync

        def spy(descriptor: int) -> None:
            sync(descriptor)
            status = os.fstat(descriptor)
            self.states[status.st_dev, status.st_ino] = status.st_mtime_ns

        os.fsync = spy

    def lacks(self, folder: Path) -> list[str]:
        """What of a folder, itself included, has changed since it was synced."""
        found = [(path, path.stat()) for path in (folder, *folder.rglob("*"))]
        return [path.name for path, now in found if self.states.get((now.st_dev, now.st_ino)) != now.st_mtime_ns]


def uncut_run(start: Path, folder: Path, line: Line) -> Uncut:
    """Train without a kill; `line`: whether each save was on disk before it was renamed."""
    shutil.copytree(start, folder)

    def work(say: Say) -> None:
        synced = Synced()

        def act(event: str, path: Path, target: Path | None) -> None:
            say("event")
            if target is not None and target.name in SAVED:
                say(f"{target.name} {digest(path)} {time.monotonic()}")
                say(f"synced {' '.join(synced.lacks(path))}")

        chaos_run.watch_saves(folder, act)
        chaos_run.train(folder, STAGES, steps=STEPS)

    said = [line.split(" ") for line in in_child(work, folder.with_suffix(".err"))]
    for _, *lacking in (words for words in said if words[0] == "synced"):
        line.hold(lacking == [""], f"{', '.join(lacking)} not synced before the rename")
    commits = [words for words in said if words[0] == "checkpoint"]
    if not commits:
        raise RuntimeError(f"no save renames a folder to {folder / SAVED[0]}")
    moments = [float(words[2]) for words in commits]
    return Uncut(
        [digest(start / "checkpoint"), *(words[1] for words in commits)],
        digest(folder / "model"),
        log_of(folder),
        sum(words == ["event"] for words in said) // len(commits),
        median(after - before for before, after in pairwise(moments)),
    )


def go_on(folder: Path, uncut: Uncut, choices: random.Random | None, errors: Path) -> tuple[Child, list[str]]:
    """Go on with the run in a process that is killed: at a file operation of a save, a moment after a save began, or at
    any moment; or that comes to its end before, as it does without `choices`. Returns it and what it said."""
    way = choices.choices(("operation", "inside", "any"), (5, 3, 2))[0] if choices else "none"
    choices = choices or random.Random()
    deadly = choices.randint(1, AHEAD * uncut.events) if way == "operation" else 0
    save = choices.randint(1, 2 * AHEAD) if way == "inside" else 0  # a save commits two folders
    wait = choices.uniform(0, uncut.seconds / 4 if way == "inside" else AHEAD * uncut.seconds)

    def work(say: Say) -> None:
        events = 0

        def act(event: str, path: Path, target: Path | None) -> None:
            nonlocal events
            events += 1
            if events == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "os.mkdir":
                say("begins")
            if target is not None and target.name == "checkpoint":
                say("commits")

        begun = False

        def first_step(*_: object) -> None:
            nonlocal begun
            if not begun:
                begun = True
                say(f"left {' '.join(path.name for path in leftovers(folder))}")

        register_optimizer_step_pre_hook(first_step)
        chaos_run.watch_saves(folder, act)
        chaos_run.train(folder, STAGES, steps=STEPS)

    child, heard = Child(work, errors), []
    if way == "inside":
        while heard.count("begins") < save and (line := child.hear()) is not None:
            heard.append(line)
    if way in ("inside", "any"):
        if way == "any" and choices.random() < 0.8:  # else while it starts
            heard += filter(None, [child.hear()])
        time.sleep(wait)
        child.kill()
    return child, heard + child.wait()


def measure(times: int, seed: int, folder: Path) -> list[Line]:
    choices = random.Random(seed)
    exact = Line("every checkpoint left is that of the uncut run at its step: weights, moments, EMA, state")
    ends = Line("a run that was cut ends as the uncut one: checkpoint, model and log, bit for bit")
    whole = Line("checkpoint and model are whole after a kill, and the last commit is there")
    clean = Line("what a kill left behind is gone at the next start")
    synced = Line("all that a save wrote is on disk before it is renamed")
    inside = Line("at least half of the kills came inside a save")
    start = chaos_run.begun(folder / "start")
    uncut = uncut_run(start, folder / "uncut", synced)
    kills, within, runs = 0, 0, 0
    reached = dict.fromkeys(STAGES, 0)
    while kills < times:
        run = Path(shutil.copytree(start, folder / f"run{runs}"))
        runs, position, left = runs + 1, 0, []
        while True:
            child, said = go_on(run, uncut, choices if kills < times else None, folder / "killed.err")
            for words in (line.split(" ") for line in said):
                if words[0] == "left" and left:
                    clean.hold(words == ["left", ""], f"{', '.join(words[1:])} after a start, before {left}")
            if not child.killed:
                ends.hold(child.status == 0, tail(folder / "killed.err"))
                break
            kills += 1
            left = [path.name for path in leftovers(run)]
            within += any((run / name).is_dir() for name in left)
            place = examine(run, whole)
            found = digest(place) if place else ""
            exact.hold(found in uncut.commits, f"after kill {kills} the checkpoint is none of the uncut run's")
            if found in uncut.commits:
                now, told = uncut.commits.index(found), said.count("commits")
                allowed = (position + told - 1, position + told) if told else (position,)
                whole.hold(now in allowed, f"kill {kills}: commit {now} is there, expected one of {allowed}")
                position = now
                reached[STAGES[min(now // STEPS, 1)]] += 1
        if ends.broken:
            break
        same = (digest(run / "checkpoint"), digest(run / "model"), log_of(run))
        ends.hold(same == (uncut.commits[-1], uncut.model, uncut.log), f"run {runs} ends otherwise than the uncut one")
        shutil.rmtree(run)
    inside.hold(2 * within >= kills, f"{within} of {kills}")
    inside.note = f"{within} of {kills}, by what was left on disk"
    exact.note = ", ".join(f"{count} in {stage}" for stage, count in reached.items())
    ends.note = f"{runs} runs, {kills} kills"
    return [exact, ends, whole, clean, synced, inside]


def examine(run: Path, whole: Line) -> Path | None:
    """Where the last checkpoint stands; `whole`: that it and the model folder are as they were written."""
    places: list[Path | None] = []
    for name in SAVED:
        try:
            places.append(check_folder(run / name))
        except (CorruptModel, FileNotFoundError) as error:
            places.append(None)
            whole.hold(False, str(error))
        else:
            whole.hold(True, "")
    return places[0]
