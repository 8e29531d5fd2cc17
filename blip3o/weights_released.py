"""Released checkpoints: tensors under the official names, made into a model and back."""

import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o.model import Blip3o
from blip3o.weights_config import read_config, write_config
from blip3o.weights_files import (
    DTYPES,
    CorruptModel,
    SkippedTensors,
    TensorFiles,
    check_fit,
    fill,
    grouped,
    one_dtype,
)
from blip3o.weights_names import EMBEDDING, EVA, OUTPUT, TOWER, old_name, released_parts


def read_released(
    place: Path,
    values: Mapping[str, Any],
    *,
    tower: bool | str | Path,
    skip: tuple[str, ...],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Blip3o:
    """A released checkpoint's model, in eval mode; a warning tells the names of tensors that were skipped.

    values   config.json's content
    tower    use the CLIP tower's tensors; without them, or where there are none, the model cannot look through it.
             Or a safetensors file of the tower alone, to be used instead
    skip     prefixes of tensors that are no part of the model
    dtype    of the weights; None: as they are stored
    Raises CorruptModel, or its WrongTensors, which has every missing and unexpected name.
    """
    with TensorFiles(place) as files:
        if not isinstance(tower, bool):
            files.put(Path(tower), EVA)
        actual = old_names(files)
        shapes = {name: files.entries[held].shape for name, held in actual.items()}
        config = read_config(values, shapes, place)
        wanted = bool(tower) and any(name.startswith(TOWER) for name in shapes)
        left = skip if wanted else (*skip, TOWER)
        skipped = sorted(held for name, held in actual.items() if name.startswith(left))
        parts = released_parts(config, wanted)
        if config.llm.tie_embeddings and OUTPUT in actual:
            check_tied(files, actual)
            skipped.append(actual[OUTPUT])
        expected = {part.name: part.shape for some in parts.values() for part in some}
        check_fit(place, expected, {name: files.entries[held] for name, held in actual.items() if held not in skipped})
        sources = {name: [actual[part.name] for part in some] for name, some in parts.items()}
        dtype = one_dtype(files, [name for some in sources.values() for name in some], dtype)
        with torch.device("meta"):
            model = Blip3o(config)
        if not wanted:
            model.drop_clip("the checkpoint's CLIP tower was not loaded")
        fill(model, files, sources, dtype, torch.device(device))
    model.feature_mean = torch.zeros(config.clip.width, dtype=dtype, device=device)
    model.feature_std = torch.ones(config.clip.width, dtype=dtype, device=device)
    if skipped:
        warnings.warn(f"{place}: skipped {', '.join(grouped(skipped))}", SkippedTensors, stacklevel=4)
    return model.eval()


def old_names(files: TensorFiles) -> dict[str, str]:
    """Names as transformers 4.51 writes them -> names in the files."""
    actual: dict[str, str] = {}
    for name in files.entries:
        old = old_name(name)
        if old in actual:
            raise CorruptModel(f"{files.place} holds one tensor under two names, {actual[old]} and {name}")
        actual[old] = name
    return actual


def check_tied(files: TensorFiles, actual: Mapping[str, str]) -> None:
    """An output layer that is stored although config.json ties it must be the embedding."""
    if EMBEDDING not in actual:
        return  # which is told as missing
    names = [actual[OUTPUT], actual[EMBEDDING]]
    one_dtype(files, names, torch.float32)  # refuses dtypes that no weights have
    dtype = torch.promote_types(*(DTYPES[files.entries[name].dtype] for name in names))
    copies = [torch.empty(files.entries[name].shape, dtype=dtype) for name in names]
    for name, copy in zip(names, copies, strict=True):
        files.copy(name, copy)
    if not torch.equal(*copies):
        raise CorruptModel(
            f"{files.place}: {actual[OUTPUT]} is not {actual[EMBEDDING]}, but config.json has tie_word_embeddings true"
        )


def released_files(model: Blip3o, place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json's content and the tensors, under the released names, of a model to be written to `place`.

    Raises ValueError for a model that the released layout cannot hold: reading it back must give the same one.
    `place` holds the tokenizer already, if there is one.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    values = write_config(model.config, model.llm.output_weight.dtype, model.has_clip)
    parts = released_parts(model.config, model.has_clip)
    mean, std = state.pop("feature_mean"), state.pop("feature_std")
    if bool((mean != 0).any()) or bool((std != 1).any()):
        raise ValueError("the released layout has no feature statistics: feature_mean must be 0 and feature_std 1")
    extra = sorted(state.keys() - parts.keys())
    if extra:
        raise ValueError(f"the released layout has no names for {', '.join(grouped(extra))}")
    tensors: dict[str, Tensor] = {}
    for name, some in parts.items():
        rows = state[name].flatten().split([torch.Size(part.shape).numel() for part in some])
        tensors.update({part.name: row.view(part.shape) for part, row in zip(some, rows, strict=True)})
    try:
        back = read_config(values, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, place)
    except CorruptModel as error:
        raise ValueError(f"the released layout cannot hold this model with these files beside it: {error}") from None
    changed = list(_differences(replace(back, name=model.config.name), model.config, ""))
    if not model.has_clip:  # the shape of a tower that is not there has no place in the files
        changed = [line for line in changed if not line.startswith("clip.")]
    if changed:
        raise ValueError(f"the released layout cannot hold this configuration: {', '.join(changed)}")
    return values, tensors


def _differences(back: Any, own: Any, where: str) -> Any:
    for field in fields(own):
        mine, other, path = getattr(own, field.name), getattr(back, field.name), f"{where}{field.name}"
        if is_dataclass(mine) and is_dataclass(other):
            yield from _differences(other, mine, f"{path}.")
        elif mine != other:
            yield f"{path} is {mine}, and would be read as {other}"
