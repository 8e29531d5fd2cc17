"""The paper's choices in training: every one learns, is saved, and refuses what it has no use for."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_processes import on_processes
from test_choices import CHOICES, foreign, lively_model, small, without_own
from test_recipe import in_full

from blip3o import presets
from blip3o.config import ImageTarget, Objective
from blip3o.data import scenes
from blip3o.data.scene_shards import scene_samples
from blip3o.data.shard_files import write_shards
from blip3o.generate import regress_targets
from blip3o.model import Blip3o
from blip3o.processor import Processor
from blip3o.train.autoencoder import AutoencoderStage
from blip3o.train.batch import Stage
from blip3o.train.devices import Parallel, start
from blip3o.train.joint import JointStage
from blip3o.train.optimizer import optimizer_for
from blip3o.train.recipe import (
    AutoencoderRecipe,
    GenerationRecipe,
    JointRecipe,
    Recipe,
    RunRecipe,
    UnderstandingRecipe,
)
from blip3o.train.recipe_files import load_recipe, packaged
from blip3o.train.recipe_shards import CaptionSource, ShardGenerationRecipe
from blip3o.train.run import Run
from blip3o.train.stages import ClipStage, FeatureBank, GenerationStage, UnderstandingStage
from blip3o.train.stages_shards import ShardGenerationStage
from blip3o.weights import from_pretrained

SMALL = ("model=tiny", "steps=3", "batch_size=8", "warmup_steps=1", "dtype=float32")
STEPS, SIZE = 60, 8
COMMON: dict[str, Any] = {
    "steps": STEPS, "batch_size": SIZE, "learning_rate": 4e-3, "final_learning_rate": 1e-3, "warmup_steps": 2,
    "weight_decay": 0.01, "betas": (0.9, 0.98), "clip_norm": 1.0, "dtype": "float32", "seed": 3,
}  # fmt: skip
DRAWING: dict[str, Any] = {"pictures": 128, "pooled_drop": 0.5, "unnamed": 0.25}
FLOW: dict[str, Any] = {"draws_per_prompt": 4, "condition_drop": 0.1}
MSE: dict[str, Any] = {"draws_per_prompt": 1, "condition_drop": 0.0}


def fresh(image_target: ImageTarget = "clip", objective: Objective = "flow") -> Blip3o:
    """A new model whose targets are standardised as its first stages would."""
    torch.manual_seed(4)
    model = Blip3o(small(image_target, objective))
    shown = scenes.render(scenes.sample(3, torch.arange(128)))
    with torch.no_grad():
        model.set_feature_statistics(model.features(shown))
        if image_target != "clip":
            model.set_target_statistics(model.targets(shown))
    return model


def banks(model: Blip3o) -> tuple[FeatureBank, FeatureBank]:
    return FeatureBank(model, 7, 128), FeatureBank(model, 7, 128, scenes.sample_unnamed)


def learned(stage: Stage) -> dict[str, float]:
    """By which factor a step's loss, and the parts of it that are logged, change by learning that step STEPS times."""
    optimizer, batch = optimizer_for(stage.trainable(), stage.recipe), stage.batch(5, range(SIZE))
    seen: list[dict[str, float]] = []
    for _ in range(STEPS):
        total, parts = stage.loss(batch)
        (total / batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: value.item() for name, value in {"loss": total, **parts}.items()})
    return {name: value / seen[0][name] for name, value in seen[-1].items()}


# learning


@pytest.mark.parametrize(("image_target", "objective"), CHOICES)
def test_generation_learns_every_target_by_every_objective(image_target: ImageTarget, objective: Objective) -> None:
    model = fresh(image_target, objective)
    recipe = GenerationRecipe(**COMMON, **DRAWING, **(FLOW if objective == "flow" else MSE))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert learned(GenerationStage(model, recipe, *banks(model)))["loss"] < (0.3 if objective == "flow" else 0.75)
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"queries", "dit"}


