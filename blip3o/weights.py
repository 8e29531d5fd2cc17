"""Model folders: config.json, tokenizer.json, model.safetensors and a manifest of their SHA-256 sums.

safetensors has no checksum of its own (a flipped bit loads as a wrong weight), so the sums are checked at every load.
A folder is written beside its place, as NAME.new, and renamed into it; the one before is NAME.old until then. Whoever
reads it, and whoever is killed while writing it, leaves the old one or the new one, whole.

Released checkpoints are read and written too: `weights_released.py`. Weights of more than `SHARD` bytes are shards.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from blip3o.config import Blip3oConfig, from_dict, to_dict
from blip3o.model import Blip3o
from blip3o.processor import Processor
from blip3o.qwen_processor import QwenProcessor
from blip3o.weights_config import is_released
from blip3o.weights_files import (
    INDEX,
    SHARD,
    WEIGHTS,
    CorruptModel,
    TensorFiles,
    check_fit,
    fill,
    one_dtype,
    read_json,
    write_shards,
)
from blip3o.weights_names import VAE
from blip3o.weights_released import read_released, released_files

__all__ = [
    "CONFIG",
    "MANIFEST",
    "TOKENIZER",
    "WEIGHTS",
    "CorruptModel",
    "check_folder",
    "check_replaceable",
    "commit_folder",
    "convert",
    "flush",
    "from_pretrained",
    "load_model",
    "local_folder",
    "save_model",
    "save_pretrained",
    "settle",
    "sha256",
    "staging",
    "standing",
    "uses_pipeline",
    "weight_files",
]

MANIFEST = "manifest.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
Layout = Literal["blip3o", "released"]
Stamp = tuple[int, int] | None  # a file's inode and when it was written: a model saved twice has the same content
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]  # of a hub id; no pickle, no program


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging(folder: Path) -> Path:
    """A new, empty folder beside `folder`, to be filled and then given to `commit_folder`."""
    check_replaceable(folder)
    staged = folder.with_name(folder.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def check_replaceable(folder: Path) -> None:
    """Raise FileExistsError if there is something at `folder` that `commit_folder` did not write."""
    if folder.exists() and not (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} exists and has no {MANIFEST}: it is not replaced by a model folder")


def commit_folder(staged: Path, folder: Path, sums: Mapping[str, str] | None = None) -> None:
    """Write the manifest of `staged`, flush it all to disk, and rename it to `folder`, replacing what is there.

    sums   SHA-256 sums of files that another process has written and flushed
    """
    check_replaceable(folder)
    known = dict(sums or {})
    files = sorted(path for path in staged.iterdir() if path.is_file())
    found = {path.name: known.get(path.name) or sha256(path) for path in files}
    (staged / MANIFEST).write_text(_manifest(found), encoding="utf-8")
    for path in [*staged.iterdir(), staged]:
        if path.name not in known:
            flush(path)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # if not, what is at `old` may be all there is: a writer was killed between its two renames
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staged.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Clear up after a writer that was killed: what it left half written goes, what it had put aside comes back.

    Nobody may be writing to the folder.
    """
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(folder.with_name(folder.name + ".new"), ignore_errors=True)
    if not folder.exists() and (old / MANIFEST).exists():
        old.rename(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)


def _manifest(sums: Mapping[str, str]) -> str:
    return json.dumps(sums, indent=2) + "\n"


