"""Samples of tar shards, read by offset: pictures with texts and JSON, or what is wrong with them.

Shards are WebDataset's: `<key>.jpg|jpeg|png|webp`, `<key>.txt`, `<key>.json`. Nothing else is decoded, nothing is
written but the index, nothing that a shard holds is run.
"""

import hashlib
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from blip3o.data.features import Features
from blip3o.data.shard_index import JSON, PARTS, PICTURE, TEXT, Index, open_index
from blip3o.data.tar import BLOCK, Fault

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = (64 << 20, 1 << 20, 1 << 20)  # of a picture's file, a text, a JSON
TEXT_FILE = "text"  # captions are in the .txt
MAX_PIXELS = 64_000_000  # larger pictures are refused before they are decoded
OPEN = 256  # shards kept open; others are opened for each read
# What Pillow raises for data that is none of a picture.
UNDECODABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
    struct.error, zlib.error,
)  # fmt: skip


class ShardChanged(OSError):
    """A shard is not what it was when its index was opened."""


@dataclass(frozen=True)
class Sample:
    """picture: RGB, upright, on white. picture, text and json are None where the shard has none.

    features: [F, C], as stored, what a frozen tower saw in the picture, which then is not decoded; see `Shards`.
    """

    shard: Path
    offset: int  # of its first header
    key: str
    picture: Image.Image | None
    text: str | None
    json: dict[str, Any] | None
    features: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.shard.name}:{self.key}"


