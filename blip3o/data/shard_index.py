"""The index of a tar shard: where each sample's picture, text and JSON lie, made once, then mapped and never scanned.

A sample is the adjacent members whose names are equal up to the first dot of the last component (WebDataset's rule).
Every sample has a row, faulty ones too, so that what is wrong with one moves no other in the order.

The file: MAGIC, a JSON header's length as 8 digits, the header, rows of ROW, all keys as UTF-8.
"""

import hashlib
import json
import os
import re
import uuid
import warnings
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blip3o.data.tar import BLOCK, Fault, Member, walk

MAGIC = b"blip3o shard index 1\n"
PICTURE, TEXT, JSON = range(3)
PARTS = ("picture", "text", "json")
EXTENSIONS = {"jpg": PICTURE, "jpeg": PICTURE, "png": PICTURE, "webp": PICTURE, "txt": TEXT, "json": JSON}
PICKLES = re.compile(r"(^|\.)(pkl|pickle|pyd|pth|pt|ckpt|bin|joblib|dill)(\.|$)")
# header: of the sample's first member; part: (offset of its data, bytes) of picture, text, json, -1 if absent;
# fault: which of the shard's faults, -1 for none; key: (start, bytes) among the keys. All little-endian.
ROW = np.dtype([("header", "<i8"), ("part", "<i8", (3, 2)), ("fault", "<i8"), ("key", "<i8", 2)])


class IndexRebuilt(UserWarning):
    """An index that was there did not fit its shard any more, or was damaged, and has been made anew."""


@dataclass(frozen=True)
class Index:
    """A shard's samples. faults: all that its headers show, of samples or between them; unlisted: members that are
    not read, by extension; made: whether it was made now; sum: SHA-256 of rows and keys."""

    shard: Path
    size: int  # of the shard, bytes
    mtime_ns: int
    rows: np.ndarray  # ROW [N]
    keys: np.ndarray  # uint8
    faults: tuple[Fault, ...]
    unlisted: dict[str, int]
    sum: str
    made: bool

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        start, length = (int(x) for x in self.rows[i]["key"])
        return bytes(self.keys[start : start + length]).decode("utf-8", "replace")


def index_path(shard: Path, cache: Path | None = None) -> Path:
    """Beside the shard, or in the folder `cache` under a name that holds a hash of the shard's absolute path."""
    if cache is None:
        return shard.with_name(shard.name + ".index")
    return cache / f"{shard.name}.{hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:16]}.index"


def open_index(shard: Path, cache: Path | None = None) -> Index:
    """The shard's index, from its file if that fits the shard's size and time of change and its own sum; else made.

    An index that does not fit is replaced with the warning IndexRebuilt. Raises OSError where shard or index cannot be
    read or written.
    """
    place = index_path(shard, cache)
    status = shard.stat()
    try:
        return load_index(place, shard, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"{place} is made anew: {error}", IndexRebuilt, stacklevel=2)
    index = make_index(shard)
    save_index(place, index)
    return index


