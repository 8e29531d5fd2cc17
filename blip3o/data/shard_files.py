"""Tar shards as files: written from samples, verified, summarised."""

import io
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from blip3o.data.llava import read_turns
from blip3o.data.shard_index import EXTENSIONS, PICTURE, TEXT, make_index
from blip3o.data.shards import FORMATS, MAX_BYTES, UNDECODABLE, Shards, Wrong
from blip3o.data.tar import Fault


def write_shards(folder: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], per_shard: int) -> list[Path]:
    """Write (key, {extension: data}) as folder/00000.tar and so on, each whole or absent; equal samples, equal bytes.

    Raises ValueError for an extension that `Shards` does not read, a key that it would take apart or that a shard has
    already, no samples, and FileExistsError for a folder that has shards.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, got {per_shard}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise FileExistsError(f"{folder} has shards already; choose another folder")
    paths: list[Path] = []
    pending = iter(samples)
    following = next(pending, None)
    while following is not None:
        path = folder / f"{len(paths):05}.tar"
        staged = path.with_name(f".{path.name}.part")
        try:
            with tarfile.open(staged, "w", format=tarfile.PAX_FORMAT) as tar:
                keys: set[str] = set()
                while following is not None and len(keys) < per_shard:
                    add_sample(tar, *following, keys)
                    following = next(pending, None)
            with staged.open("rb+") as file:
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        paths.append(path)
    if not paths:
        raise ValueError("samples must hold at least one")
    return paths


def add_sample(tar: tarfile.TarFile, key: str, parts: Mapping[str, bytes], keys: set[str]) -> None:
    last = key.rpartition("/")[2]
    if not last or "." in key or key.startswith("/") or not key.isprintable() or key in keys:
        raise ValueError(f"keys must be relative names without dots, each once in a shard, got {key!r}")
    keys.add(key)
    for extension, data in parts.items():
        if extension not in EXTENSIONS:
            raise ValueError(f"extensions must be of {', '.join(EXTENSIONS)}, got {extension!r}")
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def verify(shards: Shards, conversations: bool = False) -> Iterator[Fault]:
    """Every fault of the shards: what a fresh walk through their headers shows, then what decoding every sample does.

    Also named is an index that differs from a fresh one; and, if `conversations` are asked for, a sample whose JSON is
    none that training can read. Raises OSError.
    """
    for index in shards.indices:
        fresh = make_index(index.shard)
        yield from fresh.faults
        if fresh.sum != index.sum:
            yield Fault(index.shard, 0, "index", "", "the index differs from what the shard holds; delete it")
    for i in range(len(shards)):
        index, row, _ = shards.locate(i)
        if index.rows[row]["fault"] < 0:
            found = shards.read(i)
            if isinstance(found, Fault):
                yield found
            elif conversations:
                try:
                    read_turns(found.json, found.picture is not None)
                except Wrong as error:
                    yield Fault(found.shard, found.offset, error.kind, found.key, str(error))


def summarise(shards: Shards) -> dict[str, object]:
    """Samples, bytes, sizes of pictures, lengths of captions: headers of pictures and texts are read, nothing more.

    A range is [least, median, greatest]. Pictures and captions that cannot be read are left to `verify`, and counted.
    """
    sides: tuple[array[int], array[int]] = (array("q"), array("q"))
    words, characters = array("q"), array("q")
    formats: Counter[str] = Counter()
    unread = 0
    for i in range(len(shards)):
        index, row, which = shards.locate(i)
        if index.rows[row]["fault"] >= 0:
            continue
        picture, text = (tuple(int(x) for x in index.rows[row]["part"][part]) for part in (PICTURE, TEXT))
        file = shards.pread(which, *picture) if 0 <= picture[0] and picture[1] <= MAX_BYTES[PICTURE] else None
        words_of = shards.pread(which, *text) if 0 <= text[0] and text[1] <= MAX_BYTES[TEXT] else None
        try:
            if file is not None:
                with Image.open(io.BytesIO(file), formats=FORMATS) as image:
                    formats[str(image.format)] += 1
                    for side, length in zip(sides, image.size, strict=True):
                        side.append(length)
            if words_of is not None:
                caption = words_of.decode("utf-8")
                words.append(len(caption.split()))
                characters.append(len(caption))
        except (*UNDECODABLE, Image.DecompressionBombError):
            unread += 1
    unlisted: Counter[str] = Counter()
    for index in shards.indices:
        unlisted.update(index.unlisted)
    return {
        "shards": len(shards.indices),
        "samples": len(shards),
        "bytes": sum(index.size for index in shards.indices),
        "faulty by their headers": shards.known_faulty(),
        "unreadable": unread,
        "not listed": dict(unlisted),
        "pictures": dict(formats),
        "width": spread(sides[0]),
        "height": spread(sides[1]),
        "caption words": spread(words),
        "caption characters": spread(characters),
        "sum": shards.sum,
    }


def spread(values: "array[int]") -> list[int]:
    if not values:
        return []
    sorted_values = np.sort(np.frombuffer(values, np.int64))
    return [int(sorted_values[k]) for k in (0, len(values) // 2, -1)]