def flush(path: Path) -> None:
    """Have the content of a file, or the names in a folder, written to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path, *needed: str, share: tuple[int, int] = (0, 1)) -> Path:
    """Where the files of `folder` are, every one of them with the sum that the manifest says.

    share   (i, n): compute the sums of every n-th file alone, from the i-th on; n processes together do them all

    That is `folder`, or NAME.old where its writer is, or was killed, between its two renames. Raises FileNotFoundError,
    or CorruptModel, also where the manifest lacks one of the `needed` files.
    """
    before = None
    while True:
        place = standing(folder)
        stamp, problem = _examine(place, needed, share)
        if problem is None:
            return place
        if (place, stamp) == before:
            raise problem
        before = place, stamp  # a writer may have replaced the folder while it was read: look once more
        if stamp and folder.suffix == ".old" and not folder.exists():
            folder = folder.with_suffix("")  # it was between its two renames, and has come to its end


def _examine(folder: Path, needed: tuple[str, ...], share: tuple[int, int]) -> tuple[Stamp, Exception | None]:
    """Which manifest a folder has, and the first thing that is wrong."""
    path, stamp = folder / MANIFEST, None
    if not folder.exists():
        return stamp, FileNotFoundError(f"model folder {folder} does not exist")
    try:
        with path.open("rb") as file:
            status, text = os.fstat(file.fileno()), file.read().decode()
        stamp = status.st_ino, status.st_mtime_ns
        sums = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return stamp, CorruptModel(f"{folder} is no model folder: it has no {MANIFEST}")
    except (ValueError, RecursionError):
        return stamp, CorruptModel(f"{path} is not readable JSON")
    if not isinstance(sums, dict):
        return stamp, CorruptModel(f"{path} must map file names to SHA-256 sums")
    for number, name in enumerate(sorted({*sums, *needed})):
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            return stamp, CorruptModel(f"{path} must name files of its own folder, got {name!r}")
        file = folder / name
        if name not in sums:
            return stamp, CorruptModel(f"{file} has no sum in {MANIFEST}")
        try:
            if number % share[1] == share[0] and sha256(file) != sums[name]:
                return stamp, CorruptModel(f"{file} is corrupt: its SHA-256 sum is not the manifest's")
        except FileNotFoundError:
            return stamp, CorruptModel(f"{file} is missing")
        except OSError as error:
            return stamp, CorruptModel(f"{file} cannot be read: {error}")
    if text != _manifest(sums):  # bytes were added, or a name stands there twice
        return stamp, CorruptModel(f"{path} is not as it was written")
    return stamp, None


def local_folder(place: str | Path) -> Path:
    """The folder at `place`, or the local copy of the hub repository of that id, which is then downloaded.

    NAME.old where there is no folder NAME, as its writer is, or was killed, between its two renames.
    Only a text `owner/name` is a hub id, and only where there is no such folder, nor one called `owner`.
    """
    folder = Path(place)
    hub = isinstance(place, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place) is not None
    if not hub or folder.parent.exists():
        return standing(folder)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{place!r} is no folder, and a hub id needs huggingface_hub: pip install it") from None
    return Path(snapshot_download(str(place), allow_patterns=HUB_FILES))


def standing(folder: Path) -> Path:
    """`folder`, or NAME.old where its writer is, or was killed, between its two renames."""
    if folder.exists():
        return folder
    old = folder.with_name(folder.name + ".old")
    return old if (old / MANIFEST).exists() else folder


def save_pretrained(
    model: Blip3o, processor: Processor | QwenProcessor, folder: str | Path, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model to `folder`, whole or not at all. Weights keep their dtype.

    tensors   to be written in the place of the model's own

    Raises FileExistsError for a folder that is no model folder.
    """
    folder = Path(folder)
    staged = staging(folder)
    processor.save(staged / TOKENIZER if isinstance(processor, Processor) else staged)
    _write_model(model.config, model.state_dict() if tensors is None else tensors, staged)
    commit_folder(staged, folder)


def _write_model(config: Blip3oConfig, tensors: Mapping[str, Tensor], staged: Path) -> None:
    (staged / CONFIG).write_text(json.dumps(to_dict(config), indent=2) + "\n")
    write_shards(tensors, staged, SHARD)


def save_model(model: Blip3o, folder: str | Path, *, layout: Layout = "blip3o", files: Sequence[Path] = ()) -> None:
    """Write a model, and copies of `files` beside it, in our layout or the released one; whole or not at all.

    Raises FileExistsError for a folder that is no model folder, ValueError for a model that the released layout cannot
    hold. The released layout has a manifest too, which others do not look at.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    folder = Path(folder)
    staged = staging(folder)
    try:
        for file in files:
            shutil.copyfile(file, staged / file.name)
        if layout == "blip3o":
            _write_model(model.config, model.state_dict(), staged)
        else:
            values, tensors = released_files(model, staged)
            (staged / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
            write_shards(tensors, staged, SHARD)
        commit_folder(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # what is left of a failure may be many GB


def load_model(
    place: str | Path,
    *,
    tower: bool | str | Path = True,
    skip: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Blip3o:
    """The model of a folder in either layout, or of a hub id; in eval mode. See `Blip3o.from_pretrained`.

    Tensors are read one by one into memory of their own: at no time is there much more than the weights. Raises
    FileNotFoundError for a missing folder, CorruptModel for files that are not what was written, that this version does
    not know or that are pickles; its WrongTensors holds every missing and unexpected name.
    """
    if isinstance(skip, str):
        raise ValueError(f"skip must be a list of prefixes, got {skip!r}")
    folder = local_folder(place)
    held = (folder / CONFIG).exists()
    if folder.is_dir() and not held and not (folder / MANIFEST).exists():
        raise CorruptModel(f"{folder} is no model folder: it has neither {CONFIG} nor {MANIFEST}")
    if not held or not is_released(read_json(folder / CONFIG)):
        if held and not isinstance(tower, bool):
            raise ValueError(f"tower must be True or False for a folder of our layout, got {str(tower)!r}")
        checked, config = _checked(folder)
        return _own_model(checked, config, bool(tower), skip or (), dtype, torch.device(device))
    if (folder / MANIFEST).exists():
        folder = check_folder(folder, CONFIG, *weight_files(folder))
    given = (VAE,) if skip is None else tuple(skip)
    values = read_json(folder / CONFIG)  # again: of the files that were checked
    return read_released(folder, values, tower=tower, skip=given, dtype=dtype, device=device)


def convert(
    place: str | Path,
    folder: str | Path,
    *,
    layout: Layout,
    tower: bool | str | Path = True,
    skip: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write the model at `place` to `folder` in another layout or dtype, with the tokenizer's files.

    Returns the names in `place` that were left behind: files of other kinds, and folders. Raises ValueError where both
    are one folder, which would lose those.
    """
    source = local_folder(place)
    if source.exists() and Path(folder).exists() and source.samefile(folder):
        raise ValueError(f"folder must be another than {source}, which is read")
    model = load_model(source, tower=tower, skip=skip, dtype=dtype)
    ours = (CONFIG, MANIFEST, INDEX)
    others = sorted(path for path in source.iterdir() if path.name not in ours and path.suffix != ".safetensors")
    texts = [path for path in others if path.is_file() and any(path.match(pattern) for pattern in HUB_FILES)]
    save_model(model, folder, layout=layout, files=texts)
    return [path.name for path in others if path not in texts]


