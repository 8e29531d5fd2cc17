"""Checkpoints and model folders with damaged files: each must be an error that names the file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import chaos_run
from chaos_process import Say, in_child
from chaos_table import Line
from safetensors import SafetensorError
from safetensors.torch import load
from torch.optim.optimizer import register_optimizer_step_pre_hook

from blip3o.weights import CorruptModel, from_pretrained, load_model

Files = Mapping[str, bytes]
BLOCK = 512  # bytes: a sector of a disk


@dataclass(frozen=True)
class Damage:
    kind: str
    changed: dict[str, bytes | None]  # new contents by name; None: missing


def flipped(data: bytes, choices: random.Random) -> bytes:
    place = choices.randrange(8 * len(data))
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def cut(data: bytes, choices: random.Random) -> bytes:
    return data[: choices.choice((choices.randrange(len(data)), len(data) - 1))]


def zeroed(data: bytes, choices: random.Random) -> bytes:
    start = choices.randrange(0, len(data), BLOCK)
    block = data[start : start + choices.choice((1, 8, 64)) * BLOCK]
    return data[:start] + bytes(len(block)) + data[start + len(block) :]


def appended(data: bytes, choices: random.Random) -> bytes:
    return data + choices.choice((b"\n", b" ", b"\0", choices.randbytes(choices.randint(1, BLOCK))))


IN_ONE_FILE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flip": flipped, "cut": cut, "zeroed block": zeroed, "appended bytes": appended,
}  # fmt: skip
KINDS = (*IN_ONE_FILE, "swapped files", "file of another save", "missing file")


def damage(files: Files, others: Files, choices: random.Random) -> Damage:
    """One that changes something. others: the folder's files as another save wrote them."""
    while True:
        kind, name = choices.choice(KINDS), choices.choice(sorted(files))
        changed: dict[str, bytes | None] = {}
        if kind in IN_ONE_FILE:
            changed[name] = IN_ONE_FILE[kind](files[name], choices)
        elif kind == "missing file":
            changed[name] = None
        elif kind == "file of another save":
            changed[name] = others[name]
        else:
            second = choices.choice(sorted(files))
            changed |= {name: files[second], second: files[name]}
        if any(files[name] != data for name, data in changed.items()):
            return Damage(kind, changed)


class Reached(Exception):
    """Training would go on with what was read."""


def reached(*_: object) -> None:
    raise Reached


def go_on(run: Path) -> None:
    """As a new process would, up to the first step of the optimiser. Raises Reached then."""
    chaos_run.train(run, ("understanding",), steps=10)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # the folder in a run, and who reads it
    "going on with the run": ("checkpoint", lambda folder: go_on(folder.parent)),
    "from_pretrained": ("model", from_pretrained),
    "load_model": ("model", load_model),
}


def try_all(run: Path, other: Path, times: int, seed: int, say: Say) -> None:
    """Damage, read, mend; says kind, reader and what came of it: an error that names the file, or else."""
    choices = random.Random(seed)
    register_optimizer_step_pre_hook(reached)
    plain: Counter[str] = Counter()
    for number in range(times):
        reader, (name, read) = list(READERS.items())[number % 2 if number % 4 < 3 else 2]
        folder = run / name
        files, others = contents(folder), contents(other / name)
        harm = damage(files, others, choices)
        for file, data in harm.changed.items():
            (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
            if harm.kind == "bit flip" and file.endswith(".safetensors") and data is not None:
                plain["of"] += 1
                plain["silent"] += loads_plainly(data)
        # A manifest that is changed may accuse any other file of its folder.
        blamed = list(harm.changed) if "manifest.json" not in harm.changed else [*files, ""]
        try:
            read(folder)
        except (CorruptModel, FileNotFoundError, FileExistsError) as error:
            named = any(str(folder / file) in str(error) for file in blamed)
            say(f"{harm.kind}\t{reader}\t" + ("" if named else f"names none of {sorted(harm.changed)}: {error}"))
        except Reached:
            say(f"{harm.kind}\t{reader}\t{sorted(harm.changed)}: training went on")
        except Exception as error:
            say(f"{harm.kind}\t{reader}\t{sorted(harm.changed)}: {type(error).__name__}: {error}")
        else:
            say(f"{harm.kind}\t{reader}\t{sorted(harm.changed)}: loaded")
        for file in harm.changed:
            (folder / file).write_bytes(files[file])
    say(f"plain\t{plain['silent']}\t{plain['of']}")
    for reader, (name, read) in READERS.items():  # mended, all of it is read
        try:
            read(run / name)
        except Reached:
            pass
        say(f"mended\t{reader}\t")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loads_plainly(data: bytes) -> bool:
    """Whether safetensors by itself takes a damaged file for whole."""
    try:
        load(data)
    except SafetensorError:
        return False
    return True


def measure(times: int, seed: int, folder: Path) -> list[Line]:
    lines = {kind: Line(kind) for kind in KINDS}
    mended = Line("the same folders, mended, are read")
    run, other = folder / "run", folder / "other"
    for place, steps in ((run, 4), (other, 5)):
        in_child(lambda say, place=place, steps=steps: stopped_run(place, steps), folder / "prepare.err")  # type: ignore[misc]
    silent = ""
    for line in in_child(lambda say: try_all(run, other, times, seed, say), folder / "corrupt.err"):
        kind, reader, problem = line.replace("\n", " ").split("\t")
        if kind == "plain":
            silent = f"safetensors alone takes {reader} of {problem} flips for whole"
        elif kind == "mended":
            mended.hold(True, "")
        else:
            lines[kind].hold(not problem, f"{reader}: {problem}")
    lines["bit flip"].note = silent
    return [*lines.values(), mended]


def stopped_run(folder: Path, steps: int) -> None:
    """A run that was stopped in the midst of a stage: its checkpoint holds all there is."""
    chaos_run.begun(folder)
    done = 0

    def stop(*_: object) -> None:
        nonlocal done
        done += 1
        if done > steps:
            raise Reached

    register_optimizer_step_pre_hook(stop)
    try:
        go_on(folder)
    except Reached:
        pass
