"""RUN/checkpoint: all that going on needs, whole or absent, for any number of processes.

shard-*.safetensors   the tensors, each process its pieces, by torch's distributed checkpoint
state.json            the rest: plain values
manifest.json         SHA-256 sums of the files

It is written beside its place, as checkpoint.new, flushed to disk and renamed. What four processes wrote one, two or
eight can read: every one reads its pieces out of the files that hold them. No file of it is a pickle.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from blip3o.train.devices import Devices


class Snapshot:
    """A copy, in the CPU's memory, of a moment of training: training may go on while it is written."""


class Checkpoint:
    """The checkpoint at `folder`, for the processes of `devices`; all of them make every call, in the same order."""

    def __init__(self, folder: Path, devices: Devices) -> None:
        self.folder, self.devices = folder, devices

    def exists(self) -> bool:
        """Whether there is one to go on from; the same answer on every process. Leftovers of a killed writer go."""
        raise NotImplementedError

    def read_state(self) -> dict[str, Any]:
        """The plain values, after all files have been checked: each process takes its share of the sums.

        Raises CorruptModel on every process, which names the file, for one that is missing, too many or changed.
        """
        raise NotImplementedError

    def read_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors`, whole or sharded, with what was saved under their names. After `read_state`.

        Raises CorruptModel if a name, shape or dtype is another than was saved, or one is missing.
        """
        raise NotImplementedError

    def snapshot(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Snapshot:
        """Copy what is to be saved. All that stops training; it first waits for a `write_behind` that is under way."""
        raise NotImplementedError

    def write(self, snapshot: Snapshot) -> None:
        """Write and commit a snapshot; when it returns, it is on disk. Raises OSError, on every process, if not."""
        raise NotImplementedError

    def write_behind(self, snapshot: Snapshot) -> None:
        """`write` in a thread of its own. What it raises, the next `snapshot` or `wait` does."""
        raise NotImplementedError

    def wait(self) -> None:
        """Until nothing is being written."""
        raise NotImplementedError
