"""The stages that read shards: what a batch holds, that it depends on (seed, step, rows) alone, and what is aimed at."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o.data import text
from blip3o.data.scene_shards import scene_samples
from blip3o.data.shard_files import write_shards
from blip3o.data.shards import Sample, Shards
from blip3o.data.tar import Fault
from blip3o.layers import linear_cross_entropy
from blip3o.model import Blip3o
from blip3o.processor import Processor, to_tensor
from blip3o.train.recipe_shards import CaptionSource, ShardGenerationRecipe, ShardUnderstandingRecipe, Source
from blip3o.train.stages_shards import DialogueBatch, DrawingBatch, ShardGenerationStage, ShardUnderstandingStage

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


@pytest.mark.parametrize("kind", [generation, understanding])
def test_a_batch_is_a_function_of_seed_step_and_rows(folder: Path, model: Blip3o, kind: Any) -> None:
    source = (CaptionSource if kind is generation else Source)(path=str(folder))
    first, again = kind(model, source, threads=1), kind(model, source, threads=3)
    steps = {step: first.batch(step, range(SIZE)) for step in (0, 3, 9)}
    assert same(again.batch(9, range(SIZE)), steps[9]) and same(again.batch(0, range(SIZE)), steps[0])
    assert not same(steps[0], replace(steps[3])) and len({tuple(batch.ids) for batch in steps.values()}) == 3
    halves = [first.batch(3, range(0, 4)), first.batch(3, range(4, 8))]
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
    table = json.loads(samples[4][1]["json"])
    samples[4][1]["json"] = json.dumps({**table, "conversations": table["conversations"][:1]}).encode()
    samples[9][1]["json"] = json.dumps({**table, "conversations": table["conversations"] * 20}).encode()
    write_shards(tmp_path / "ill", samples, 20)
    expected = {(generation, "text", "00000003"), (understanding, "conversation", "00000004")}
    expected |= {(understanding, "conversation", "00000009")}
    found = set()
    for kind, source in ((generation, CaptionSource), (understanding, Source)):
        told: list[Fault] = []
        sick = kind(model, source(path=str(tmp_path / "ill")), max_faults=0.2, report=told.append, draws_per_prompt=1) \
            if kind is generation else kind(model, source(path=str(tmp_path / "ill")), max_faults=0.2, report=told.append)
        well = kind(model, source(path=str(folder)), draws_per_prompt=1) if kind is generation else kind(model, source(path=str(folder)))
        names, right = ([n for step in range(5) for n in stage.batch(step, range(SIZE)).ids] for stage in (sick, well))
        ill = {fault.name for fault in told}
        assert [mine == other or other.split(":")[1] in ill for mine, other in zip(names, right, strict=True)] == [True] * COUNT
        assert not {name.split(":")[1] for name in names} & ill
        found |= {(kind, fault.kind, fault.name) for fault in told}
    assert found == expected


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
