"""Runs that begin with weights: a model folder of ours, or a released checkpoint."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o.data.shard_files import write_shards
from blip3o.model import Blip3o
from blip3o.presets import PRESETS
from blip3o.processor import Processor
from blip3o.train import initial_weights
from blip3o.train.recipe import Recipe
from blip3o.train.recipe_files import load_recipe
from blip3o.train.recipe_shards import CaptionSource, ShardGenerationRecipe
from blip3o.train.run import Run
from blip3o.weights import CorruptModel, from_pretrained, save_pretrained
from blip3o.weights_files import WrongTensors

LEARNED = ("queries", "dit.")


def quiet(_: str) -> None:
    pass


def losses(run: Path, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"] == stage]


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefixes: tuple[str, ...] = ("",)) -> bool:
    names = [name for name in one if name.startswith(prefixes)]
    return bool(names) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in names)


def edited(source: Path, folder: Path, keep: Callable[[str], bool], **changes: Tensor) -> Path:
    """A model folder with some of the tensors of another, and some changed."""
    model, processor = from_pretrained(source)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if keep(name)}
    save_pretrained(model, processor, folder, {**tensors, **changes})
    return folder


@pytest.fixture
def begun(tiny: dict[str, Recipe], snapshots: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of stage generation, and the model folder that it began with: what stage understanding left behind."""
    weights, folder = snapshots / "understanding" / "model", tmp_path / "begun"
    Run(folder, "tiny", weights=str(weights)).run_stage("generation", tiny["generation"], quiet)
    return folder, weights


def test_a_run_begins_where_another_one_was(begun: tuple[Path, Path], snapshots: Path) -> None:
    folder, weights = begun
    assert losses(folder, "generation") == losses(snapshots / "generation", "generation")
    before, after = (load_file(place / "model.safetensors") for place in (weights, folder / "model"))
    frozen = ("clip.", "llm.", "image_projector.", "decoder.", "feature_")
    assert same(before, after, frozen) and not same(before, after, LEARNED)
    assert same(after, load_file(snapshots / "generation" / "model" / "model.safetensors"))
    recipe = load_recipe(folder / "recipe.toml")
    assert recipe.weights == str(weights) and list(recipe.stages) == ["generation"]