class Shards:
    """The samples of one source, in the order of its shards; all that is needed to read any of them is its number.

    places      tar files, or folders, of which all *.tar are taken by name
    cache       folder for the indices; None puts each beside its shard
    needs       of PARTS ("picture", "text", "json"): a sample without one of them is faulty
    captions    where a sample's text is: "text", its .txt; or any other word, that entry of the table "captions" of its
                .json, such as "long" or "short"
    max_pixels  pictures with more are faulty, and are not decoded
    features    of the pictures, of each shard; None: pictures are decoded. To be set before reading

    Raises FileNotFoundError and ValueError for places that are or hold no tar file, or the same one twice. Threads may
    share it; `close` it.
    """

    def __init__(
        self,
        *places: str | Path,
        cache: str | Path | None = None,
        needs: Sequence[str] = ("picture", "text"),
        captions: str = TEXT_FILE,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not set(needs) <= set(PARTS):
            raise ValueError(f"needs must be of {', '.join(PARTS)}, got {', '.join(needs)}")
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
        self.captions, self.max_pixels = captions, max_pixels
        self.needs = {PARTS.index(need) for need in needs}
        self.parts: tuple[int, ...] = (TEXT, JSON, PICTURE)  # that are decoded, in this order
        if captions != TEXT_FILE and TEXT in self.needs:
            self.needs = self.needs - {TEXT} | {JSON}
            self.parts = (JSON, PICTURE)
        self.features: Sequence[Features] | None = None
        paths = list(tar_files(places))
        self.indices = [open_index(path, None if cache is None else Path(cache)) for path in paths]
        self.ends = np.cumsum([len(index) for index in self.indices])
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards. Samples can still be read, which opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    @property
    def sum(self) -> str:
        """SHA-256 of the names and indices of all shards in order: equal sums, equal samples at equal numbers."""
        lines = (f"{index.shard.name} {index.size} {index.sum}\n" for index in self.indices)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def faults(self) -> Iterator[Fault]:
        """What the headers of the shards show, without reading a sample."""
        return (fault for index in self.indices for fault in index.faults)

    def known_faulty(self) -> int:
        """How many samples are faulty by their headers alone."""
        return sum(int((index.rows["fault"] >= 0).sum()) for index in self.indices)

    def read(self, i: int) -> Sample | Fault:
        """Sample i, 0..len-1, or what is wrong with it. Raises IndexError; ShardChanged; OSError of the disk."""
        index, row, which = self.locate(i)
        place = index.rows[row]
        if place["fault"] >= 0:
            return index.faults[int(place["fault"])]
        values: list[Any] = [None, None, None]
        for part in self.parts:
            stored = part == PICTURE and self.features is not None and place["part"][PICTURE][0] >= 0
            found = self.features[which].read(row) if stored and self.features else self.part(which, row, part)
            if isinstance(found, Fault):
                return found
            values[part] = found
        features = values[PICTURE] if isinstance(values[PICTURE], Tensor) else None
        picture = None if features is not None else values[PICTURE]
        text = values[TEXT]
        if TEXT not in self.parts:
            try:
                text = caption_of(values[JSON], self.captions)
            except Wrong as error:
                return Fault(index.shard, int(place["header"]), error.kind, index.key(row), str(error))
        return Sample(index.shard, int(place["header"]), index.key(row), picture, text, values[JSON], features)

    def part(self, which: int, row: int, part: int) -> Any:
        """A part of row `row` of shard number `which`, decoded; None where there is none; or the Fault that it is."""
        index = self.indices[which]
        start, size = (int(x) for x in index.rows[row]["part"][part])
        if start < 0:
            if part not in self.needs:
                return None
            return Fault(index.shard, int(index.rows[row]["header"]), "missing", index.key(row), f"no {PARTS[part]}")
        where, key = start - BLOCK, index.key(row)
        if size > MAX_BYTES[part]:
            reason = f"{PARTS[part]} of {size} bytes, at most {MAX_BYTES[part]} are read"
            return Fault(index.shard, where, "size", key, reason)
        data = self.pread(which, start, size)
        try:
            return self.decode(part, data)
        except Wrong as error:
            return Fault(index.shard, where, error.kind, key, str(error))

    def locate(self, i: int) -> tuple[Index, int, int]:
        """The shard's index, the row in it and the shard's number of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"i must be in 0..{len(self) - 1}, got {i}")
        which = int(np.searchsorted(self.ends, i, side="right"))
        index = self.indices[which]
        return index, i - int(self.ends[which]) + len(index), which

    def decode(self, part: int, data: bytes) -> Any:
        if part == PICTURE:
            return decode_picture(data, self.max_pixels)
        return decode_text(data, blank=TEXT not in self.needs) if part == TEXT else decode_json(data)

    def pread(self, which: int, start: int, size: int) -> bytes:
        """Bytes of shard number `which`. Raises ShardChanged, OSError."""
        with self._lock:
            file = self._open.get(which)
            if file is None and len(self._open) < OPEN:
                file = self._open[which] = self._checked(which)
        once = file is None
        if file is None:
            file = self._checked(which)
        try:
            data = os.pread(file, size, start)
        finally:
            if once:
                os.close(file)
        if len(data) != size:
            raise ShardChanged(f"{self.indices[which].shard} has {len(data)} of {size} bytes at {start}: it was cut")
        return data

    def _checked(self, which: int) -> int:
        index = self.indices[which]
        file = os.open(index.shard, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(file)
        if (status.st_size, status.st_mtime_ns) != (index.size, index.mtime_ns):
            os.close(file)
            raise ShardChanged(f"{index.shard} has changed since its index was opened")
        return file


def tar_files(places: Sequence[str | Path]) -> Iterator[Path]:
    """The tar files of files and folders, in order. Raises FileNotFoundError and ValueError."""
    seen: set[Path] = set()
    for place in map(Path, places):
        found = sorted(place.glob("*.tar")) if place.is_dir() else [place]
        if not found:
            raise FileNotFoundError(f"{place} holds no *.tar")
        for path in found:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is no file; shards are tar files or folders of them")
            if path.resolve() in seen:
                raise ValueError(f"{path} is named twice")
            seen.add(path.resolve())
            yield path
    if not seen:
        raise ValueError("places must name at least one tar file or folder")


class Wrong(ValueError):
    """Data that cannot be decoded; kind is a fault's."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind = kind
        super().__init__(" ".join(reason.split()))


def decode_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A picture's file as an RGB image. Raises Wrong."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                reason = f"{image.width} x {image.height} pixels, at most {max_pixels} are decoded"
                raise Wrong("pixels", reason)
            return on_white(image)
    except Wrong:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, before ours can be looked at
        raise Wrong("pixels", str(error)) from error
    except UnidentifiedImageError as error:  # its message holds an address
        raise Wrong("picture", "no JPEG, PNG or WebP") from error
    except UNDECODABLE as error:
        raise Wrong("picture", f"a damaged picture ({type(error).__name__}: {error})") from error


def on_white(image: Image.Image) -> Image.Image:
    """Upright, transparency on white, RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGB" and "transparency" not in upright.info:
        return upright
    whole = upright.convert("RGBA")
    white = Image.new("RGBA", whole.size, "white")
    return Image.alpha_composite(white, whole).convert("RGB")


def decode_text(data: bytes, blank: bool = False) -> str:
    """Strict UTF-8, and something in it unless `blank`. Raises Wrong."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Wrong("text", f"not UTF-8 ({error.reason} at byte {error.start})") from error
    if not blank and not text.strip():
        raise Wrong("text", "empty")
    return text


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, without NaN and infinity, which JSON has not. Raises Wrong."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Wrong("json", f"not JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise Wrong("json", f"an object is expected, got {type(value).__name__}")
    return value


def caption_of(table: dict[str, Any], name: str) -> str:
    """The entry of the table "captions". Raises Wrong."""
    captions = table.get("captions")
    caption = captions.get(name) if isinstance(captions, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise Wrong("missing", f'no caption {name!r}: a table "captions" with text under that name is expected')
    return caption


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