def uses_pipeline(folder: Path) -> bool:
    """Whether a model folder is one for `Pipeline`: a released checkpoint, or one of our layout that was."""
    folder = local_folder(folder)
    if not (folder / CONFIG).exists():
        return False
    values = read_json(folder / CONFIG)
    return is_released(values) or (isinstance(values, dict) and values.get("vision") is not None)


def from_pretrained(folder: str | Path) -> tuple[Blip3o, Processor]:
    """Read what `save_pretrained` wrote: the model, in eval mode and with its weights' dtype, and its processor.

    Raises FileNotFoundError for a missing folder, CorruptModel for a file that is not what was written or that this
    version does not know.
    """
    place, config = _checked(Path(folder), TOKENIZER)
    try:
        processor = Processor.load(place / TOKENIZER, config.clip.image_size)
    except ValueError as error:
        raise CorruptModel(f"{place}: {error}") from None
    _check_tokens(config, processor, place)
    return _own_model(place, config, True, (), None, torch.device("cpu")), processor


def weight_files(folder: Path) -> list[str]:
    """Names of the files that the manifest must have sums of: the weights', which may be shards and their index."""
    if (folder / INDEX).exists():
        return [INDEX, *sorted(path.name for path in folder.glob("*.safetensors"))]
    return [WEIGHTS]


def _checked(folder: Path, *needed: str) -> tuple[Path, Blip3oConfig]:
    """A folder of our layout whose files are as they were written, and its configuration."""
    place = check_folder(folder, CONFIG, *needed, *weight_files(standing(folder)))
    values = read_json(place / CONFIG)
    if is_released(values):
        raise CorruptModel(f"{place} is a released checkpoint: read it by Blip3o.from_pretrained")
    try:
        return place, from_dict(Blip3oConfig, values)  # which checks them
    except ValueError as error:
        raise CorruptModel(f"{place}: {error}") from None


def _own_model(
    place: Path,
    config: Blip3oConfig,
    tower: bool,
    skip: Sequence[str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Blip3o:
    with TensorFiles(place) as files:
        with torch.device("meta"):  # names and shapes; the files bring the memory
            model = Blip3o(config)
        names = [name for name in files.entries if not name.startswith(tuple(skip))]
        if config.clip.text is None and not (tower and any(name.startswith("clip.") for name in names)):
            model.drop_clip("its tower was not loaded")
            names = [name for name in names if not name.startswith("clip.")]
        own = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        check_fit(place, shapes, {name: files.entries[name] for name in names})
        fill(model, files, {name: [name] for name in own}, one_dtype(files, names, dtype), device)
    return model.eval()


def _check_tokens(config: Blip3oConfig, processor: Processor, place: Path) -> None:
    """The configuration's special tokens must be the tokenizer's, and every word must have an embedding."""
    tokens = {
        "<pad>": config.pad_token,
        "<eos>": config.end_token,
        "<image>": config.image_token,
        "<image_start>": config.query_start_token,
    }
    wrong = [f"{word} is not {i}" for word, i in tokens.items() if processor.tokenizer.token_to_id(word) != i]
    words = processor.tokenizer.get_vocab_size()
    if words > config.llm.vocab_size:
        wrong.append(f"it has {words} words, the model {config.llm.vocab_size}")
    if wrong:
        raise CorruptModel(f"{place / TOKENIZER} does not fit {CONFIG}: {', '.join(wrong)}")
