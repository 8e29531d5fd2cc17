"""The four stages: what each one trains, on which batch, with which loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o import regression
from blip3o.data import scenes, text
from blip3o.dit import Context
from blip3o.flow import TIMESTEPS, draw_sigma, training_loss
from blip3o.layers import linear_cross_entropy
from blip3o.model import Blip3o
from blip3o.train.batch import Batch, summed
from blip3o.train.recipe import ClipRecipe, DecoderRecipe, GenerationRecipe, Recipe, UnderstandingRecipe

CHUNK = 512  # pictures rendered and encoded at a time
# Understanding's steps in turn: whether it is about pictures (else captions), and whether to describe (else to answer).
PATTERN = (
    (True, True), (True, False), (False, False), (False, True),
    (True, True), (True, False), (True, False), (False, False),
)  # fmt: skip
# Looking one thing up comes before counting and comparing: what to ask in the first steps, by question type.
FIRST = (0.3, 0.3, 0.05, 0.05, 0.0, 0.2, 0.1, 0.0)
FIRST_SHARE = 0.2
NONCE = 0.5  # share of the conversations about captions in which some colours and shapes go by nonce words
STATISTICS = 4096  # pictures behind the features' mean and deviation


class FeatureBank:
    """`count` pictures of the world and what the frozen CLIP tower sees in them: computed once, used at every step.

    scenes    those of indices 0..count-1, as `sample` draws them
    features  [count, F, C] float32, standardised per channel
    """

    def __init__(
        self, model: Blip3o, seed: int, count: int, sample: Callable[[int, Tensor], scenes.Scenes] = scenes.sample
    ) -> None:
        self.model, self.count = model, count
        self.name = "scene" if sample is scenes.sample else "unnamed scene"
        self.scenes = sample(seed, torch.arange(count))
        self.features = torch.empty(count, model.config.feature_grid**2, model.config.clip.width)
        with torch.inference_mode():
            for start in range(0, count, CHUNK):
                chosen = torch.arange(start, min(start + CHUNK, count))
                pictures = scenes.render(self.scenes[chosen])
                self.features[chosen] = model.features(pictures)

    def targets(self, index: Tensor) -> Tensor:
        """What the diffusion transformer makes of the pictures `index` [B]: standardised targets [B, N, V]."""
        if self.model.config.image_target == "clip":
            return self.features[index]
        with torch.no_grad():
            return self.model.targets(scenes.render(self.scenes[index]))


def set_target_statistics(model: Blip3o, seed: int) -> None:
    """From here on targets that are no CLIP features are standardised, by the statistics of STATISTICS pictures."""
    with torch.no_grad():
        shown = (scenes.render(scenes.sample(seed, chosen)) for chosen in torch.arange(STATISTICS).split(CHUNK))
        parts = [model.targets(pictures) for pictures in shown]
    model.set_target_statistics(torch.cat(parts))


def step_generator(recipe: Recipe, step: int) -> torch.Generator:
    """The step's own random stream: a function of (seed, step)."""
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)


@dataclass(frozen=True)
class ClipBatch(Batch):
    """pictures [B, 3, S, S] in 0..1, their captions tokens [B, T]."""

    pictures: Tensor
    tokens: Tensor