def test_weights_are_read_once_and_stay_the_same(
    begun: tuple[Path, Path], snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, weights = begun
    moved = shutil.copytree(weights, tmp_path / "moved")
    monkeypatch.setattr(initial_weights, "fill", lambda *_: pytest.fail("weights are read again"))
    run = Run(folder, "tiny", weights=str(moved))
    assert run.initial and same(run.model.state_dict(), load_file(folder / "model" / "model.safetensors"))
    other = str(snapshots / "decoder" / "model")
    for place, given, word in (
        (folder, other, "other"),
        (folder, "", "other"),
        (snapshots / "decoder", str(moved), "new"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {word} weights: weights and clip_weights must be what"):
            Run(place, "tiny", weights=given)
    with pytest.raises(ValueError, match="weights must not be the model of the run itself"):
        Run(folder, "tiny", weights=str(folder / "model"))


def test_a_stage_is_out_of_date_after_another_clip(tiny: dict[str, Recipe], snapshots: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, "tiny", weights=str(snapshots / "decoder" / "model"))
    run.run_stage("clip", replace(tiny["clip"], steps=1), quiet)
    with pytest.raises(ValueError, match=r"stage generation needs stage understanding first; .* nor holds it in"):
        run.run_stage("generation", tiny["generation"], quiet)
    with pytest.raises(ValueError, match="sample_every must be 0 in stage understanding"):
        run.run_stage("understanding", replace(tiny["understanding"], sample_every=1, prompts=("a",)), quiet)


def test_what_generation_learns_first_may_be_missing(
    tiny: dict[str, Recipe], snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = snapshots / "decoder" / "model"
    place = edited(source, tmp_path / "base", lambda name: not name.startswith(LEARNED))
    run, new = Run(tmp_path / "run", "tiny", weights=str(place)), Run(tmp_path / "new", "tiny").model.state_dict()
    held, found = load_file(source / "model.safetensors"), run.model.state_dict()
    assert run.fresh == [name for name in found if name.startswith(LEARNED)]
    assert all(torch.equal(found[name], (new if name in run.fresh else held)[name]) for name in held)
    told: list[str] = []
    run.run_stage("generation", replace(tiny["generation"], steps=1), told.append)
    assert len(told) == 1 and told[0].startswith(f"begun with {place}, which lacks dit.") and "queries" in told[0]
    assert Run(tmp_path / "run", "tiny", weights=str(place)).fresh == run.fresh


@pytest.mark.parametrize(
    ("keep", "changes", "missing", "message"),
    [
        (lambda name: name != "queries", {}, ["queries"], "missing queries"),
        (lambda name: not name.startswith("llm.norm."), {}, ["llm.norm.weight"], "missing llm.norm.weight"),
        (lambda _: True, {"queries": torch.zeros(5, 32)}, [], r"queries has shape \[5, 32\], expected \[4, 32\]"),
        (lambda _: True, {"more": torch.zeros(1)}, [], "unexpected more"),
    ],
)
def test_wrong_tensors_are_named(
    keep: Callable[[str], bool], changes: dict[str, Tensor], missing: list[str], message: str,
    tiny: dict[str, Recipe], snapshots: Path, tmp_path: Path,
) -> None:  # fmt: skip
    place = edited(snapshots / "decoder" / "model", tmp_path / "wrong", keep, **changes)
    with pytest.raises(WrongTensors, match=message) as error:
        Run(tmp_path / "run", "tiny", weights=str(place))
    assert error.value.missing == missing and not (tmp_path / "run").exists()


def test_wrong_places_and_settings_are_named(
    tiny: dict[str, Recipe], snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[Exception], message: str, weights: object, clip_weights: object = "") -> None:
        with pytest.raises(kind, match=message):
            Run(tmp_path / "run", "tiny", weights=str(weights), clip_weights=str(clip_weights))

    held = snapshots / "decoder" / "model"
    refused(FileNotFoundError, "weights must be a model folder or a hub id: there is no folder", tmp_path / "none")
    refused(CorruptModel, "weights must be a model folder: .*config.json is missing", snapshots)
    refused(FileNotFoundError, "clip_weights must be a safetensors file", held, tmp_path / "none")
    refused(ValueError, "clip_weights must be left out", held, held / "model.safetensors")
    damaged = shutil.copytree(held, tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    refused(CorruptModel, "model.safetensors is corrupt", damaged)
    config = PRESETS["tiny"]
    monkeypatch.setitem(PRESETS, "tiny", replace(config, llm=replace(config.llm, rope_theta=5.0)))
    refused(ValueError, "weights must be of the recipe's model 'tiny', .*'rope_theta': 5.0", held)
    with pytest.raises(ValueError, match="clip_weights needs weights to be named too, got 'x' alone"):
        load_recipe("nano", ["clip_weights=x"])
    assert load_recipe("nano", ["weights=a/b"]).weights == "a/b"


# released checkpoints


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    for library in ("transformers", "diffusers"):
        pytest.importorskip(library, reason=f"needs {library}: pip install {library}")
    from released_checkpoint import Checkpoint

    return Checkpoint()


@pytest.fixture
def released(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A released checkpoint, whose sizes are those of the preset "small"."""
    place = checkpoint.write(tmp_path / "released")
    monkeypatch.setitem(PRESETS, "small", replace(Blip3o.from_pretrained(place).config, name="small"))
    return Path(place)


def without(checkpoint: Any, folder: Path, *prefixes: str) -> str:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return str(checkpoint.write(folder, change=drop))


def test_tuning_a_released_checkpoint(released: Path, tmp_path: Path) -> None:
    """Its tokenizer goes with the weights: what is left behind can be drawn with, and begun with."""
    from blip3o.pipeline import Pipeline

    held = Blip3o.from_pretrained(released).state_dict()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    picture = (tmp_path / "red.png").read_bytes()
    write_shards(tmp_path / "shards", [(f"{i}", {"png": picture, "txt": b"red"}) for i in range(2)], 2)
    recipe = ShardGenerationRecipe(
        steps=2, batch_size=2, learning_rate=1e-3, final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0,
        betas=(0.9, 0.999), clip_norm=1.0, dtype="float32", seed=5, threads=1, max_tokens=128, condition_drop=0.1,
        data=(CaptionSource(path=str(tmp_path / "shards")),),
    )  # fmt: skip
    run = Run(tmp_path / "run", "small", weights=str(released))
    assert not run.fresh and same(held, run.model.state_dict())
    run.run_stage("generation", recipe, quiet)
    left = Pipeline.from_pretrained(tmp_path / "run" / "model")
    found = left.model.state_dict()
    assert not same(held, found, LEARNED) and same(held, found, ("clip.", "vision.", "llm.", "feature_"))
    again = Run(tmp_path / "again", "small", weights=str(tmp_path / "run" / "model"))
    assert same(found, again.model.state_dict()) and not isinstance(again.processor, Processor)
    assert Run(tmp_path / "run", "small", weights=str(released)).finished


def test_a_base_without_what_is_learned_and_a_tower_of_its_own(checkpoint: Any, released: Path, tmp_path: Path) -> None:
    held, tower = Blip3o.from_pretrained(released).state_dict(), tmp_path / "tower.safetensors"
    save_file(checkpoint.eva.state_dict(), tower)
    base = without(checkpoint, tmp_path / "base", "model.dit.", "model.latent_queries", "model.gen_vision_tower.")
    with pytest.raises(WrongTensors, match=r"missing model\.gen_vision_tower\.") as error:
        Run(tmp_path / "run", "small", weights=base)
    assert all(name.startswith("model.gen_vision_tower.") for name in error.value.missing)
    run = Run(tmp_path / "run", "small", weights=base, clip_weights=str(tower))
    assert run.fresh == [name for name in held if name.startswith(LEARNED)]
    assert same(held, run.model.state_dict(), ("clip.", "vision.", "llm."))
    assert run.initial != Run(tmp_path / "other", "small", weights=str(released)).initial


def test_other_sizes_are_refused(
    checkpoint: Any, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PRESETS["small"]
    longer = replace(config, llm=replace(config.llm, vocab_size=config.llm.vocab_size + 1))
    monkeypatch.setitem(PRESETS, "longer", replace(longer, name="longer"))
    with pytest.raises(WrongTensors, match=r"model\.embed_tokens\.weight has shape \[267, 64\], expected \[268, 64\]"):
        Run(tmp_path / "run", "longer", weights=str(released))
    monkeypatch.setitem(PRESETS, "slower", replace(config, name="slower", llm=replace(config.llm, eps=1e-5)))
    with pytest.raises(ValueError, match=r"weights must be of the recipe's model 'slower', .*llm: .*'eps'"):
        Run(tmp_path / "run", "slower", weights=str(released))
