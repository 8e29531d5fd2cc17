"""RUN/checkpoint: all that going on needs, whole or absent, for any number of processes.

shard-*.safetensors   the tensors, each process its pieces, by torch's distributed checkpoint
training.json         the rest: plain values
manifest.json         SHA-256 sums of the files

It is written beside its place, as checkpoint.new, flushed to disk and renamed. What four processes wrote one, two or
eight can read: each reads its pieces out of the files that hold them. No file of it is a pickle.

Tensors are named GROUP.NAME, as model.queries; a group is read as a whole.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from blip3o.train.devices import Devices
from blip3o.weights import MANIFEST, CorruptModel, check_folder, commit_folder, flush, settle, sha256, staging, standing
from blip3o.weights_files import WrongTensors, read_json

STATE = "training.json"
Before = Callable[[Callable[[Mapping[str, Tensor]], None]], None]


@dataclass(frozen=True)
class Snapshot:
    """A copy, in the CPU's memory, of a moment of training: training may go on while it is written."""

    tensors: dict[str, Tensor]  # this process's
    state: str  # as JSON


class Checkpoint:
    """The checkpoint at `folder`, for the processes of `devices`; all of them make every call, in the same order."""

    def __init__(self, folder: Path, devices: Devices) -> None:
        self.folder, self.devices = folder, devices
        self._copies: dict[str, Tensor] = {}  # of the last snapshot: their memory serves the next one
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def exists(self) -> bool:
        """Whether there is one to go on from; the same answer on every process."""
        found: bool = self.devices.gather(standing(self.folder).exists())[0]
        return found

    def settle(self) -> None:
        """Clear up after a writer that was killed. Nobody else may be writing."""
        _on_rank_0(self.devices, lambda: settle(self.folder))

    def read_state(self) -> dict[str, Any]:
        """The plain values, after all files have been checked: each process computes its share of the sums.

        Raises CorruptModel on every process, which names the file, for one that is missing, too many or changed.
        """
        devices, place, problem = self.devices, standing(self.folder), None
        present = [path.name for path in place.iterdir() if path.name != MANIFEST] if place.is_dir() else []
        try:
            place = check_folder(self.folder, STATE, *present, share=(devices.rank, devices.world))
        except (CorruptModel, FileNotFoundError) as error:
            problem = str(error)
        for text in devices.gather(problem):
            if text is not None:
                raise CorruptModel(text)
        state = read_json(place / STATE)
        if not isinstance(state, dict):
            raise CorruptModel(f"{place / STATE} must be a table")
        return state

    def read_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors`, whole or sharded, with what was saved under their names. After `read_state`.

        Raises WrongTensors unless they are all that was saved of their groups, in the same shapes and dtypes.
        """
        _read(standing(self.folder), tensors)

    def snapshot(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Snapshot:
        """Copy what is to be saved. All that stops training; it first waits for a `write_behind` that is under way."""
        self.wait()
        copies = {}
        for name, tensor in tensors.items():
            if self.devices.rank == 0 or isinstance(tensor, DTensor):  # what all hold, rank 0 writes
                copies[name] = _copy(tensor.detach(), self._copies.get(name))
        self._copies = copies
        return Snapshot(copies, json.dumps(state, indent=2) + "\n")

    def write(self, snapshot: Snapshot, before: Before | None = None) -> None:
        """Write and commit a snapshot; when it returns, it is on disk. Raises OSError, on every process, if not.

        before   called on rank 0 when all is written but not yet committed, with a function that fills whole tensors
                 from it as `read_tensors` does
        """
        self.wait()
        self._write(snapshot, before)

    def write_behind(self, snapshot: Snapshot, before: Before | None = None) -> None:
        """`write` in a thread of its own. What it raises, the next `snapshot`, `write` or `wait` does."""
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot, before)

    def wait(self) -> None:
        """Until nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, snapshot: Snapshot, before: Before | None) -> None:
        devices, staged = self.devices.background, self.folder.with_name(self.folder.name + ".new")
        _on_rank_0(devices, lambda: _begin(self.folder, snapshot.state))
        writer = dcp.HuggingFaceStorageWriter(str(staged), save_distributed=True)
        alone = devices.group is None
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                dcp.save(snapshot.tensors, storage_writer=writer, process_group=devices.group, no_dist=alone)
        except CheckpointException as error:
            reasons = ", ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
            raise OSError(f"{staged} cannot be written: {reasons}") from None
        own = staged.glob(f"shard-{devices.rank + 1:05}-*")  # none where this process had no piece
        sums = {name: sum for found in _on_each(devices, lambda: _flushed(own)) for name, sum in found.items()}
        if before is not None:
            _on_rank_0(devices, lambda: before(lambda tensors: _fill(tensors, snapshot, staged, alone)))
        _on_rank_0(devices, lambda: commit_folder(staged, self.folder, sums))


def _fill(tensors: Mapping[str, Tensor], snapshot: Snapshot, staged: Path, alone: bool) -> None:
    """From the files, as other processes have pieces; a process alone has all in memory."""
    if not alone:
        return _read(staged, tensors)
    for name, tensor in tensors.items():
        tensor.copy_(snapshot.tensors[name])


def _read(place: Path, tensors: Mapping[str, Tensor]) -> None:
    reader = dcp.HuggingFaceStorageReader(str(place))
    groups = {name.partition(".")[0] for name in tensors}
    held = {
        name: (list(entry.size), entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.partition(".")[0] in groups and isinstance(entry, TensorStorageMetadata)
    }
    asked = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if held != asked:
        wrong = [
            f"{name} is {held[name][1]} {held[name][0]}, expected {asked[name][1]} {asked[name][0]}"
            for name in held.keys() & asked.keys()
            if held[name] != asked[name]
        ]
        raise WrongTensors(place, list(asked.keys() - held.keys()), list(held.keys() - asked.keys()), wrong)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is done without the others
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


def _begin(folder: Path, state: str) -> None:
    (staging(folder) / STATE).write_text(state, encoding="utf-8")


def _flushed(paths: Iterable[Path]) -> dict[str, str]:
    """Files' SHA-256 sums, once they are on the disk."""
    sums = {}
    for path in paths:
        flush(path)
        sums[path.name] = sha256(path)
    return sums


def _on_each(devices: Devices, act: Callable[[], Any]) -> list[Any]:
    """What `act` returns on each process, on all of them. Raises OSError everywhere if it does anywhere."""
    result, problem = None, None
    try:
        result = act()
    except OSError as error:
        problem = str(error)
    found = devices.gather([result, problem])
    for _, text in found:
        if text is not None:
            raise OSError(text)
    return [value for value, _ in found]


def _on_rank_0(devices: Devices, act: Callable[[], None]) -> None:
    """Do it there, while the others wait. Raises OSError on all of them if it fails."""
    _on_each(devices, act if devices.rank == 0 else lambda: None)


def _copy(tensor: Tensor, old: Tensor | None) -> Tensor:
    """A contiguous copy in the CPU's memory, in the place of `old` if that is alike."""
    if old is None or (old.shape, old.dtype, type(old)) != (tensor.shape, tensor.dtype, type(tensor)):
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(old, DTensor) and isinstance(tensor, DTensor):
        old.to_local().copy_(tensor.to_local())
    else:
        old.copy_(tensor)
    return old