class ClipStage:
    """Contrastive image-text learning, with a linear head that must also redraw the picture from the pooled features.

    The contrast makes the features mean something, the head keeps what a contrast may forget: exact places and sizes.
    Equal captions in a batch share the target mass.
    """

    name = "clip"

    def __init__(self, model: Blip3o, recipe: ClipRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.unit = recipe.batch_size  # each caption is compared with every picture
        grid, side = model.config.feature_grid, model.config.clip.image_size
        self.cell = side // grid
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.pixel_head = nn.Linear(model.config.clip.width, 3 * self.cell**2)

    def trainable(self) -> dict[str, nn.Parameter]:
        parameters = {f"clip.{name}": parameter for name, parameter in self.model.clip.named_parameters()}
        return parameters | {f"pixel_head.{name}": parameter for name, parameter in self.pixel_head.named_parameters()}

    def batch(self, step: int, rows: range) -> ClipBatch:
        index = step * self.recipe.batch_size + torch.arange(rows.start, rows.stop)
        batch = scenes.sample(self.recipe.seed, index)
        texts = text.captions(batch, self.recipe.seed, index)
        return ClipBatch(1.0, [f"scene {i}" for i in index.tolist()], scenes.render(batch), texts.ids)

    def loss(self, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, ids = batch.pictures, batch.tokens
        clip = self.model.clip
        tokens = clip.vision(self.model.normalize(pictures))
        image = clip.image_embedding(tokens)
        caption = clip.text_embedding(ids, ids != text.PAD)
        logits = clip.logit_scale.exp().clamp(max=100.0) * image @ caption.T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(-1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        grid = self.model.config.feature_grid
        pooled = self.model.pool(tokens)
        cells = pictures.unfold(2, self.cell, self.cell).unfold(3, self.cell, self.cell)  # [B, 3, g, g, cell, cell]
        cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(len(ids), grid * grid, -1)
        pixels = F.mse_loss(self.pixel_head(pooled), (cells - 0.5) * 2)
        accuracy = (logits.argmax(-1) == torch.arange(len(ids), device=ids.device)).float().mean()
        logged = {"contrast": contrast.detach(), "pixels": pixels.detach(), "accuracy": accuracy}
        return summed(contrast + 10.0 * pixels, batch.weight), logged

    def finish(self) -> None:
        """From here on features are standardised, by the statistics of STATISTICS pictures."""
        bank = FeatureBank(self.model, self.recipe.seed, STATISTICS)
        self.model.set_feature_statistics(bank.features)
        if self.model.config.image_target == "pixels":
            set_target_statistics(self.model, self.recipe.seed)


def understanding_loss(model: Blip3o, ids: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
    """Cross entropy of the tokens that `targets` [B, T] asks for, after `ids` [B, T] with `features` [B, F, C] if any.

    Only the hidden states of those tokens are computed to the end, and meet the output layer.
    """
    asked = targets != text.IGNORE
    return linear_cross_entropy(model.read(ids, features, asked), model.llm.output_weight, targets[asked])


@dataclass(frozen=True)
class UnderstandingBatch(Batch):
    """tokens and targets [B, T], and what the pictures show, features [B, F, C]; None for texts about captions."""

    tokens: Tensor
    targets: Tensor
    features: Tensor | None


class UnderstandingStage:
    """The language model answers questions about pictures, read as CLIP features, and about captions, read as text."""

    name = "understanding"
    unit = 1

    def __init__(self, model: Blip3o, recipe: UnderstandingRecipe, bank: FeatureBank) -> None:
        self.model, self.recipe, self.bank = model, recipe, bank

    def trainable(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.startswith(("llm.", "image_projector."))
        }

    def batch(self, step: int, rows: range) -> UnderstandingBatch:
        """One kind of conversation a step, in the order of PATTERN.

        What is asked of a picture can be asked of a text. Descriptions teach most of what a question needs, at every
        word: they name objects in any order, so after "a small red" the shape must be looked up, and then the place.
        """
        pictures, describe = PATTERN[step % len(PATTERN)]
        size = self.recipe.batch_size * (self.recipe.turns if describe else 1)
        number = step * self.recipe.batch_size * self.recipe.turns + torch.arange(size)  # of each conversation
        index = torch.randint(self.bank.count, (size,), generator=step_generator(self.recipe, step))
        batch = text.conversations(
            self.bank.scenes[index],
            self.recipe.seed,
            number,
            1 if describe else self.recipe.turns,
            image=pictures,
            describe=float(describe),
            nonce=NONCE,
            weights=torch.tensor(FIRST) if step < FIRST_SHARE * self.recipe.steps else None,
        )
        each = size // self.recipe.batch_size  # conversations of a row
        own = slice(rows.start * each, rows.stop * each)
        targets = batch.targets[own]
        return UnderstandingBatch(
            float((targets != text.IGNORE).sum()),
            [
                f"conversation {i} about scene {j}"
                for i, j in zip(number[own].tolist(), index[own].tolist(), strict=True)
            ],
            batch.ids[own],
            targets,
            self.bank.features[index[own]] if pictures else None,
        )

    def loss(self, batch: UnderstandingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return summed(understanding_loss(self.model, batch.tokens, batch.targets, batch.features), batch.weight), {}

    def finish(self) -> None:
        pass


def prompt_context(
    model: Blip3o, ids: Tensor, mask: Tensor, seen: Tensor | None, kept: Tensor, pooled: Tensor
) -> Context:
    """What the diffusion transformer needs of P prompts, ids and mask [P, T].

    seen [., F, C]: what the pictures among the prompts show. kept, pooled bool [P]: whose condition, and whose pooled
    condition, is not zeroed.
    """
    condition = model.condition(ids, mask, seen)  # [P, Q, W]
    context = model.dit.context(model.dit.project(condition * kept[:, None, None]))
    return replace(context, pooled=context.pooled * pooled[:, None])


def generation_loss(
    model: Blip3o, ids: Tensor, mask: Tensor, seen: Tensor | None, kept: Tensor, pooled: Tensor, x: Tensor,
    noise: Tensor, sigma: Tensor,
) -> Tensor:  # fmt: skip
    """The flow's loss of features x [B, F, C] at noise levels sigma [B], drawn from P prompts; see `prompt_context`.

    B is a multiple of P: B / P rows that follow each other share their prompt's pass of the language model and its keys
    and values.
    """
    context = prompt_context(model, ids, mask, seen, kept, pooled)

    def predict(noisy: Tensor, level: Tensor) -> Tensor:
        return model.dit(noisy, level * TIMESTEPS, context)

    if model.config.objective == "mse":
        return regression.training_loss(predict, x)
    return training_loss(model.config.flow, predict, x, noise, sigma)


@dataclass(frozen=True)
class GenerationBatch(Batch):
    """P prompts, tokens and mask [P, T], of which the last may be pictures, seen [., F, C]; whether their condition is
    kept, and the pooled one, bool [P]; x and noise [B, F, C] at noise levels sigma [B], B / P of each prompt."""

    tokens: Tensor
    mask: Tensor
    seen: Tensor | None
    kept: Tensor
    pooled: Tensor
    x: Tensor
    noise: Tensor
    sigma: Tensor


class GenerationStage:
    """The diffusion transformer and the queries learn to draw features from prompts; the language model is frozen.

    A prompt is read once for several noises. `condition_drop` of the conditions are zeroed, which teaches the
    unconditional velocity that guidance needs. `unnamed` of the prompts are no captions but pictures, to be drawn once
    more; their objects have colours without a name, so colour and shape come in all combinations. What reads those
    pictures, the projector, is frozen like the language model.
    """

    name = "generation"

    def __init__(self, model: Blip3o, recipe: GenerationRecipe, bank: FeatureBank, unnamed: FeatureBank | None) -> None:
        self.model, self.recipe, self.bank, self.unnamed = model, recipe, bank, unnamed
        self.unit = recipe.draws_per_prompt
        model.llm.requires_grad_(False)
        if model.image_projector is not None:
            model.image_projector.requires_grad_(False)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name == "queries" or name.startswith("dit.")
        }

    def batch(self, step: int, rows: range) -> GenerationBatch:
        recipe, draws = self.recipe, self.recipe.draws_per_prompt
        generator = step_generator(recipe, step)
        prompts = recipe.batch_size // draws
        shown = 0 if self.unnamed is None else recipe.unnamed_of(prompts)
        told = prompts - shown
        index = torch.randint(self.bank.count, (told,), generator=generator)
        said = text.captions(self.bank.scenes[index], recipe.seed, step * told + torch.arange(told))
        ids, mask = text.drawing_prompts(said)
        x, seen = self.bank.targets(index), self.bank.features[:0]
        names = [f"{self.bank.name} {i}" for i in index.tolist()]
        if self.unnamed is not None and shown:
            index = torch.randint(self.unnamed.count, (shown,), generator=generator)
            seen = self.unnamed.features[index]
            names += [f"{self.unnamed.name} {i}" for i in index.tolist()]
            x = torch.cat([x, self.unnamed.targets(index)])
            ids, mask = text.join((ids, mask), text.left_pad([text.picture_prompt(seen.shape[1])] * shown))
        kept = torch.rand(prompts, generator=generator) >= recipe.condition_drop
        pooled = torch.rand(prompts, generator=generator) >= recipe.pooled_drop
        x = x.repeat_interleave(draws, 0)
        noise = torch.randn(x.shape, generator=generator)
        sigma = draw_sigma(self.model.config.flow, len(x), generator)
        own, first, last = slice(rows.start, rows.stop), rows.start // draws, rows.stop // draws  # rows, prompts
        seen = seen[max(0, first - told) : max(0, last - told)]
        return GenerationBatch(
            float(x[own].numel()),
            names[first:last],
            ids[first:last],
            mask[first:last],
            seen if len(seen) else None,
            kept[first:last],
            pooled[first:last],
            x[own],
            noise[own],
            sigma[own],
        )

    def loss(self, batch: GenerationBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = generation_loss(
            self.model, batch.tokens, batch.mask, batch.seen, batch.kept, batch.pooled, batch.x, batch.noise,
            batch.sigma,
        )  # fmt: skip
        return summed(loss, batch.weight), {}

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class DecoderBatch(Batch):
    """pictures [B, 3, S, S] in -1..1 and their noise, at noise levels sigma [B]; the features [B, F, C] they show."""

    pictures: Tensor
    noise: Tensor
    sigma: Tensor
    features: Tensor


class DecoderStage:
    """The visual decoder learns to turn features into pixels.

    `unnamed` of the batch shows colours without a name: or it would learn pairs of colour and shape, not the two.
    """

    name = "decoder"
    unit = 1

    def __init__(self, model: Blip3o, recipe: DecoderRecipe, bank: FeatureBank, unnamed: FeatureBank | None) -> None:
        if model.decoder is None:
            raise ValueError(f"preset {model.config.name!r} has no visual decoder of its own to train")
        self.model, self.decoder, self.recipe = model, model.decoder, recipe
        count = 0 if unnamed is None else recipe.unnamed_of(recipe.batch_size)
        self.banks = [(bank, recipe.batch_size - count)]  # and how much of a batch comes from each
        if unnamed is not None and count:
            self.banks.append((unnamed, count))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"decoder.{name}": parameter for name, parameter in self.decoder.named_parameters()}

    def batch(self, step: int, rows: range) -> DecoderBatch:
        recipe, decoder = self.recipe, self.decoder
        generator = step_generator(recipe, step)
        drawn = [(bank, torch.randint(bank.count, (count,), generator=generator)) for bank, count in self.banks]
        pictures = torch.cat([scenes.render(bank.scenes[index]) for bank, index in drawn]) * 2 - 1
        features = torch.cat([bank.features[index] for bank, index in drawn])
        features = features + recipe.feature_noise * torch.randn(features.shape, generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        sigma = draw_sigma(decoder.config.flow, len(pictures), generator)
        own = slice(rows.start, rows.stop)
        names = [f"{bank.name} {i}" for bank, index in drawn for i in index.tolist()]
        return DecoderBatch(
            float(pictures[own].numel()), names[own], pictures[own], noise[own], sigma[own], features[own]
        )

    def loss(self, batch: DecoderBatch) -> tuple[Tensor, dict[str, Tensor]]:
        def predict(noisy: Tensor, level: Tensor) -> Tensor:
            return self.decoder(noisy, level * TIMESTEPS, batch.features)

        loss = training_loss(self.decoder.config.flow, predict, batch.pictures, batch.noise, batch.sigma)
        return summed(loss, batch.weight), {}

    def finish(self) -> None:
        pass
