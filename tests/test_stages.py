"""The stages one by one: their feature banks, their batches, and what is read and aimed at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip3o.data import scenes, text
from blip3o.data.words import NONCE_COLORS, NONCE_SHAPES
from blip3o.dit import Context
from blip3o.evaluate.judge import detect
from blip3o.model import Blip3o
from blip3o.train import stages
from blip3o.train.batch import Stage
from blip3o.train.recipe import STAGES, Recipe
from blip3o.train.run import Run


def stage(name: str, model: Blip3o, recipe: Recipe) -> Stage:
    """A stage on banks of 32 pictures."""
    if name == "clip":
        return stages.ClipStage(model, recipe)
    banks = [stages.FeatureBank(model, 7, 32, draw) for draw in (scenes.sample, scenes.sample_unnamed)]
    if name == "understanding":
        return stages.UnderstandingStage(model, recipe, banks[0])
    return {"generation": stages.GenerationStage, "decoder": stages.DecoderStage}[name](model, recipe, *banks)


def loss(chosen: Stage, step: int) -> float:
    """Of the whole batch of a step, summed."""
    return chosen.loss(chosen.batch(step, range(chosen.recipe.batch_size)))[0].item()


def test_the_features_of_a_trained_clip_are_standardised(tiny: dict[str, Recipe], snapshots: Path) -> None:
    run = Run(snapshots / "clip", "tiny")
    features = stages.FeatureBank(run.model, tiny["clip"].seed, stages.STATISTICS).features.flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(features.shape[1]), atol=1e-2, rtol=0)
    assert not bool((run.model.feature_std == 1).all())


def test_a_bank_does_not_depend_on_its_chunks(
    tiny: dict[str, Recipe], lively: Blip3o, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stages.FeatureBank(lively, 7, 50)
    monkeypatch.setattr(stages, "CHUNK", 16)
    torch.testing.assert_close(stages.FeatureBank(lively, 7, 50).features, whole.features, atol=1e-5, rtol=1e-5)
    assert not whole.features.requires_grad and not whole.features.is_inference()


@pytest.mark.parametrize("name", STAGES)
def test_a_step_is_a_function_of_its_number(tiny: dict[str, Recipe], lively: Blip3o, name: str) -> None:
    """Whatever was drawn before, from this generator or torch's own."""

    def built() -> Stage:
        return stage(name, lively, tiny[name])

    try:
        first = built()
        losses = {step: loss(first, step) for step in (3, 4, 5, 6, 7)}
        torch.manual_seed(99)
        assert len(set(losses.values())) == 5
        assert {step: loss(built(), step) for step in (7, 3, 5)} == {step: losses[step] for step in (7, 3, 5)}
    finally:
        lively.requires_grad_(True)


@dataclass
class Seen:
    """What a stage's loss read and aimed at."""

    ids: list[Tensor]
    features: list[Tensor | None]
    targets: list[Tensor]
    contexts: list[object]


