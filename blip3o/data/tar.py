"""The members of a tar file, from its headers alone: where each one lies, and what is wrong with it.

A header is 512 bytes; its data follows, padded to 512. One header at a time is parsed by the standard library
(`TarInfo.frombuf`); walking is ours because `tarfile` ends without a word at a damaged header, and reads extended
headers of any size into memory. Nothing is ever extracted.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
CHUNK = 1 << 20  # bytes read at a time while looking for the next header
MAX_EXTENDED = 64 << 10  # bytes of an extended header (a long name); longer ones are faults
MAX_NAME = 1024
ZERO = bytes(BLOCK)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample, or with a shard between samples."""

    shard: Path
    offset: int  # of the member's header, bytes
    kind: str  # header, truncated, link, special, name, pickle, repeated, missing, size, pixels, picture, text, json
    name: str  # the member's or the sample's; "" where it is not known
    reason: str

    def __str__(self) -> str:
        name = f" {self.name[:200]!r}" if self.name else ""
        return f"{self.shard} at byte {self.offset}:{name} {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Member:
    """A file of the archive, or what stands in its place: `fault` is (kind, reason). Without a name: no sample's."""

    name: str
    header: int  # offset of the header that its data follows
    size: int
    fault: tuple[str, str] | None = None


def walk(file: BinaryIO, end: int) -> Iterator[Member]:
    """The members of an archive of `end` bytes in order, faulty ones too; directories and good global headers are not.

    After a damaged header the walk goes on at the next block that is a header; what lies between is one fault.
    """
    at, extended = 0, Extended()
    while True:
        block = read(file, at, BLOCK)
        if len(block) < BLOCK:
            reason = "the shard ends without the two empty blocks that end an archive" if not block else "cut header"
            yield Member("", at, 0, ("truncated", reason))
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.HeaderError(f"size {info.size}")
        except tarfile.HeaderError as error:
            following, only_zeros = next_header(file, at + BLOCK, end)
            if block == ZERO and only_zeros and following == end:
                if end < at + 2 * BLOCK:
                    yield Member("", at, 0, ("truncated", "the archive's end is cut"))
                return
            reason = "empty block inside the archive" if block == ZERO else f"damaged header ({error})"
            yield Member("", at, 0, ("header", f"{reason}; {following - at} bytes are skipped"))
            if following == end:
                return
            at, extended = following, Extended()
            continue
        name = info.name if extended.name is None else extended.name
        size = info.size if extended.size is None else extended.size
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, *LONG):
            size = info.size
        has_data = info.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, *DEVICES)
        following = at + BLOCK + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if has_data and at + BLOCK + size > end:
            yield Member(name, at, size, ("truncated", f"{size} bytes, of which the shard has {end - at - BLOCK}"))
            at, _ = next_header(file, at + BLOCK, end)
            extended = Extended()
            if at == end:
                return
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, *LONG):
            if size > MAX_EXTENDED:
                extended.wrong = f"an extended header of {size} bytes, at most {MAX_EXTENDED} are read"
            else:
                extended.read(info.type, read(file, at + BLOCK, size))
            at = following
        else:
            if info.type != tarfile.DIRTYPE:
                yield Member(name, at, size, fault_of(info, name, extended.wrong))
            at, extended = following, Extended()


LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


class Extended:
    """What extended headers say about the member that follows them."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.wrong = ""

    def read(self, kind: bytes, data: bytes) -> None:
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        if kind in LONG:
            return
        try:
            records = pax_records(data)
            if "size" in records and not (records["size"].isascii() and records["size"].isdigit()):
                raise ValueError(f"size {records['size'][:20]!r}")
            size = int(records["size"]) if "size" in records else None
        except ValueError as error:
            self.wrong = f"a damaged extended header ({error})"
            return
        if kind == tarfile.XGLTYPE:
            if "path" in records or "size" in records:
                self.wrong = "a global header that names or sizes every member"
            return
        self.name, self.size = records.get("path", self.name), size
        if any(key.startswith("GNU.sparse.") for key in records):
            self.wrong = "a sparse file"


def pax_records(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header. Raises ValueError."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        blank = data.find(b" ", at, at + 20)
        if blank < 0 or not data[at:blank].isdigit():
            raise ValueError("a record without a length")
        length = int(data[at:blank])
        record = data[blank + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if at + length > len(data) or not equals or record[-1:] != b"\n":
            raise ValueError("a record that is not KEY=VALUE")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def fault_of(info: tarfile.TarInfo, name: str, wrong: str) -> tuple[str, str] | None:
    if wrong:
        return "header", wrong
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        return "link", f"a link to {info.linkname[:200]!r}"
    if info.type not in tarfile.REGULAR_TYPES or info.type == tarfile.GNUTYPE_SPARSE:
        return "special", f"a member of type {info.type!r}, no regular file"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        return "name", "a name that points outside"
    if not name or len(name) > MAX_NAME:
        return "name", f"a name of {len(name)} characters, 1 to {MAX_NAME} are read"
    if not name.isprintable():  # surrogates, which stand for bytes that are no UTF-8, are not
        return "name", "a name that is not UTF-8 or not printable"
    return None


def next_header(file: BinaryIO, at: int, end: int) -> tuple[int, bool]:
    """Where the next header stands from the block at `at` on, `end` if nowhere; whether all before it is zero."""
    only_zeros = True
    while at < end:
        chunk = read(file, at, CHUNK)
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257  # of the header whose magic this would be
            if start >= 0 and start % BLOCK == 0 and is_header(chunk[start : start + BLOCK]):
                return at + start, only_zeros and not any(chunk[:start])
            found = chunk.find(b"ustar", found + 1)
        only_zeros = only_zeros and chunk.count(0) == len(chunk)
        if len(chunk) < CHUNK:
            break
        at += len(chunk)
    return end, only_zeros


def is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
