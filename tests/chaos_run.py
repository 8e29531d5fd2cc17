"""The run that is tormented: the preset "tiny" of conftest.py, what its folders hold, and what it does to files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import register
from safetensors.torch import load_file

from blip3o.train import loop
from blip3o.train.checkpoint import STATE
from blip3o.train.devices import Devices
from blip3o.train.recipe import Recipe
from blip3o.train.run import Run
from blip3o.weights import MANIFEST

STAGES = ("understanding", "generation")  # the paper's two; clip has come before
TIMES = ("seconds", "samples_per_second", "waiting", "mfu")  # what two runs of the same thing may differ in
EMA = 0.9
RECIPES: dict[str, Recipe] = {}
_clip = Path()


def register_tiny() -> None:
    """Make the preset known, and use one thread."""
    torch.set_num_threads(1)
    RECIPES.update(register(pytest.MonkeyPatch()))


def prepare(folder: Path) -> None:
    """Make the preset known, and torch ready to be forked: one thread, and all loaded that training loads late.

    folder   gets a run that has finished what comes before the two stages; `begun` copies it
    """
    global _clip
    register_tiny()
    with redirect_stderr(StringIO()):
        train(folder, ("clip",), steps=3, save_every_seconds=1e9)
    _clip = folder


def begun(folder: Path) -> Path:
    """A run of its own, which is about to begin with the first of the two stages."""
    return Path(shutil.copytree(_clip, folder))


def train(
    folder: Path,
    chosen: tuple[str, ...],
    *,
    steps: int,
    save_every_seconds: float = 0.0,
    devices: Devices | None = None,
    **changes: Any,
) -> None:
    """Go on with the run in `folder`, to the end of the last of the `chosen` stages, as a new process would.

    It saves after each step by default. changes: of the recipes of the two stages.
    """
    loop.train.__kwdefaults__["save_every_seconds"] = save_every_seconds
    run = Run(folder, "tiny", devices)
    for stage in chosen:
        more = {"ema": EMA, **changes} if stage in STAGES else {}
        run.run_stage(stage, replace(RECIPES[stage], steps=steps, **more), lambda _: None)


def digest(folder: Path, state: bool = True) -> str:
    """SHA-256 of a commit's content: names and bits of its tensors, and with `state` its JSON without times."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            for name, tensor in sorted(load_file(path).items()):
                total.update(f"{path.name} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif state and path.suffix == ".json" and path.name != MANIFEST:
            content = json.dumps(without_times(json.loads(path.read_text())), sort_keys=True)
            total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: without_times(item) for name, item in value.items() if name not in TIMES}
        return kept | ({"finished": sorted(value["finished"])} if "finished" in value else {})
    return [without_times(item) for item in value] if isinstance(value, list) else value


def log_of(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
ASIDE = (".new", ".old")  # how the names end of what a save writes aside, and of what it replaces


def leftovers(folder: Path) -> list[Path]:
    """What an interrupted save leaves in a run's folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in ASIDE)


def watch_saves(folder: Path, act: Callable[[str, Path, Path | None], None]) -> None:
    """From now on until the process ends, call `act(event, path, target of a rename)` before Python touches what a save
    in `folder` writes aside or replaces: NAME.new, NAME.old and what lies in them."""
    acting = threading.local()  # what `act` itself does to files is no event

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or acting.__dict__ or not isinstance(arguments[0], str | os.PathLike):
            return
        path, target = Path(arguments[0]), Path(arguments[1]) if event == "os.rename" else None
        # shutil.rmtree goes from folder to folder by descriptors: names without a path.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
        for place in (path, target):
            if place is not None and folder in place.parents:
                inside = inside or Path(place.relative_to(folder).parts[0]).suffix in ASIDE
        if inside:
            acting.now = True
            act(event, path, target)
            del acting.now

    sys.addaudithook(hook)


def status_mb(field: str) -> float:
    """A line of /proc/self/status, in MB: VmRSS, memory in use; RssAnon, of it what no file backs; VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, value = line.split(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise ValueError(f"field must be a line of /proc/self/status, got {field!r}")


def state_of(folder: Path) -> dict[str, Any]:
    """What a run's checkpoint says about its stages and steps."""
    state: dict[str, Any] = json.loads((folder / "checkpoint" / STATE).read_text())
    return state
