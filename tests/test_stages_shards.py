"""The stages that read shards: a batch depends on (seed, step, rows) alone; what it holds, and what is aimed at."""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o.data import text
from blip3o.data.loading import FaultySample
from blip3o.data.scene_shards import scene_samples
from blip3o.data.shard_files import write_shards
from blip3o.data.shards import Sample, Shards
from blip3o.data.tar import Fault
from blip3o.layers import linear_cross_entropy
from blip3o.model import Blip3o
from blip3o.processor import Processor, to_tensor
from blip3o.train.loop import Interrupted
from blip3o.train.recipe import Recipe
from blip3o.train.recipe_shards import CaptionSource, ShardGenerationRecipe, ShardUnderstandingRecipe, Source
from blip3o.train.run import Run
from blip3o.train.stages_shards import (
    DialogueBatch,
    DrawingBatch,
    ShardGenerationStage,
    ShardUnderstandingStage,
    same_data,
)

COUNT, SIZE = 40, 8
COMMON: dict[str, Any] = {
    "steps": 10, "batch_size": SIZE, "learning_rate": 1e-3, "final_learning_rate": 1e-5, "warmup_steps": 1,
    "weight_decay": 0.01, "betas": (0.9, 0.98), "clip_norm": 1.0, "dtype": "float32", "seed": 5, "threads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    write_shards(place, scene_samples(5, COUNT), 20)
    return place


@pytest.fixture
def model(lively: Blip3o) -> Iterator[Blip3o]:
    yield lively
    lively.requires_grad_(True)


def generation(model: Blip3o, *data: CaptionSource, **changes: Any) -> ShardGenerationStage:
    kept = {key: changes.pop(key) for key in ("report",) if key in changes}
    choices = {"draws_per_prompt": 2, "condition_drop": 0.1, "max_tokens": 64, **COMMON, **changes}
    return ShardGenerationStage(model, ShardGenerationRecipe(data=data, **choices), Processor(), **kept)


def understanding(model: Blip3o, *data: Source, **changes: Any) -> ShardUnderstandingStage:
    kept = {key: changes.pop(key) for key in ("report",) if key in changes}
    choices = {"pack": 64, "max_tokens": 128, **COMMON, **changes}
    return ShardUnderstandingStage(model, ShardUnderstandingRecipe(data=data, **choices), Processor(), **kept)


def by_key(folder: Path) -> dict[str, Sample]:
    samples = [shards.read(i) for shards in [Shards(folder)] for i in range(len(shards))]
    return {f"{sample.shard.name}:{sample.key}": sample for sample in samples if isinstance(sample, Sample)}


def same(one: DrawingBatch | DialogueBatch, other: DrawingBatch | DialogueBatch) -> bool:
    """Tensors, names and weights."""
    values = [
        torch.equal(value, vars(other)[name]) if isinstance(value, Tensor) else value == vars(other)[name]
        for name, value in vars(one).items()
    ]
    return all(values)


@contextmanager
def stop_after(steps: int) -> Iterator[None]:
    """Ask a stage on shards to stop while it makes a batch some steps on."""
    kept = {kind: kind.loss for kind in (ShardGenerationStage, ShardUnderstandingStage)}
    done = 0

    def stopping(self: Any, batch: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return kept[type(self)](self, batch)

    with pytest.MonkeyPatch.context() as patch:
        for kind in kept:
            patch.setattr(kind, "loss", stopping)
        yield


@pytest.mark.parametrize("kind", [generation, understanding])
def test_a_batch_is_a_function_of_seed_step_and_rows(folder: Path, model: Blip3o, kind: Any) -> None:
    source = (CaptionSource if kind is generation else Source)(path=str(folder))
    first, again = kind(model, source, threads=1), kind(model, source, threads=3)
    steps = {step: first.batch(step, range(SIZE)) for step in (0, 3, 9)}
    assert same(again.batch(9, range(SIZE)), steps[9]) and same(again.batch(0, range(SIZE)), steps[0])
    assert not same(steps[0], replace(steps[3])) and len({tuple(batch.ids) for batch in steps.values()}) == 3
    halves = [first.batch(3, range(4)), first.batch(3, range(4, 8))]
    assert halves[0].ids + halves[1].ids == steps[3].ids
    assert halves[0].weight + halves[1].weight == steps[3].weight
    assert not same(kind(model, source, seed=6).batch(3, range(SIZE)), steps[3])
    with torch.no_grad():
        parts = sum(first.loss(half)[0] for half in halves)
        whole = first.loss(steps[3])[0]
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_every_sample_comes_once_in_an_epoch(folder: Path, model: Blip3o) -> None:
    stage = understanding(model, Source(path=str(folder)))
    names = [name for step in range(COUNT // SIZE) for name in stage.batch(step, range(SIZE)).ids]
    assert sorted(names) == sorted(by_key(folder))


def test_a_drawing_has_its_own_caption_and_picture(folder: Path, model: Blip3o) -> None:
    stage, samples = generation(model, CaptionSource(path=str(folder))), by_key(folder)
    batch = stage.batch(2, range(SIZE))
    assert len(batch.ids) == SIZE // 2 and batch.weight == SIZE * 4 * 32
    assert batch.positions.tolist() == list(range(16, 24)) and batch.pictures is not None
    for row, name in enumerate(batch.ids):
        picture = samples[name].picture
        assert picture is not None and torch.equal(batch.pictures[row], to_tensor(picture))
        said = batch.tokens[row][batch.mask[row]].tolist()
        assert said[0] == text.BOS and said[-1] == text.IMAGE_START
        assert text.decode(torch.tensor(said)) == samples[name].text


def test_long_and_short_captions_are_mixed(folder: Path, model: Blip3o) -> None:
    samples = by_key(folder)
    mixed = [CaptionSource(path=str(folder), weight=w, captions=name) for name, w in (("long", 0.75), ("short", 0.25))]
    stage = generation(model, *mixed)
    counts = {"long": 0, "short": 0}
    for step in range(2):
        batch = stage.batch(step, range(SIZE))
        for row, name in enumerate(batch.ids):
            table = samples[name].json
            said = text.decode(batch.tokens[row])
            assert table is not None
            counts[next(kind for kind in counts if said == table["captions"][kind])] += 1
    assert counts == {"long": 6, "short": 2}


def test_captions_are_cut(folder: Path, model: Blip3o) -> None:
    stage = generation(model, CaptionSource(path=str(folder)), max_tokens=4 + 2 + 3)
    batch = stage.batch(0, range(SIZE))
    assert batch.tokens.shape[1] == 5 and bool((batch.tokens[:, -1] == text.IMAGE_START).all())
    assert 0 < batch.cut <= 1
    _, logged = stage.loss(batch)
    assert logged["cut"] / batch.weight == pytest.approx(batch.cut)
    with pytest.raises(ValueError, match="max_tokens must be above 6"):
        generation(model, CaptionSource(path=str(folder)), max_tokens=6)


@pytest.mark.parametrize(("name", "what"), [("condition_drop", "kept"), ("pooled_drop", "pooled")])
def test_conditions_are_dropped(folder: Path, model: Blip3o, name: str, what: str) -> None:
    """The share that was asked for, the same ones however rows are taken apart; none of it with a share of 0."""
    source = CaptionSource(path=str(folder))
    changes = {"batch_size": 64, "draws_per_prompt": 1, "condition_drop": 0.0, "pooled_drop": 0.0}
    whole = vars(generation(model, source, **{**changes, name: 0.3}).batch(1, range(64)))[what]
    part = vars(generation(model, source, **{**changes, name: 0.3}).batch(1, range(16, 32)))[what]
    assert torch.equal(part, whole[16:32]) and 0.5 < whole.float().mean() < 0.9
    assert bool(vars(generation(model, source, **changes).batch(1, range(64)))[what].all())


def test_a_dropped_condition_is_zeros(folder: Path, model: Blip3o, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = generation(model, CaptionSource(path=str(folder)))
    batch = stage.batch(0, range(SIZE))
    given: list[Tensor] = []
    project = model.dit.project
    monkeypatch.setattr(model.dit, "project", lambda hidden: given.append(hidden) or project(hidden))
    kept = torch.tensor([True, False, True, False])
    stage.loss(replace(batch, kept=kept))
    assert given[0].flatten(1).any(1).tolist() == kept.tolist()


@pytest.mark.parametrize("kind", [generation, understanding])
def test_stored_features_give_the_same_loss(folder: Path, model: Blip3o, tmp_path: Path, kind: Any) -> None:
    """Without a picture being decoded."""
    source = (CaptionSource if kind is generation else Source)(path=str(folder))
    plain = kind(model, source)
    stored = kind(model, source, features="float32", cache=str(tmp_path))
    with torch.no_grad():
        expected = plain.loss(plain.batch(1, range(SIZE)))[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("blip3o.data.shards.decode_picture", lambda *_: pytest.fail("decoded"))
            batch = stored.batch(1, range(SIZE))
        assert batch.pictures is None and batch.features is not None
        torch.testing.assert_close(stored.loss(batch)[0], expected, rtol=1e-5, atol=0)


def test_what_learns(folder: Path, model: Blip3o) -> None:
    def learning() -> set[str]:
        return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}

    stage: Any = generation(model, CaptionSource(path=str(folder)))
    assert learning() == {"queries", "dit"} == {name.split(".")[0] for name in stage.trainable()}
    loss = stage.loss(stage.batch(0, range(SIZE)))[0]
    loss.backward()
    assert all(parameter.grad is not None for parameter in stage.trainable().values())
    model.requires_grad_(True)
    model.zero_grad()
    stage = understanding(model, Source(path=str(folder)))
    assert learning() == {"llm", "image_projector"} == {name.split(".")[0] for name in stage.trainable()}
    stage.loss(stage.batch(0, range(SIZE)))[0].backward()
    assert all(parameter.grad is not None for parameter in stage.trainable().values())
    model.zero_grad()


def test_packed_conversations_have_the_loss_of_each_alone(folder: Path, model: Blip3o) -> None:
    """Each read by itself, from its own picture, in the world's own frame."""
    stage, samples = understanding(model, Source(path=str(folder))), by_key(folder)
    batch = stage.batch(1, range(SIZE))
    assert batch.tokens.shape[0] == 1 and batch.tokens.shape[1] % 64 == 0 and len(batch.ids) == SIZE
    alone, asked_tokens = torch.zeros(()), 0
    processor = Processor()
    for name in batch.ids:
        sample = samples[name]
        assert sample.json is not None and sample.picture is not None
        ids, taught = [text.BOS, *[text.IMAGE] * 4], []
        for turn in sample.json["conversations"]:
            words = processor.encode(turn["value"].removeprefix("<image>\n"))
            human = turn["from"] == "human"
            taught += [] if human else range(len(ids) + 1, len(ids) + 2 + len(words))
            ids += [text.USER, *words] if human else [text.ASSISTANT, *words, text.EOS]
        row = torch.tensor([ids])
        asked = torch.zeros_like(row, dtype=torch.bool)
        asked[0, [place - 1 for place in taught]] = True
        with torch.no_grad():
            hidden = model.read(row, model.features(to_tensor(sample.picture)[None]), asked)
            each = linear_cross_entropy(hidden, model.llm.output_weight, row[0, taught])
        alone, asked_tokens = alone + each * len(taught), asked_tokens + len(taught)
    assert batch.weight == asked_tokens
    with torch.no_grad():
        torch.testing.assert_close(stage.loss(batch)[0].float(), alone, rtol=1e-5, atol=0)


def test_samples_that_cannot_be_framed_are_named_and_replaced(folder: Path, model: Blip3o, tmp_path: Path) -> None:
    samples = list(scene_samples(5, COUNT))
    samples[3][1]["txt"] = b"a dodecahedron"
    turns = json.loads(samples[4][1]["json"])["conversations"]
    for i, said in ((4, turns[:1]), (9, turns + turns[2:] * 20)):
        samples[i][1]["json"] = json.dumps({"conversations": said}).encode()
    ill = tmp_path / "ill"
    write_shards(ill, samples, 20)

    def names(stage: Any) -> list[str]:
        return [name for step in range(COUNT // SIZE) for name in stage.batch(step, range(SIZE)).ids]

    told: list[Fault] = []
    changes: dict[str, Any] = {"max_faults": 0.2, "report": told.append}
    pairs = [
        (generation(model, CaptionSource(path=str(place)), draws_per_prompt=1, **options),
         understanding(model, Source(path=str(place)), **options))
        for place, options in ((ill, changes), (folder, {}))
    ]  # fmt: skip
    for sick, well, bad in zip(*pairs, ({"3"}, {"4", "9"}), strict=True):
        found, right = names(sick), names(well)
        assert {name[-1] for mine, name in zip(found, right, strict=True) if mine != name} == bad
        assert not {f"00000.tar:0000000{i}" for i in bad} & set(found)
    assert {(fault.kind, fault.name) for fault in told} == {
        ("text", "00000003"), ("conversation", "00000004"), ("tokens", "00000009")
    }  # fmt: skip


def test_recipes_refuse(folder: Path) -> None:
    data = (CaptionSource(path=str(folder)),)
    for changes, reason in (
        ({"data": ()}, "at least one source"),
        ({"seed": -1}, "seed must be"),
        ({"features": "float32"}, "cache must be a folder"),
        ({"max_faults": 1.0}, "max_faults"),
        ({"draws_per_prompt": 3}, "multiple of draws_per_prompt"),
        ({"condition_drop": 1.0}, "condition_drop"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        choices: dict[str, Any] = {"data": data, "condition_drop": 0.1, "max_tokens": 64, **COMMON, **changes}
        with pytest.raises(ValueError, match=reason):
            ShardGenerationRecipe(**choices)
    with pytest.raises(ValueError, match="weight must be positive"):
        Source(path="a", weight=0.0)


def test_a_run_learns_from_shards_and_names_their_faults(
    folder: Path, tiny: dict[str, Recipe], snapshots: Path, tmp_path: Path
) -> None:
    """Both stages, from a table with `data`; stopped and gone on with, the log is that of a run in one go."""
    ill = list(scene_samples(5, COUNT))
    ill[3][1]["png"] = b"noise"
    write_shards(tmp_path / "ill", ill, 20)
    recipes = {
        "understanding": ShardUnderstandingRecipe(
            data=(Source(path=str(tmp_path / "ill")),), pack=64, max_tokens=128, max_faults=0.1,
            **{**COMMON, "steps": 30, "learning_rate": 4e-3},
        ),
        "generation": ShardGenerationRecipe(
            data=(CaptionSource(path=str(folder)),), condition_drop=0.1, max_tokens=64, features="float32",
            cache=str(tmp_path / "cache"), **{**COMMON, "steps": 30, "learning_rate": 4e-3},
        ),
    }  # fmt: skip
    logs = []
    for name in ("whole", "stopped"):
        shutil.copytree(snapshots / "clip", tmp_path / name)
        for stage, recipe in recipes.items():
            if name == "stopped":
                with stop_after(12), pytest.raises(Interrupted), warnings.catch_warnings():
                    warnings.simplefilter("ignore", FaultySample)
                    Run(tmp_path / name, "tiny").run_stage(stage, recipe, lambda _: None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FaultySample)
                Run(tmp_path / name, "tiny").run_stage(stage, recipe, lambda _: None)
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([(row["stage"], row["step"], row["loss"]) for row in rows if row["stage"] in recipes])
        told = [json.loads(line) for line in (tmp_path / name / "faults.jsonl").read_text().splitlines()]
        assert {(fault["kind"], fault["name"]) for fault in told} == {("picture", "00000003")}
    assert logs[0] == logs[1]
    (tmp_path / "ill" / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"not those it began with: .*ill"):
        Run(tmp_path / "stopped", "tiny")._stage("understanding", recipes["understanding"])
    for stage, least in (("understanding", 0.8), ("generation", 0.9)):
        losses = [loss for name, _, loss in logs[0] if name == stage]
        assert sum(losses[-10:]) < least * sum(losses[:10]), (stage, losses)


def test_a_run_goes_on_with_its_own_shards(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "data.json"
    same_data(place, "generation", [Shards(folder)])
    same_data(place, "understanding", [Shards(folder / "00000.tar"), Shards(folder)])
    kept = place.read_text()
    same_data(place, "generation", [Shards(folder)])
    assert place.read_text() == kept and set(json.loads(kept)) == {"generation", "understanding"}
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    for stage, sources in (
        ("generation", [Shards(folder / "00000.tar")]),
        ("understanding", [Shards(folder), Shards(folder / "00000.tar")]),
        ("understanding", [Shards(folder / "00000.tar")]),
    ):
        with pytest.raises(ValueError, match=f"shards of stage {stage} are not those it began with"):
            same_data(place, stage, sources)