def test_the_autoencoder_learns() -> None:
    model = Blip3o(small("vae"))
    stage = AutoencoderStage(model, autoencoder_recipe())
    assert learned(stage)["loss"] < 0.2
    stage.finish()
    flat = model.targets(scenes.render(scenes.sample(9, torch.arange(256)))).flatten(0, 1)
    assert flat.mean(0).abs().max() < 0.2 and (flat.std(0) - 1).abs().max() < 0.2
    part = stage.batch(2, range(2, 6))
    whole = stage.batch(2, range(SIZE))
    assert torch.equal(part.pictures, whole.pictures[2:6]) and torch.equal(part.noise, whole.noise[2:6])
    assert part.ids == whole.ids[2:6] and whole.ids[3:5] == ["scene 19", "unnamed scene 20"]


def autoencoder_recipe() -> AutoencoderRecipe:
    return AutoencoderRecipe(**COMMON, unnamed=0.5, kl_weight=1e-4)


@pytest.mark.parametrize("objective", ["flow", "mse"])
def test_both_learn_at_once(objective: Objective) -> None:
    model = fresh("clip", objective)
    stage = joint(model, **(FLOW if objective == "flow" else MSE))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = learned(stage)
    assert changed["generation"] < 0.75 and changed["understanding"] < 0.1
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"queries", "dit", "llm", "image_projector"}


# joint


def joint(model: Blip3o, **changes: Any) -> JointStage:
    choices = {**COMMON, **DRAWING, **FLOW, "turns": 2, "ratio": 0.5, **changes}
    return JointStage(model, JointRecipe(**choices), *banks(model))


