"""The stages that read shards. A batch is a function of (seed, step, rows): position step * batch_size + row of the run
says which sample comes, which noise is drawn and what is dropped.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from blip3o import regression
from blip3o.data import scenes
from blip3o.data.features import Features
from blip3o.data.llava import read_turns
from blip3o.data.loading import Loader
from blip3o.data.packing import pack
from blip3o.data.shards import Sample, Shards
from blip3o.data.tar import Fault
from blip3o.data.text import IGNORE
from blip3o.flow import TIMESTEPS, positioned_loss
from blip3o.kl_autoencoder import KlAutoencoder
from blip3o.layers import linear_cross_entropy
from blip3o.llm import scatter_features
from blip3o.model import Blip3o
from blip3o.processor import Processor, square
from blip3o.qwen_processor import QwenProcessor
from blip3o.train.batch import Batch, summed
from blip3o.train.feature_cache import cache_features
from blip3o.train.framing import Dialogue, framing
from blip3o.train.recipe_shards import (
    CaptionSource,
    ShardGenerationRecipe,
    ShardsRecipe,
    ShardUnderstandingRecipe,
    Source,
)
from blip3o.train.stages import prompt_context

DROPS = 192  # the stream of `scenes.uniform` that says which conditions are dropped
Report = Callable[[Fault], None]
Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Drawing:
    """A sample to be drawn: its prompt, whether that was cut, and the picture [3, S, S] or its raw features [F, C]."""

    name: str
    ids: list[int]
    cut: bool
    picture: Tensor


@dataclass(frozen=True)
class DrawingBatch(Batch):
    """P prompts, tokens and mask [P, T], and the share of them that was cut; what they show: pictures [P, 3, S, S], or
    raw features [P, F, C] as stored; kept and pooled bool [P]: whose condition, and whose pooled one, is not zeroed;
    positions int64 [B] of the B rows in the run, B / P of each prompt."""

    tokens: Tensor
    mask: Tensor
    cut: float
    pictures: Tensor | None
    features: Tensor | None
    kept: Tensor
    pooled: Tensor
    positions: Tensor


@dataclass(frozen=True)
class DialogueBatch(Batch):
    """Conversations packed into a row of T tokens: tokens and targets [1, T], positions [3, 1, T], cu_seqlens [N + 1].

    Their P pictures in reading order: pictures [P, 3, S, S] or raw features [P, F, C] as stored, or for a model with a
    vision tower patches [., values] of the grids.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    pictures: Tensor | None
    features: Tensor | None
    patches: Tensor | None
    grids: tuple[tuple[int, int, int], ...]


def load(
    recipe: ShardsRecipe,
    data: Sequence[Source],
    needs: tuple[str, ...],
    model: Blip3o,
    prepare: Callable[[Sample], Prepared],
    report: Report | None,
) -> Loader[Prepared]:
    """The samples of a stage's sources, with stored features if the recipe wants them."""
    cache = Path(recipe.cache) if recipe.cache else None
    sources: list[Shards] = []
    stored: dict[str, Sequence[Features]] = {}  # by path: a source may come twice, with other captions
    for source in data:
        captions = {"captions": source.captions} if isinstance(source, CaptionSource) else {}
        shards = Shards(source.path, cache=cache, needs=needs, max_pixels=recipe.max_pixels, **captions)
        if cache is not None and recipe.features != "none":
            if source.path not in stored:
                stored[source.path] = cache_features(shards, model, cache, recipe.features, recipe.threads)
            shards.features = stored[source.path]
        sources.append(shards)
    return Loader(
        sources, [source.weight for source in data], prepare=prepare, seed=recipe.seed, threads=recipe.threads,
        max_faults=recipe.max_faults, report=report,
    )  # fmt: skip


def same_data(place: Path, stage: str, sources: Sequence[Shards]) -> None:
    """Keep the sums of a stage's shards in the JSON file `place`. Raises ValueError if it holds others of that stage:
    the order of samples would be another one, and so would be the run."""
    known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    found = [source.sum for source in sources]
    if stage in known and known[stage] != found:
        changed = [
            str(source.indices[0].shard.parent)
            for source, before in zip_longest(sources, known[stage])
            if source is not None and source.sum != before
        ]
        raise ValueError(
            f"the shards of stage {stage} are not those it began with: {', '.join(changed) or 'some are gone'}; bring "
            f"them back, or train in another folder than {place.parent}"
        )
    if stage not in known:
        staged = place.with_name(f"{place.name}.{os.getpid()}")
        staged.write_text(json.dumps({**known, stage: found}, indent=2) + "\n", encoding="utf-8")
        staged.replace(place)


