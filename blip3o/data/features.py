"""What a frozen tower saw in the pictures of a shard: computed once, kept in a file, checked as it is read.

The file: rows [N, F, C] of one dtype, CRC-32 of each row uint32 [N], CRC-32 of each picture's own file uint32 [N], a
JSON footer, its length as 8 digits, MAGIC. All little-endian. Row i belongs to row i of the shard's index; where the
shard has no picture, or a faulty one, it is zeros, and the footer holds the fault. The footer has the whole key and the
SHA-256 of all checksums, so that a file of another shard, tower or transform, a cut one, or one with a changed bit is
known as such: in the footer and the checksums when it is opened, in a row when that is read.
"""

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip3o.data.shard_index import Index
from blip3o.data.tar import Fault

MAGIC = b"blip3o features 1\n"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DamagedFeatures(OSError):
    """A row of stored features is not what was written."""


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on besides the shard.

    tower      SHA-256 of the tower's weights
    transform  how a picture becomes the tower's input, and which pictures are refused, in words
    shape      (F, C) of a picture's features
    dtype      that they are stored in, of DTYPES
    """

    tower: str
    transform: str
    shape: tuple[int, int]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def of(self, index: Index) -> dict[str, object]:
        """The whole key of a shard's features, as JSON has it."""
        key = {"shard": index.sum, "bytes": index.size, "rows": len(index)} | asdict(self)
        return key | {"shape": list(self.shape)}

    @property
    def row_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype].itemsize


def features_path(folder: Path, index: Index, key: FeatureKey) -> Path:
    """In `folder`, under a name that holds a hash of the shard's content and the key."""
    digest = hashlib.sha256(json.dumps(key.of(index)).encode()).hexdigest()[:16]
    return folder / f"{index.shard.name}.{digest}.features"


class Features:
    """The stored features of a shard's pictures. Threads may share it.

    Raises FileNotFoundError; ValueError, which says why, for a file that is none, is cut, or belongs to another shard
    or key.
    """

    def __init__(self, path: Path, index: Index, key: FeatureKey) -> None:
        self.path, self.key = path, key
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            tail = len(MAGIC) + 8
            file.seek(max(0, size - tail))
            end = file.read(tail)
            if not end.endswith(MAGIC) or not end[:8].isdigit():
                raise ValueError("it is cut, or no file of features")
            start = max(0, size - tail - int(end[:8]))
            rows = len(index) * key.row_bytes
            file.seek(rows)
            sums = file.read(8 * len(index))
            file.seek(start)
            try:
                footer = json.loads(file.read(size - tail - start))
                of, digest = footer["key"], footer["sums"]
                self.faults = {int(row): Fault(index.shard, *fault) for row, fault in footer["faults"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"its footer is damaged ({error})") from error
        if of != key.of(index):
            held = of if isinstance(of, dict) else {}
            differing = [name for name, value in key.of(index).items() if held.get(name) != value]
            raise ValueError(f"it belongs to another {', '.join(differing) or 'key'}")
        if start != rows + 8 * len(index):
            raise ValueError(
                f"it is cut or has grown: {start} bytes of rows and sums, expected {rows + 8 * len(index)}"
            )
        if sums_digest(sums, footer["faults"]) != digest:
            raise ValueError("its checksums are damaged")
        self.count = len(index)
        self._sums, self.picture_sums = array("I", sums[: len(sums) // 2]), array("I", sums[len(sums) // 2 :])

    def __len__(self) -> int:
        return self.count

    def read(self, row: int) -> Tensor | Fault:
        """The features [F, C] of a row of the shard, or what is wrong with its picture. Raises DamagedFeatures."""
        fault = self.faults.get(row)
        if fault is not None:
            return fault
        data = torch.empty(self.key.row_bytes, dtype=torch.uint8)
        memory = data.numpy().data
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # not mapped: a file that is cut then kills the process
        try:
            read = os.preadv(file, [memory], row * len(data))
        finally:
            os.close(file)
        if read != len(data):
            raise DamagedFeatures(f"{self.path} was cut: row {row} is missing; delete the file")
        if zlib.crc32(memory) != self._sums[row]:
            raise DamagedFeatures(f"{self.path}: row {row} is damaged, its checksum is wrong; delete the file")
        return data.view(DTYPES[self.key.dtype]).view(self.key.shape)


def write_features(
    path: Path, index: Index, key: FeatureKey, rows: Iterable[tuple[Tensor | Fault | None, int]]
) -> None:
    """Write a shard's features whole, as path.part first: only one at a time may write the same path.

    rows   of each row of the shard: its features [F, C], what is wrong with its picture, or None where there is none;
           and the CRC-32 of the picture's file
    Raises OSError.
    """
    sums, picture_sums, faults = array("I"), array("I"), {}
    staged = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            for row, (found, picture_sum) in enumerate(rows):
                data = bytes(key.row_bytes)
                if isinstance(found, Tensor):
                    stored = found.detach().to("cpu", DTYPES[key.dtype]).contiguous()
                    data = stored.view(torch.uint8).numpy().tobytes()
                elif found is not None:
                    faults[str(row)] = [found.offset, found.kind, found.name, found.reason]
                file.write(data)
                sums.append(zlib.crc32(data))
                picture_sums.append(picture_sum)
            whole = sums.tobytes() + picture_sums.tobytes()
            footer = {"key": key.of(index), "sums": sums_digest(whole, faults), "faults": faults}
            text = json.dumps(footer).encode()
            file.write(whole + text + b"%08d" % len(text) + MAGIC)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise OSError(f"cannot write the features {path}: {error}; choose another folder with cache") from error
    finally:
        staged.unlink(missing_ok=True)


def sums_digest(sums: bytes, faults: object) -> str:
    """SHA-256 of all checksums and faults."""
    return hashlib.sha256(sums + json.dumps(faults).encode()).hexdigest()
