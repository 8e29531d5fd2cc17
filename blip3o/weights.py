"""Model folders: config.json, tokenizer.json, model.safetensors and a manifest of their SHA-256 sums.

safetensors has no checksum of its own (a flipped bit loads as a wrong weight), so the sums are checked at every load.
A folder is written beside its place, as NAME.new, and renamed into it; the one before is NAME.old until then. Whoever
reads it, and whoever is killed while writing it, leaves the old one or the new one, whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip3o.config import Blip3oConfig, from_dict, to_dict
from blip3o.model import Blip3o
from blip3o.processor import Processor

MANIFEST = "manifest.json"
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a model's weights may have


class CorruptModel(ValueError):
    """A model folder's file is missing, unreadable or not what its manifest says."""


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


def commit_folder(staged: Path, folder: Path) -> None:
    """Write the manifest of `staged`, flush it all to disk, and rename it to `folder`, replacing what is there."""
    check_replaceable(folder)
    files = sorted(path for path in staged.iterdir() if path.is_file())
    (staged / MANIFEST).write_text(json.dumps({path.name: sha256(path) for path in files}, indent=2) + "\n")
    for path in [*staged.iterdir(), staged]:
        _flush(path)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # if not, what is at `old` may be all there is: a writer was killed between its two renames
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staged.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path, *needed: str) -> Path:
    """Where the files of `folder` are, every one of them with the sum that the manifest says.

    That is `folder`, or NAME.old where its writer is, or was killed, between its two renames. Raises FileNotFoundError,
    or CorruptModel, also where the manifest lacks one of the `needed` files.
    """
    before = None
    while True:
        old = folder.with_name(folder.name + ".old")
        place = old if not folder.exists() and (old / MANIFEST).exists() else folder
        manifest, problem = _examine(place, needed)
        if problem is None:
            return place
        if (place, manifest) == before:
            raise problem
        before = place, manifest  # a writer may have replaced the folder while it was read: look once more


def _examine(folder: Path, needed: tuple[str, ...]) -> tuple[str, Exception | None]:
    """The content of a folder's manifest, and the first thing that is wrong."""
    path, text = folder / MANIFEST, ""
    if not folder.exists():
        return text, FileNotFoundError(f"model folder {folder} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        sums = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return text, CorruptModel(f"{folder} is no model folder: it has no {MANIFEST}")
    except ValueError:
        return text, CorruptModel(f"{path} is not readable JSON")
    if not isinstance(sums, dict):
        return text, CorruptModel(f"{path} must map file names to SHA-256 sums")
    for name in sorted({*sums, *needed}):
        file = folder / name
        if name not in sums:
            return text, CorruptModel(f"{file} has no sum in {MANIFEST}")
        try:
            if sha256(file) != sums[name]:
                return text, CorruptModel(f"{file} is corrupt: its SHA-256 sum is not the manifest's")
        except FileNotFoundError:
            return text, CorruptModel(f"{file} is missing")
    return text, None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file of copies of `tensors`. Raises OSError, which names the file, when it cannot be written."""
    try:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own. Raises CorruptModel, which names the file."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path} is not a readable safetensors file: {error}") from None


def save_pretrained(model: Blip3o, processor: Processor, folder: str | Path) -> None:
    """Write the model to `folder`, whole or not at all. Weights keep their dtype.

    Raises FileExistsError for a folder that is no model folder.
    """
    folder = Path(folder)
    staged = staging(folder)
    (staged / CONFIG).write_text(json.dumps(to_dict(model.config), indent=2) + "\n")
    processor.save(staged / TOKENIZER)
    write_tensors(model.state_dict(), staged / WEIGHTS)
    commit_folder(staged, folder)


def from_pretrained(folder: str | Path) -> tuple[Blip3o, Processor]:
    """Read what `save_pretrained` wrote: the model, in eval mode and with its weights' dtype, and its processor.

    Raises FileNotFoundError for a missing folder, CorruptModel for a file that is not what was written or that this
    version does not know.
    """
    place = check_folder(Path(folder), CONFIG, TOKENIZER, WEIGHTS)
    try:
        config = from_dict(Blip3oConfig, json.loads((place / CONFIG).read_text(encoding="utf-8")))
        processor = Processor.load(place / TOKENIZER, config.clip.image_size)
    except ValueError as error:
        raise CorruptModel(f"{place}: {error}") from None
    _check_tokens(config, processor, place)
    with torch.device("meta"):  # names and shapes; the file brings the memory
        model = Blip3o(config)
    load_weights(model, place / WEIGHTS)
    return model.eval(), processor


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


def load_weights(model: nn.Module, path: Path) -> None:
    """Give `model` the tensors of a safetensors file; a missing, unexpected or misshapen one is an error by name."""
    tensors = read_tensors(path)
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    expected = next((tensor.dtype for tensor in tensors.values() if tensor.dtype in DTYPES), torch.float32)
    problems += [
        f"{name} has dtype {tensor.dtype}, expected {expected}"
        for name, tensor in tensors.items()
        if tensor.dtype != expected
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CorruptModel(f"{path} does not fit the model: {'; '.join(sorted(problems)[:5])}{more}")
    model.load_state_dict(tensors, assign=True)
