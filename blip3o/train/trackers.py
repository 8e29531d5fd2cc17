"""TensorBoard, Weights & Biases and trackio, each behind an extra of its name: `blip3o train --track tensorboard`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
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
    def __init__(self, package: ModuleType, folder: Path) -> None:
        self.writer = package.SummaryWriter(folder / "tensorboard")

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class Remote:
    """One run of W&B or trackio, by the folder's name. Each stage has its own count of steps."""

    def __init__(self, package: ModuleType, folder: Path, settings: Mapping[str, Any]) -> None:
        self.run = package.init(project="blip3o", name=folder.resolve().name, config=dict(settings))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**{f"{stage}/{name}": value for name, value in values.items()}, f"{stage}/step": step})

    def close(self) -> None:
        self.run.finish()