def test_the_joint_loss_is_generations_and_a_share_of_understandings() -> None:
    """By the stages that train them apart, on the same samples."""
    model = fresh()
    stage = joint(model)
    both = {field: getattr(stage.recipe, field) for field in (*COMMON, "pictures")}
    apart = [
        GenerationStage(model, GenerationRecipe(**{**both, **DRAWING, **FLOW}), *banks(model)),
        UnderstandingStage(
            model, UnderstandingRecipe(**{**both, "turns": 2, "batch_size": SIZE // 4, "seed": 4}), banks(model)[0]
        ),
    ]
    with torch.no_grad():
        for step in range(3):
            batch = stage.batch(step, range(SIZE))
            total, parts = stage.loss(batch)
            expected = []
            for one, rows in zip(apart, (SIZE, SIZE // 4), strict=True):
                part = one.batch(step, range(rows))
                expected.append((one.loss(part)[0] / part.weight).item())
            found = [part.item() / batch.weight for part in parts.values()]
            assert found == pytest.approx(expected, rel=1e-6)
            assert total.item() / batch.weight == pytest.approx(expected[0] + 0.5 * expected[1], rel=1e-6)


def test_a_joint_step_can_be_taken_apart() -> None:
    """The sums of its parts are the whole's, though each part asks for other numbers of tokens."""
    model = fresh()
    stage = joint(model)
    assert stage.unit == 4
    with torch.no_grad():
        for step in range(3):
            whole = stage.batch(step, range(SIZE))
            parts = [stage.batch(step, range(at, at + 4)) for at in range(0, SIZE, 4)]
            assert sum(part.weight for part in parts) == whole.weight
            assert sorted(name for part in parts for name in part.ids) == sorted(whole.ids)
            found = sum(stage.loss(part)[0].item() for part in parts)
            assert found == pytest.approx(stage.loss(whole)[0].item(), rel=1e-5)
    moved = whole.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved.tensors().values()) and "generation.x" in moved.tensors()


def test_generation_teaches_the_language_model() -> None:
    model = lively_model()
    stage = joint(model, ratio=1e-30)
    stage.loss(stage.batch(0, range(SIZE)))[0].backward()
    gradient = model.llm.embedding.weight.grad
    assert gradient is not None and gradient.norm() > 1e-6


# runs


@pytest.fixture
def tiny_choices(tiny: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.GRIDS, "tiny", 4)


@pytest.mark.parametrize("name", ["nano-vae", "nano-pixels", "nano-mse", "nano-joint"])
def test_a_run_of_each_recipe(tiny_choices: None, tmp_path: Path, name: str) -> None:
    draws = [] if name == "nano-mse" else ["draws_per_prompt=2"]
    recipe = load_recipe(name, [*SMALL, "pictures=64", *draws])
    run = Run(tmp_path, recipe.model, image_target=recipe.image_target, objective=recipe.objective)
    for stage, chosen in recipe.stages.items():
        run.run_stage(stage, chosen, lambda _: None)
    model, _ = from_pretrained(tmp_path / "model")
    assert (model.config.image_target, model.config.objective) == (recipe.image_target, recipe.objective)
    if recipe.image_target != "clip":  # the first stage, or the autoencoder's, has seen what is to be standardised
        assert not bool((model.target_std == 1).any())
    if name != "nano-joint":  # whose model is nano's own
        with pytest.raises(ValueError, match=r"holds a run of another tiny: "):
            Run(tmp_path, recipe.model)


def test_latents_need_their_autoencoder_first(tiny_choices: None, tmp_path: Path) -> None:
    recipe = load_recipe("nano-vae", [*SMALL, "pictures=64", "draws_per_prompt=2"])
    run = Run(tmp_path, "tiny", image_target="vae")
    for stage in ("clip", "understanding"):
        run.run_stage(stage, recipe.stages[stage], lambda _: None)
    with pytest.raises(ValueError, match=r"stage generation needs stage autoencoder first"):
        run.run_stage("generation", recipe.stages["generation"])
    with pytest.raises(ValueError, match=r"model 'tiny' has no autoencoder of its own to train"):
        AutoencoderStage(fresh("pixels"), autoencoder_recipe())


def test_pixels_are_standardised_by_the_first_stage(tiny: dict[str, Recipe]) -> None:
    model = Blip3o(small("pixels"))
    stage = ClipStage(model, tiny["clip"])  # type: ignore[arg-type]
    stage.finish()
    assert not bool((model.target_std == 1).any()) and not bool((model.feature_std == 1).any())


# recipes


def test_each_recipe_is_nano_but_for_one_choice() -> None:
    nano = load_recipe("nano")
    for name in ("nano-vae", "nano-pixels", "nano-mse", "nano-joint"):
        assert name in packaged()
        recipe = load_recipe(name)
        chosen = (recipe.image_target, recipe.objective, recipe.schedule)
        assert sum(one != other for one, other in zip(chosen, ("clip", "flow", "sequential"), strict=True)) == 1
        for stage in recipe.stages.keys() & nano.stages.keys():
            expected = nano.stages[stage]
            if name == "nano-mse" and isinstance(expected, GenerationRecipe):
                expected = replace(expected, batch_size=64, **MSE)
            assert recipe.stages[stage] == expected
    together, drawing = load_recipe("nano-joint").stages["joint"], nano.stages["generation"]
    assert all(getattr(together, field.name) == getattr(drawing, field.name) for field in fields(drawing))


def test_choices_are_kept_with_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("nano-joint", ["objective=mse", "joint.draws_per_prompt=1", "joint.condition_drop=0"])
    (tmp_path / "kept.toml").write_text(in_full(recipe))
    assert load_recipe(tmp_path / "kept.toml") == recipe and recipe.objective == "mse"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nano", ["image_target=depth"], r"image_target must be one of clip, vae, pixels, got 'depth'"),
        ("nano", ["objectiv=mse"], r"unknown key 'objectiv': did you mean 'objective'\?"),
        ("nano", ["image_target=pixels"], r"stage decoder serves image_target 'clip' alone, got 'pixels'"),
        ("nano-vae", ["image_target=clip"], r"stage autoencoder serves image_target 'vae' alone, got 'clip'"),
        ("nano", ["objective=mse"], r"generation\.draws_per_prompt must be 1 with objective 'mse', .* got 4"),
        ("nano-mse", ["generation.condition_drop=0.1"], r"condition_drop must be 0 with objective 'mse', .* got 0\.1"),
        ("nano-joint", ["objective=mse"], r"joint\.draws_per_prompt must be 1 with objective 'mse'"),
        ("nano", ["schedule=joint"], r"schedule 'joint' trains both at once, .* there must be no stage understanding"),
        ("nano-joint", ["schedule=sequential"], r"schedule must be 'joint' where there is a stage joint"),
        ("nano-joint", ["ratio=0"], r"stage joint: ratio must be positive, got 0"),
        ("nano-vae", ["kl_weight=-1"], r"stage autoencoder: kl_weight must not be negative, got -1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(name, overrides)


# on shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    write_shards(place, scene_samples(5, 2 * SIZE), 2 * SIZE)
    return place


def on_shards(model: Blip3o, shards: Path, **changes: Any) -> ShardGenerationStage:
    choices = {**COMMON, **MSE, "max_tokens": 64, "threads": 1, **changes}
    recipe = ShardGenerationRecipe(data=(CaptionSource(path=str(shards)),), **choices)
    return ShardGenerationStage(model, recipe, Processor())


@pytest.mark.parametrize(("image_target", "objective"), [("vae", "mse"), ("pixels", "flow"), ("clip", "mse")])
def test_choices_on_shards(shards: Path, image_target: ImageTarget, objective: Objective) -> None:
    model = lively_model(image_target, objective)
    stage = on_shards(model, shards)
    with torch.no_grad():
        batch = stage.batch(1, range(SIZE))
        assert batch.pictures is not None
        targets = model.targets(batch.pictures)
        assert batch.weight == targets.numel()
        loss = stage.loss(batch)[0].item()
        if objective == "mse":
            condition = model.condition(batch.tokens, batch.mask)
            answers = regress_targets(model, condition)
            assert loss == pytest.approx((answers - targets).square().sum().item(), rel=1e-4)
        halves = [stage.batch(1, range(0, SIZE // 2)), stage.batch(1, range(SIZE // 2, SIZE))]
        assert sum(stage.loss(half)[0].item() for half in halves) == pytest.approx(loss, rel=1e-5)
    names = [name for name, _ in model.named_parameters() if name.startswith(("dit.", "queries"))]
    assert list(stage.trainable()) == names
    stage.finish()


def test_choices_that_shards_cannot_serve(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features must be 'none' in generation: 'tiny' draws pixels"):
        on_shards(lively_model("pixels"), shards, features="float32", cache=str(tmp_path))
    with pytest.raises(ValueError, match=r"model 'tiny' needs an autoencoder"):
        on_shards(without_own(), shards)
    with pytest.raises(FileNotFoundError, match=r"autoencoder's folder .*nowhere does not exist"):
        on_shards(without_own(), shards, autoencoder=str(tmp_path / "nowhere"))
    recipe = on_shards(lively_model(), shards).recipe
    with pytest.raises(ValueError, match=r"generation\.condition_drop must be 0 with objective 'mse'"):
        RunRecipe(model="tiny", objective="mse", stages={"generation": replace(recipe, condition_drop=0.1)})


def test_a_foreign_autoencoder_on_shards(shards: Path, tmp_path: Path) -> None:
    foreign().save_pretrained(tmp_path / "vae")
    model = without_own()
    stage = on_shards(model, shards, autoencoder=str(tmp_path / "vae"))
    assert not [name for name in model.state_dict() if name.startswith("autoencoder.")]
    with torch.no_grad():
        assert stage.loss(stage.batch(0, range(SIZE)))[0].isfinite()
    stage.finish()


# on several processes


def trained(parallel: Parallel, kind: str) -> list[float]:
    """The losses of three steps of a stage on however many processes torchrun started."""
    with start() as devices:
        model = lively_model("vae" if kind == "autoencoder" else "clip")
        stage: Stage = AutoencoderStage(model, autoencoder_recipe()) if kind == "autoencoder" else joint(model)
        loss, found = devices.wrap(stage, parallel), []
        optimizer = optimizer_for(stage.trainable(), stage.recipe)
        size = SIZE // devices.world
        for step in range(3):
            batch = stage.batch(step, range(devices.rank * size, (devices.rank + 1) * size))
            total, _ = loss(batch, True)
            whole, weight = devices.sum(total.item(), batch.weight)
            (total / weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(whole / weight)
    return found


@pytest.mark.parametrize(("parallel", "kind"), [("fsdp", "joint"), ("ddp", "autoencoder")])
def test_two_processes_train_as_one(parallel: Parallel, kind: str) -> None:
    expected = trained(parallel, kind)
    first, second = on_processes(2, trained, parallel, kind)
    assert first == second == pytest.approx(expected, rel=1e-6)
