"""The weights that a run begins with: those of a model folder in our layout or the released one, or of a hub id.

Or of Qwen2.5-VL's own folder, as the released models began: the CLIP tower has then its own file, and the queries and
the diffusion transformer are new.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blip3o.config import Blip3oConfig, from_dict, to_dict
from blip3o.model import Blip3o
from blip3o.processor import Processor
from blip3o.qwen_processor import QwenProcessor
from blip3o.weights import CONFIG, MANIFEST, TOKENIZER, CorruptModel, check_folder, local_folder, weight_files
from blip3o.weights_config import is_qwen, is_released, read_config, read_qwen
from blip3o.weights_files import SkippedTensors, TensorFiles, check_fit, fill, grouped, one_dtype, read_json
from blip3o.weights_names import EVA, OUTPUT, VAE, Part, released_parts
from blip3o.weights_qwen import BY_WORD, Words
from blip3o.weights_released import check_tied, old_names

LEARNED_FIRST = ("queries", "dit.")  # by the first stage of generation: may be missing, together
OF_THE_DIT = ("image_target", "objective", "dit", "flow")  # what a configuration says about these
SAMPLE = 1 << 20  # bytes


@dataclass(frozen=True)
class InitialWeights:
    """place   a model folder
    tower   the CLIP tower's own safetensors file, in the place of what a released checkpoint holds; None: that, which
            Qwen2.5-VL's own folder does not have"""

    place: Path
    tower: Path | None

    def identity(self) -> str:
        """SHA-256 of what tells these weights from others, without reading all of them: the manifest or, where there is
        none, config.json, the index, and the size and both ends of each file of weights."""
        own = [MANIFEST] if (self.place / MANIFEST).exists() else [CONFIG, *weight_files(self.place)]
        digest = hashlib.sha256()
        for path in [*(self.place / name for name in own), *([self.tower] if self.tower else [])]:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{'tower' if path == self.tower else path.name} {size}\n".encode())
                for start in (0, max(0, size - SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(SAMPLE))
        return digest.hexdigest()

    def processor(self, config: Blip3oConfig) -> Processor | QwenProcessor:
        """What the folder's tokenizer is for a model of `config`; Qwen2.5-VL's own gets the words that it lacks.

        Raises FileNotFoundError, ValueError.
        """
        if config.vision is not None:
            return QwenProcessor.from_pretrained(self.place, config, complete=is_qwen(read_json(self.place / CONFIG)))
        return Processor.load(self.place / TOKENIZER, config.clip.image_size)

    def read(self, model: Blip3o) -> list[str]:
        """Give the model these weights, in float32, one tensor after the other.

        Returns the names of the tensors that stay as they are, as the files have none: those of the diffusion
        transformer and the queries, or none. After Qwen2.5-VL's own folder also names for the rows of new words, which
        are the mean of the others: see `Words.fill`. Raises CorruptModel for files that are not what was written; its
        WrongTensors names tensors that are missing, too many or of another size; ValueError for a configuration that
        is another than the model's.
        """
        place, values = self.place, read_json(self.place / CONFIG)
        released = is_released(values)
        if self.tower is not None and not released:
            raise ValueError(f"clip_weights must be left out where weights are of our layout, got {self.tower}")
        if not released or (place / MANIFEST).exists():
            place = check_folder(place, CONFIG, *weight_files(place))
            values = read_json(place / CONFIG)  # again: of the files that were checked
        words = None
        if is_qwen(values):
            llm, vision = read_qwen(values, place)
            llm = replace(llm, vocab_size=model.config.llm.vocab_size)  # of which `words` takes care
            _check_config(place, {"llm": to_dict(llm), "vision": to_dict(vision)}, model.config)
            words = Words.of(place, values, model.config)
        with TensorFiles(place) as files:
            if self.tower is not None:
                files.put(self.tower, EVA)
            names = old_names(files) if released else {name: name for name in files.entries}
            parts = released_parts(model.config, True) if released else _own_parts(model)
            learned_first = [name for name in model.state_dict() if name.startswith(LEARNED_FIRST)]
            held = any(part.name in names for name in learned_first for part in parts[name])
            fresh = learned_first if words or not held else []
            known = {part.name: part.shape for some in parts.values() for part in some}  # also what is fresh
            kept = {name: some for name, some in parts.items() if name not in fresh}
            skipped = [name for name in names if released and name.startswith(VAE)]
            if released and model.config.llm.tie_embeddings and OUTPUT in names:
                check_tied(files, names)
                skipped.append(OUTPUT)
            entries = {name: files.entries[own] for name, own in names.items() if name not in skipped}
            expected = {part.name: part.shape for some in kept.values() for part in some}
            check_fit(place, expected | words.shapes(model.config) if words else expected, entries)
            if words is None:
                config = read_config(values, known, place) if released else _own_config(values, place)
                theirs = to_dict(replace(config, name=model.config.name))
                _check_config(place, theirs, model.config, ignored=OF_THE_DIT if fresh else ())
            sources = {name: [names[part.name] for part in some] for name, some in kept.items()}
            one_dtype(files, [name for some in sources.values() for name in some], torch.float32)
            if words is not None:
                fresh = fresh + words.fill(model, files, names)
                sources = {name: some for name, some in sources.items() if name not in BY_WORD}
            fill(model, files, sources, torch.float32, model.queries.device)
        if skipped:
            warnings.warn(f"{place}: skipped {', '.join(grouped(skipped))}", SkippedTensors, stacklevel=2)
        return fresh


def find_weights(weights: str, clip_weights: str, run: Path) -> InitialWeights:
    """Where a recipe's weights are. FileNotFoundError, which names the key, where nothing is; ValueError for the model
    of the folder `run` itself, and for Qwen2.5-VL's own folder without a CLIP tower."""
    place, tower = local_folder(weights), Path(clip_weights) if clip_weights else None
    if not place.is_dir():
        raise FileNotFoundError(f"weights must be a model folder or a hub id: there is no folder {weights}")
    if not (place / CONFIG).exists():
        raise CorruptModel(f"weights must be a model folder: {place / CONFIG} is missing")
    if tower is not None and not tower.is_file():
        raise FileNotFoundError(f"clip_weights must be a safetensors file: there is no file {tower}")
    if place.resolve() in ((run / name).resolve() for name in ("model", "model.old")):
        raise ValueError(f"weights must not be the model of the run itself, which it writes: got {weights}")
    if tower is None and is_qwen(read_json(place / CONFIG)):
        raise ValueError(
            f"clip_weights must name the CLIP tower's safetensors file: weights are Qwen2.5-VL's, which have none, in "
            f"{weights}"
        )
    return InitialWeights(place, tower)


def _own_parts(model: Blip3o) -> dict[str, list[Part]]:
    return {name: [Part(name, tuple(tensor.shape))] for name, tensor in model.state_dict().items()}


def _own_config(values: Mapping[str, Any], place: Path) -> Blip3oConfig:
    try:
        return from_dict(Blip3oConfig, values)
    except ValueError as error:
        raise CorruptModel(f"{place}: {error}") from None


def _check_config(
    place: Path, theirs: Mapping[str, Any], expected: Blip3oConfig, ignored: tuple[str, ...] = ()
) -> None:
    """What the tensors' shapes do not tell must be the preset's too: numbers of heads, places of rotary positions."""
    ours = to_dict(expected)
    changes = [
        f"{key}: {theirs[key]}, expected {ours[key]}"
        for key in theirs
        if key not in ignored and theirs[key] != ours[key]
    ]
    if changes:
        raise ValueError(f"weights must be of the recipe's model {expected.name!r}, {place} has {'; '.join(changes)}")