@pytest.fixture
def seen(lively: Blip3o, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Listens to `lively` and to the flow-matching loss, which becomes the sum of its targets."""
    heard = Seen([], [], [], [])
    condition, read = lively.condition, lively.read

    def hear_condition(ids: Tensor, mask: Tensor, features: Tensor | None = None) -> Tensor:
        heard.ids.append(ids)
        heard.features.append(features)
        return condition(ids, mask, features)

    def hear_read(ids: Tensor, features: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        heard.ids.append(ids)
        return read(ids, features, asked)

    def hear_context(noisy: Tensor, timestep: Tensor, context: object) -> Tensor:
        heard.contexts.append(context)
        return noisy

    def loss(
        _flow: object, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, sigma: Tensor
    ) -> Tensor:
        heard.targets.append(x)
        predict(noise, sigma)
        return x.sum()

    monkeypatch.setattr(lively, "condition", hear_condition)
    monkeypatch.setattr(lively, "read", hear_read)
    monkeypatch.setattr(lively.dit, "forward", hear_context)
    monkeypatch.setattr(stages, "training_loss", loss)
    yield heard
    lively.requires_grad_(True)


@pytest.mark.parametrize("unnamed", [0.0, 0.5])
def test_unnamed_pictures_are_prompts_and_targets(
    tiny: dict[str, Recipe], lively: Blip3o, seen: Seen, unnamed: float
) -> None:
    """The noises of the last prompts belong to pictures of the second bank, which are read in a caption's stead."""
    drawing = stage("generation", lively, replace(tiny["generation"], unnamed=unnamed))
    assert isinstance(drawing, stages.GenerationStage) and drawing.unnamed is not None
    loss(drawing, 3)
    [ids], [features], [x] = seen.ids, seen.features, seen.targets
    images = (ids == lively.config.image_token).sum(1)
    assert images.tolist() == ([0, 0, 4, 4] if unnamed else [0, 0, 0, 0])
    known = [{row.sum().item() for row in bank.features} for bank in (drawing.bank, drawing.unnamed)]
    assert [row.sum().item() in known[1] for row in x[::2]] == [bool(count) for count in images]
    if unnamed:
        assert features is not None and torch.equal(features.repeat_interleave(2, 0), x[4:])
    else:
        assert features is None


@pytest.mark.parametrize("drop", [0.0, 0.999])
def test_the_pooled_condition_can_be_dropped(tiny: dict[str, Recipe], lively: Blip3o, seen: Seen, drop: float) -> None:
    """It alone: the keys and values of the condition stay."""
    drawing = stage("generation", lively, replace(tiny["generation"], pooled_drop=drop, condition_drop=0.0))
    loss(drawing, 3)
    [context] = seen.contexts
    assert isinstance(context, Context)
    assert bool((context.pooled == 0).all()) == bool(drop)
    assert all(bool(keys.flatten(1).any(1).all()) for keys in context.keys)


def test_half_of_the_decoders_pictures_have_no_names(tiny: dict[str, Recipe], lively: Blip3o, seen: Seen) -> None:
    """And each picture goes with its own features."""
    given: list[Tensor] = []
    drawing = stage("decoder", lively, replace(tiny["decoder"], feature_noise=0.0))
    assert isinstance(drawing, stages.DecoderStage) and lively.decoder is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lively.decoder, "forward", lambda x, timestep, features: given.append(features) or x)
        loss(drawing, 3)
    [pictures], [features] = seen.targets, given
    torch.testing.assert_close(lively.features((pictures + 1) / 2), features, atol=1e-4, rtol=1e-4)
    assert detect((pictures + 1) / 2).clear.tolist() == [True] * 4 + [False] * 4


def test_texts_of_understanding_hold_nonce_words(tiny: dict[str, Recipe], lively: Blip3o, seen: Seen) -> None:
    reading = stage("understanding", lively, tiny["understanding"])
    for step in range(len(stages.PATTERN)):
        loss(reading, step)
    for (pictures, _), ids in zip(stages.PATTERN, seen.ids, strict=True):
        assert bool(torch.isin(ids, torch.cat([NONCE_COLORS, NONCE_SHAPES])).any()) != pictures


def test_a_batch_of_one_shows_a_colour_with_a_name(tiny: dict[str, Recipe], lively: Blip3o) -> None:
    for name in ("generation", "decoder"):
        one = replace(tiny[name], batch_size=1, **({"draws_per_prompt": 1} if name == "generation" else {}))
        assert one.unnamed_of(1) == 0
        loss(stage(name, lively, one), 0)
    lively.requires_grad_(True)


def test_a_run_has_a_bank_of_each_kind(tiny: dict[str, Recipe], snapshots: Path) -> None:
    run = Run(snapshots / "clip", "tiny")
    assert int(run.bank(64).scenes.color.max()) < len(scenes.COLORS) <= int(run.bank(64, True).scenes.color.max())
    built = run._stage("generation", replace(tiny["generation"], unnamed=0.0))
    assert isinstance(built, stages.GenerationStage) and built.unnamed is None
    loss(built, 0)
    built = run._stage("decoder", replace(tiny["decoder"], unnamed=0.0))
    assert isinstance(built, stages.DecoderStage) and built.banks == [(run.bank(64), 8)]
    loss(built, 0)


def test_a_prompt_may_be_a_picture(lively: Blip3o) -> None:
    """Read beside a longer text or alone, it tells the queries the same."""
    features = torch.randn(1, 4, lively.config.clip.width)
    picture = text.left_pad([text.picture_prompt()])
    caption = text.left_pad([text.drawing_prompt(range(10, 21))])
    ids, mask = text.join(caption, picture)
    assert ids.shape == (2, 13) and mask.sum(1).tolist() == [13, 6]
    with torch.no_grad():
        both = lively.condition(ids, mask, features)
        torch.testing.assert_close(both[1:], lively.condition(*picture, features), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both[:1], lively.condition(*caption), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(both[1:], lively.condition(*picture, -features), atol=1e-3)