def learn_only(model: Blip3o, names: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """Freeze all of the model but the parameters whose names are chosen; returns these."""
    learning = {name: parameter for name, parameter in model.named_parameters() if names(name)}
    model.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    return learning


def standardised(model: Blip3o, pictures: Tensor | None, features: Tensor | None) -> Tensor:
    """Standardised features [P, F, C] of pictures or of raw features, whichever are given; without a gradient."""
    with torch.no_grad():
        if features is None:
            assert pictures is not None
            return model.features(pictures)
        return (features.to(model.feature_mean) - model.feature_mean) / model.feature_std


class ShardGenerationStage:
    """The diffusion transformer and the queries learn to draw the pictures of captions; all else is frozen.

    Targets are standardised as the model was left by the stages before: those that are no CLIP features may not be, in
    models that have none; pixels go from -1 to 1 then, and latents are scaled by their autoencoder.
    A prompt is read once for several noises. `condition_drop` of the conditions are zeroed whole, which teaches the
    unconditional velocity that guidance needs.
    """

    name = "generation"

    def __init__(
        self,
        model: Blip3o,
        recipe: ShardGenerationRecipe,
        processor: Processor | QwenProcessor,
        report: Report | None = None,
    ) -> None:
        target = model.config.image_target
        if target != "clip" and recipe.features != "none":
            raise ValueError(
                f"features must be 'none' in generation: {model.config.name!r} draws {target}, not CLIP features; "
                f"got {recipe.features!r}"
            )
        if recipe.autoencoder:
            device = model.llm.output_weight.device
            model.use_autoencoder(KlAutoencoder.from_pretrained(recipe.autoencoder, device=device))
        if target == "vae":
            model.require_autoencoder()
        self.model, self.recipe, self.unit = model, recipe, recipe.draws_per_prompt
        self.framing = framing(processor, model.config, recipe.max_tokens)
        self.learning = learn_only(model, lambda name: name == "queries" or name.startswith("dit."))
        self.loader = load(recipe, recipe.data, ("picture", "text"), model, self._prepare, report)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.learning

    def _prepare(self, sample: Sample) -> Drawing:
        assert sample.text is not None
        ids, cut = self.framing.prompt(sample.text)
        if sample.features is not None:
            return Drawing(sample.name, ids, cut, sample.features)
        assert sample.picture is not None
        return Drawing(sample.name, ids, cut, square(sample.picture, self.model.config.clip.image_size, "center"))

    def batch(self, step: int, rows: range) -> DrawingBatch:
        recipe, draws = self.recipe, self.recipe.draws_per_prompt
        first = step * recipe.batch_size + rows.start
        prompts = range(first // draws, (first + len(rows)) // draws)
        drawings = self.loader.samples(prompts)
        tokens, mask = self.framing.pad([drawing.ids for drawing in drawings])
        dropped = scenes.uniform(recipe.seed, DROPS, torch.arange(prompts.start, prompts.stop), 2)
        seen = torch.stack([drawing.picture for drawing in drawings])
        stored = recipe.features != "none"
        dit = self.model.config.dit
        return DrawingBatch(
            weight=float(len(rows) * dit.grid**2 * dit.in_channels),
            ids=[drawing.name for drawing in drawings],
            tokens=tokens,
            mask=mask,
            cut=sum(drawing.cut for drawing in drawings) / len(drawings),
            pictures=None if stored else seen,
            features=seen if stored else None,
            kept=dropped[:, 0] >= recipe.condition_drop,
            pooled=dropped[:, 1] >= recipe.pooled_drop,
            positions=torch.arange(first, first + len(rows)),
        )

    def loss(self, batch: DrawingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        x = self._targets(batch).repeat_interleave(self.recipe.draws_per_prompt, 0)
        context = prompt_context(model, batch.tokens, batch.mask, None, batch.kept, batch.pooled)

        def predict(noisy: Tensor, level: Tensor) -> Tensor:
            return model.dit(noisy, level * TIMESTEPS, context)

        if model.config.objective == "mse":
            loss = regression.training_loss(predict, x)
        else:
            loss = positioned_loss(model.config.flow, predict, x, batch.positions, self.recipe.seed)
        return summed(loss, batch.weight), {"cut": x.new_tensor(batch.cut * batch.weight)}

    def _targets(self, batch: DrawingBatch) -> Tensor:
        """[P, N, V], without a gradient."""
        if batch.pictures is None:
            return standardised(self.model, None, batch.features)
        with torch.no_grad():
            return self.model.targets(batch.pictures)

    def finish(self) -> None:
        self.loader.close()


class ShardUnderstandingStage:
    """The language model learns the answers of conversations, with pictures or without; what reads CLIP features learns
    with it, a vision tower is frozen."""

    name = "understanding"
    unit = 1

    def __init__(
        self,
        model: Blip3o,
        recipe: ShardUnderstandingRecipe,
        processor: Processor | QwenProcessor,
        report: Report | None = None,
    ) -> None:
        if model.vision is not None and recipe.features != "none":
            raise ValueError(
                f"features must be 'none' in understanding: model {model.config.name!r} reads pictures by its vision "
                f"tower, not as CLIP features; got {recipe.features!r}"
            )
        self.model, self.recipe = model, recipe
        self.framing = framing(processor, model.config, recipe.max_tokens)
        self.learning = learn_only(model, lambda name: name.startswith(("llm.", "image_projector.")))
        self.loader = load(recipe, recipe.data, ("json",), model, self._prepare, report)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.learning

    def _prepare(self, sample: Sample) -> tuple[str, Dialogue, Tensor | None]:
        turns = read_turns(sample.json, pictured=sample.picture is not None or sample.features is not None)
        dialogue = self.framing.dialogue(turns, sample.picture, sample.features is not None)
        return sample.name, dialogue, sample.features

    def batch(self, step: int, rows: range) -> DialogueBatch:
        first = step * self.recipe.batch_size
        samples = self.loader.samples(range(first + rows.start, first + rows.stop))
        dialogues = [dialogue for _, dialogue, _ in samples]
        packed = pack([dialogue.row for dialogue in dialogues], self.recipe.pack, self.model.config.pad_token)
        seen = [dialogue.seen for dialogue in dialogues if dialogue.seen is not None]
        features = [stored for _, _, stored in samples if stored is not None]
        reads_patches = self.model.vision is not None
        return DialogueBatch(
            weight=float((packed.targets != IGNORE).sum()),
            ids=[name for name, _, _ in samples],
            tokens=packed.ids,
            targets=packed.targets,
            positions=packed.positions,
            cu_seqlens=packed.cu_seqlens,
            pictures=torch.stack(seen) if seen and not reads_patches else None,
            features=torch.stack(features) if features else None,
            patches=torch.cat(seen) if seen and reads_patches else None,
            grids=tuple(dialogue.grid for dialogue in dialogues if dialogue.grid is not None),
        )

    def loss(self, batch: DialogueBatch) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        asked = (batch.targets != IGNORE).flatten().nonzero().squeeze(1)
        hidden = model.llm(self._embed(batch), batch.positions, asked=asked, sequences=batch.cu_seqlens)
        loss = linear_cross_entropy(hidden, model.llm.output_weight, batch.targets.flatten()[asked])
        return summed(loss, batch.weight), {}

    def _embed(self, batch: DialogueBatch) -> Tensor:
        model = self.model
        if batch.patches is not None:
            assert model.vision is not None
            with torch.no_grad():
                tokens = model.vision(batch.patches.to(model.llm.output_weight.dtype), batch.grids)
            return scatter_features(model.llm.embed(batch.tokens), batch.tokens, model.config.image_token, tokens)
        if batch.pictures is None and batch.features is None:
            return model.embed(batch.tokens)
        return model.embed(batch.tokens, standardised(model, batch.pictures, batch.features))

    def finish(self) -> None:
        self.loader.close()
