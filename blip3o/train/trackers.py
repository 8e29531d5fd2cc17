"""TensorBoard, Weights & Biases and trackio, each behind an extra of its name: `blip3o train --track tensorboard`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import Any, Protocol

TRACKERS = ("tensorboard", "wandb", "trackio")


class Tracker(Protocol):
    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers that hold after `step` steps of `stage`."""

    def close(self) -> None: ...


@contextmanager
def trackers_of(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Tracker]]:
    """The trackers of these names, for the run in `folder` with these settings; closed at the end of the block.

    ValueError for an unknown name, or where its package is not installed, with the extra that installs it.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(f"track must be one of {', '.join(TRACKERS)}, got {unknown[0]!r}")
    packages = {name: _package("torch.utils.tensorboard" if name == "tensorboard" else name, name) for name in names}
    opened: list[Tracker] = []
    try:
        for name, package in packages.items():  # trackio has W&B's functions
            opened.append(TensorBoard(package, folder) if name == "tensorboard" else Remote(package, folder, settings))
        yield opened
    finally:
        for tracker in opened:
            tracker.close()


def _package(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--track {extra} needs a package that is not installed ({error.name}): pip install 'blip3o[{extra}]'"
        ) from None


class TensorBoard:
    """A run for each stage. One that goes on takes back what was told of the steps that it does again."""

    def __init__(self, package: ModuleType, folder: Path) -> None:
        self.package, self.folder = package, folder / "tensorboard"
        self.writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self.writers:
            self.writers[stage] = self.package.SummaryWriter(self.folder / stage, purge_step=step)
        for name, value in values.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Remote:
    """One run of W&B or trackio for a folder, which goes on where the folder's training does. Each stage has its own
    count of steps; those that are done again are told again."""

    def __init__(self, package: ModuleType, folder: Path, settings: Mapping[str, Any]) -> None:
        identity = _identity(folder / "tracked")
        self.run = package.init(
            project="blip3o", name=f"{folder.resolve().name}-{identity}", resume="allow", config=dict(settings),
            **({"id": identity} if package.__name__ == "wandb" else {}),  # trackio knows a run by its name
        )  # fmt: skip

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**{f"{stage}/{name}": value for name, value in values.items()}, f"{stage}/step": step})

    def close(self) -> None:
        self.run.finish()


def _identity(path: Path) -> str:
    """What the file holds; if there is none, something that no other run has, which is kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")  # a file is there whole or not at all
        beside.write_text(token_hex(4))
        beside.replace(path)
    return path.read_text()
