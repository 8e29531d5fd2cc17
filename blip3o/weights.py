"""Model folders: config.json, tokenizer.json, model.safetensors and a manifest of their SHA-256 sums.

safetensors has no checksum of its own (a flipped bit loads as a wrong weight), so the sums are checked at every load.
A folder is written beside its place and renamed into it: whoever reads it finds the old one or the new one, whole.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from blip3o.config import Blip3oConfig
from blip3o.model import Blip3o
from blip3o.processor import Processor

MANIFEST = "manifest.json"


class CorruptModel(ValueError):
    """A model folder's file is missing, unreadable or not what its manifest says."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_folder(staged: Path, folder: Path) -> None:
    """Write the manifest of `staged`, flush its files to disk, and rename it to `folder`, replacing what is there."""
    files = sorted(path for path in staged.iterdir() if path.is_file())
    (staged / MANIFEST).write_text(json.dumps({path.name: sha256(path) for path in files}, indent=2) + "\n")
    for path in staged.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def staging(folder: Path) -> Path:
    """A new, empty folder beside `folder`, to be filled and then given to `commit_folder`."""
    staged = folder.with_name(folder.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def check_folder(folder: Path) -> None:
    """Raise FileNotFoundError or CorruptModel unless every file of the manifest is there with its sum."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and (old / MANIFEST).exists():
        old.rename(folder)  # a writer was killed between its two renames
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise CorruptModel(f"{folder} is no model folder: it has no {MANIFEST}")
    try:
        sums = json.loads(manifest.read_text())
    except ValueError:
        raise CorruptModel(f"{manifest} is not readable JSON") from None
    if not isinstance(sums, dict):
        raise CorruptModel(f"{manifest} must map file names to SHA-256 sums")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise CorruptModel(f"{path} is missing")
        if sha256(path) != expected:
            raise CorruptModel(f"{path} is corrupt: its SHA-256 sum is not the manifest's")


def save_pretrained(model: Blip3o, processor: Processor, folder: Path) -> None:
    """Write the model to `folder`, whole or not at all. Weights keep their dtype."""
    staged = staging(folder)
    (staged / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    processor.save(staged / "tokenizer.json")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, staged / "model.safetensors")
    commit_folder(staged, folder)


def from_pretrained(folder: Path) -> tuple[Blip3o, Processor]:
    """Read what `save_pretrained` wrote: the model, in eval mode, and its processor.

    Raises FileNotFoundError for a missing folder, CorruptModel for a file that is not what was written, and ValueError
    for a configuration that this version does not know.
    """
    check_folder(folder)
    config = Blip3oConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = Blip3o(config)
    load_weights(model, folder / "model.safetensors")
    return model.eval(), Processor.load(folder / "tokenizer.json")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`; every missing, unexpected or misshapen tensor is an error by name."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path} is not a readable safetensors file: {error}") from None
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise CorruptModel(f"{path} does not fit the model: " + "; ".join(sorted(problems)))
    with torch.no_grad():
        model.load_state_dict(tensors)