def load_index(place: Path, shard: Path, size: int, mtime_ns: int) -> Index:
    """Read an index file. Raises FileNotFoundError, and ValueError that says why it does not fit the shard as it is."""
    with place.open("rb") as file:
        start = file.read(len(MAGIC) + 8)
        if not start.startswith(MAGIC) or not start[len(MAGIC) :].isdigit():
            raise ValueError("it is no index of this version")
        length = int(start[len(MAGIC) :])
        try:
            header = json.loads(file.read(length))
            known = {name: header[name] for name in ("size", "mtime_ns", "rows", "keys", "sum")}
            faults = tuple(Fault(shard, *fault) for fault in header["faults"])
            unlisted = dict(header["unlisted"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its header is damaged ({error})") from error
    if (known["size"], known["mtime_ns"]) != (size, mtime_ns):
        raise ValueError("the shard has changed since")
    start_of_rows, bytes_of_rows = len(start) + length, known["rows"] * ROW.itemsize
    if place.stat().st_size != start_of_rows + bytes_of_rows + known["keys"]:
        raise ValueError("it is cut or has grown")
    # Mapped by torch, which keeps no file open for it, as np.memmap does: shards may be thousands.
    whole = torch.from_file(str(place), shared=False, size=place.stat().st_size, dtype=torch.uint8)
    data = whole.numpy()[start_of_rows:]
    if header_sum(data, header["faults"], unlisted) != known["sum"]:
        raise ValueError("its sum is wrong")
    rows, keys = data[:bytes_of_rows].view(ROW), data[bytes_of_rows:]
    return Index(shard, size, mtime_ns, rows, keys, faults, unlisted, known["sum"], made=False)


def header_sum(data: np.ndarray, faults: list[list[object]], unlisted: dict[str, int]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(data).data)
    digest.update(json.dumps([faults, unlisted]).encode())
    return digest.hexdigest()


def save_index(place: Path, index: Index) -> None:
    """Write the file whole under another name, then rename it: several processes may do so at once."""
    header = {
        "size": index.size, "mtime_ns": index.mtime_ns, "rows": len(index), "keys": len(index.keys), "sum": index.sum,
        "faults": written(index.faults), "unlisted": index.unlisted,
    }  # fmt: skip
    text = json.dumps(header).encode()
    staged = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.write(MAGIC + b"%08d" % len(text) + text)
            file.write(index.rows.tobytes())
            file.write(index.keys.tobytes())
        staged.replace(place)
    except OSError as error:
        raise OSError(f"cannot write the index {place}: {error}; choose another folder with cache") from error
    finally:
        staged.unlink(missing_ok=True)


def written(faults: tuple[Fault, ...]) -> list[list[object]]:
    return [[fault.offset, fault.kind, fault.name, fault.reason] for fault in faults]


def make_index(shard: Path) -> Index:
    """Walk through the headers of a shard."""
    making = Making(shard)
    with shard.open("rb") as file:
        status = os.fstat(file.fileno())
        for member in walk(file, status.st_size):
            making.add(member)
    making.close()
    rows = np.array(making.rows, "<i8").view(ROW)
    keys = np.array(making.keys, np.uint8)
    data = np.concatenate([rows.view(np.uint8), keys])
    faults, unlisted = tuple(making.faults), dict(making.unlisted)
    total = header_sum(data, written(faults), unlisted)
    return Index(shard, status.st_size, status.st_mtime_ns, rows, keys, faults, unlisted, total, made=True)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member's name: "a.b/c.d.jpg" -> ("a.b/c", "d.jpg")."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()


class Making:
    """Members, one after another, become rows."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.rows, self.keys = array("q"), bytearray()
        self.faults: list[Fault] = []
        self.unlisted: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.key: str | None = None  # of the sample that is being read
        self.header, self.fault = 0, -1
        self.part = [[-1, -1] for _ in PARTS]

    def add(self, member: Member) -> None:
        key, extension = split_name(member.name)
        part = EXTENSIONS.get(extension)
        fault = member.fault
        if fault is None and part is None and PICKLES.search(extension):
            fault = ("pickle", "pickles run code when they are read, and are not read")
        if not member.name:
            self.note(member.header, "", fault or ("name", "no name"))
            return
        if fault is None and part is None:
            self.unlisted[extension[:32]] += 1
            return
        again = part is not None and self.part[part][0] >= 0
        if key != self.key or again:
            self.close()
            self.key, self.header = key, member.header
            if key in self.seen:
                self.fault = self.note(member.header, key, ("repeated", "a key that the shard has had before"))
            self.seen.add(key)
        if fault is not None:
            which = self.note(member.header, member.name, fault)
            self.fault = which if self.fault < 0 else self.fault
        if part is not None:
            self.part[part] = [member.header + BLOCK, member.size]

    def note(self, offset: int, name: str, fault: tuple[str, str]) -> int:
        """Which of the faults it is."""
        readable = name[:200].encode("utf-8", "backslashreplace").decode()
        reason = fault[1].encode("utf-8", "backslashreplace").decode()
        self.faults.append(Fault(self.shard, offset, fault[0], readable, reason))
        return len(self.faults) - 1

    def close(self) -> None:
        """The sample is complete."""
        if self.key is not None:
            key = self.key[:1024].encode("utf-8", "backslashreplace")
            places = [place for part in self.part for place in part]
            self.rows.extend([self.header, *places, self.fault, len(self.keys), len(key)])
            self.keys += key
        self.key, self.fault, self.part = None, -1, [[-1, -1] for _ in PARTS]
