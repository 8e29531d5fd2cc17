"""The tensors of a folder, read one by one from safetensors files: one file, or shards that an index lists."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 2 << 30  # bytes of a shard
MAPPED = 16 << 20  # bytes read before a file is mapped anew: what is mapped counts as this process's memory
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {  # that a model's weights may have, by safetensors' names
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
USABLE = (torch.float32, torch.bfloat16, torch.float16)  # that networks run in


class CorruptModel(ValueError):
    """A model folder's file is missing, unreadable or not what its manifest says."""


class SkippedTensors(UserWarning):
    """Tensors that were not read, as they are no part of the model."""


class WrongTensors(CorruptModel):
    """Tensors are not those of the model. Each list holds all of them; the message too, layers together: a.{0-3}.b.

    missing, unexpected   names
    wrong                 sentences: which tensor, what it is, what was expected
    """

    def __init__(self, place: Path, missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
        self.missing, self.unexpected, self.wrong = sorted(missing), sorted(unexpected), sorted(wrong)
        problems = [f"missing {', '.join(grouped(self.missing))}"] * bool(self.missing)
        problems += [f"unexpected {', '.join(grouped(self.unexpected))}"] * bool(self.unexpected)
        super().__init__(f"{place} does not fit the model: {'; '.join(problems + self.wrong)}")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, under which name, and what it is."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' word


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CorruptModel, which names the file, for what is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not readable JSON: {error}") from None


class TensorFiles:
    """Names, shapes and dtypes of a folder's tensors, from the files' headers; their values when they are asked for.

    `place` is a safetensors file, or a folder with model.safetensors, or with shards and their index. Raises
    CorruptModel, which names the file, for one that is missing, cut off, or not what the index says; pickles are
    refused. Use it in one thread, and `close` it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.entries: dict[str, Entry] = {}
        self._open: Any = None
        self._open_path: Path | None = None
        self._read = 0
        for path, names in _files(place).items():
            held = self._header(path)
            if names is not None and names != held.keys():
                lacking, more = sorted(names - held.keys()), sorted(held.keys() - names)
                parts = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"also holds {', '.join(more)}"] * bool(more)
                raise CorruptModel(f"{path} is not what {place / INDEX} says: it {' and '.join(parts)}")
            self.entries.update(held)

    def put(self, place: Path, prefix: str) -> None:
        """Instead of the tensors whose names start with `prefix`, those of another file or folder, so prefixed."""
        with TensorFiles(place) as others:
            kept = {name: entry for name, entry in self.entries.items() if not name.startswith(prefix)}
            self.entries = kept | {prefix + name: entry for name, entry in others.entries.items()}

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open, self._open_path, self._read = None, None, 0

    def _file(self, path: Path) -> Any:
        if self._open_path != path or self._read >= MAPPED:
            self.close()
            try:
                self._open = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise CorruptModel(f"{path} is not a readable safetensors file: {error}{_lengths(path)}") from None
            self._open_path = path
        return self._open

    def _header(self, path: Path) -> dict[str, Entry]:
        file, entries = self._file(path), {}
        for name in file.keys():
            part = file.get_slice(name)
            entries[name] = Entry(path, name, tuple(part.get_shape()), part.get_dtype())
        self.close()
        return entries

    def copy(self, name: str, into: Tensor, first: int | None = None) -> None:
        """The values of a tensor, or of its `first` rows alone, into one of as many elements."""
        entry = self.entries[name]
        shape = entry.shape if first is None else (first, *entry.shape[1:])
        into, rows = into.view(shape), (shape or (1,))[0]
        step = max(1, rows * MAPPED // max(1, into.numel() * DTYPES[entry.dtype].itemsize))
        if first is None and step >= rows:
            into.copy_(self._file(entry.path).get_tensor(entry.name))
            self._read += into.numel() * DTYPES[entry.dtype].itemsize
            return
        for start in range(0, rows, step):  # a large one piece by piece
            piece = self._file(entry.path).get_slice(entry.name)[start : min(start + step, rows)]
            into[start : start + step].copy_(piece)
            self._read += piece.nbytes


def _files(place: Path) -> dict[Path, set[str] | None]:
    """Paths of safetensors files, and what the index says they hold; None where there is no index."""
    _refuse_pickles([place])
    if place.is_file():
        return {place: None}
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist")
    index = place / INDEX
    if not index.exists():
        if not (place / WEIGHTS).exists():
            _refuse_pickles(sorted(place.iterdir()))
            raise CorruptModel(f"{place / WEIGHTS} is missing, and so is {INDEX}: the folder holds no weights")
        return {place / WEIGHTS: None}
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CorruptModel(f"{index} must be JSON with a table weight_map of tensor names and file names") from None
    files: dict[Path, set[str] | None] = {}
    names: dict[str, set[str]] = {}
    for name, file in found:
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CorruptModel(f"{index} must name files of its own folder, got {file!r} for {name}")
        names.setdefault(file, set()).add(name)
    for file, held in sorted(names.items()):
        _refuse_pickles([place / file])
        if not (place / file).exists():
            raise CorruptModel(f"{place / file} is missing: {INDEX} names it for {len(held)} tensors, as {min(held)}")
        files[place / file] = held
    return files


def _refuse_pickles(paths: list[Path]) -> None:
    pickles = [path for path in paths if path.suffix in PICKLES]
    if pickles:
        raise CorruptModel(
            f"{', '.join(map(str, pickles))}: a pickle, which may run any code when it is read, so it is not read. "
            f"Where you trust it, convert it: python -c 'import sys, torch, safetensors.torch as s; "
            f"s.save_file({{k: v.clone() for k, v in torch.load(sys.argv[1], weights_only=True).items()}}, "
            f"sys.argv[2])' "
            f"{shlex.quote(str(pickles[0]))} {WEIGHTS}"
        )


def _lengths(path: Path) -> str:
    """How long a safetensors file is, and how long its header says it is: "" where there is no header to read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if 8 + length > size:
                return f" (it has {size} bytes, its header alone needs {8 + length})" if length < 1 << 30 else ""
            ends = [
                entry["data_offsets"][1] for name, entry in json.loads(file.read(length)).items() if name[:2] != "__"
            ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError):
        return ""
    expected = 8 + length + max(ends, default=0)
    return f" (it has {size} bytes, its header says {expected})" if size != expected else ""


def check_fit(place: Path, expected: Mapping[str, tuple[int, ...]], held: Mapping[str, Entry]) -> None:
    """Raise WrongTensors unless the tensors `held` are those that are `expected`, by name and shape."""
    missing = [name for name in expected if name not in held]
    unexpected = [entry.name for name, entry in held.items() if name not in expected]
    wrong = [
        f"{held[name].name} has shape {list(held[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in held and held[name].shape != shape
    ]
    if missing or unexpected or wrong:
        raise WrongTensors(place, missing, unexpected, wrong)


def one_dtype(files: TensorFiles, names: Sequence[str], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the named tensors; `dtype` if given. Raises CorruptModel, which names tensors of another.

    ValueError for a `dtype` that networks do not run in.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}")
    found = {name: files.entries[name].dtype for name in names}
    unknown = [f"{name} ({word})" for name, word in found.items() if word not in DTYPES]
    if unknown:
        raise CorruptModel(f"{files.place}: dtypes must be in {sorted(DTYPES)}, got {', '.join(unknown)}")
    if dtype is not None:
        return dtype
    counts = Counter(word for word in found.values() if DTYPES[word] in USABLE)
    expected = counts.most_common(1)[0][0] if counts else "F32"
    wrong: dict[str, list[str]] = {}
    for name, word in found.items():
        if word != expected:
            wrong.setdefault(word, []).append(name)
    if wrong:
        lines = [f"{', '.join(grouped(some))} has dtype {DTYPES[word]}" for word, some in wrong.items()]
        raise CorruptModel(f"{files.place}: {'; '.join(lines)}, expected {DTYPES[expected]}, or a dtype to be given")
    return DTYPES[expected]


def grouped(names: Sequence[str]) -> list[str]:
    """Names, those that differ in their first number alone as one: a.{0-3,7}.b."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"([^0-9]*?\.)(\d+)(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        numbers.setdefault((before, after), []).extend([int(number)] if number else [])
    return sorted(f"{before}{_ranges(found)}{after}" for (before, after), found in numbers.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    words = ["-".join(map(str, part)) for part in parts]
    return words[0] if len(numbers) == 1 else f"{{{','.join(words)}}}" if words else ""


def fill(
    network: nn.Module, files: TensorFiles, sources: Mapping[str, list[str]], dtype: torch.dtype, device: torch.device
) -> None:
    """Give a network on the meta device its tensors, one after the other: each is the named ones, one below the other.

    Tensors of `network.state_dict()` that `sources` lacks stay as they are.
    """
    own = network.state_dict()
    for name, parts in sources.items():
        tensor = torch.empty(own[name].shape, dtype=dtype, device=device)
        rows = tensor.flatten()
        for part, into in zip(parts, rows.split([_count(files.entries[part].shape) for part in parts]), strict=True):
            files.copy(part, into)
        put_tensor(network, name, tensor)


def put_tensor(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the network's parameter or buffer of that name, whatever memory it had."""
    owner, _, leaf = name.rpartition(".")
    held = network.get_submodule(owner)
    setattr(held, leaf, nn.Parameter(tensor) if leaf in held._parameters else tensor)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File names and the tensors of each, at most `limit` bytes, but for a tensor that is larger."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    for number, group in enumerate(groups, 1):
        yield (f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else WEIGHTS), group


def write_shards(tensors: Mapping[str, Tensor], folder: Path, limit: int) -> None:
    """model.safetensors, or shards and their index. Raises OSError, which names the file."""
    places: dict[str, str] = {}
    for file, group in shards(tensors, limit):
        write_tensors(group, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(group, file))
    if len(set(places.values())) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of copies of `tensors`. Raises OSError, which names the file, when it cannot be written."""
    try:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
