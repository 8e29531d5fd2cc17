"""What a recipe can ask of the loop: an average of weights, blocks, bad batches, pictures; and what a run tells."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import assert_same_run, at_step, copied, interrupt, log_of, quiet, tensors_of, train, with_loss
from torch import Tensor, nn

from blip3o import cli
from blip3o.layers import keep_casts
from blip3o.model import Blip3o
from blip3o.presets import preset
from blip3o.train import loop, provenance, stages, trackers
from blip3o.train.batch import Batch, Stage
from blip3o.train.blocks import prepared_blocks, training_blocks
from blip3o.train.flops import peak_flops, step_flops
from blip3o.train.loop import Interrupted, NonFiniteLoss
from blip3o.train.optimizer import Ema
from blip3o.train.plan import casts, drawing_pass, measured, plan, states
from blip3o.train.recipe import Recipe
from blip3o.train.recipe_files import load_recipe
from blip3o.train.recipe_shards import ShardGenerationRecipe
from blip3o.train.run import Run

# the average of the weights


def test_the_average_follows_the_weights() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Ema({"x": x}, 0.75)
    with torch.no_grad():
        x += 4
    average.update()
    assert average.averages["x"].tolist() == [2.0, 3.0]
    with average.in_place():
        assert x.tolist() == [2.0, 3.0]
    assert x.tolist() == [5.0, 6.0]


def test_weights_come_back_when_a_drawing_fails() -> None:
    x = nn.Parameter(torch.ones(3))
    average = Ema({"x": x}, 0.5)
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(OSError, match="disk"), average.in_place():
        assert x.tolist() == [1.0] * 3
        raise OSError("disk is full")
    assert x.tolist() == [2.0] * 3


def test_the_average_is_what_a_stage_leaves_behind(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    """It is the model at every stop and at the end, and training goes on with the weights all the same, bit for bit."""
    recipes = {"decoder": replace(tiny["decoder"], ema=0.5)}
    uncut = train(copied(snapshots, "generation", tmp_path / "uncut"), recipes, "decoder")
    cut = copied(snapshots, "generation", tmp_path / "cut")
    with pytest.raises(Interrupted), at_step("decoder", 5, interrupt):
        train(cut, recipes, "decoder")
    held = tensors_of(cut)
    model = load_file(cut / "model" / "model.safetensors")
    averaged = [name.removeprefix("ema.") for name in held if name.startswith("ema.")]
    assert averaged and all(name.startswith("decoder.") for name in averaged)
    for name, tensor in model.items():
        assert torch.equal(tensor, held[f"{'ema' if name in averaged else 'model'}.{name}"]), name
    assert any(not torch.equal(held[f"ema.{name}"], held[f"model.{name}"]) for name in averaged)
    train(cut, recipes, "decoder")
    assert_same_run(tmp_path / "uncut", cut)
    plain = train(copied(snapshots, "generation", tmp_path / "plain"), tiny, "decoder")
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "uncut")
    assert not all(map(torch.equal, plain.model.decoder.parameters(), uncut.model.decoder.parameters()))


# blocks


@pytest.mark.parametrize("stage", ["understanding", "generation"])
def test_checkpointed_blocks_train_alike_with_less(
    tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path, stage: str
) -> None:
    run = Run(copied(snapshots, "understanding" if stage == "generation" else "clip", tmp_path / "run"), "tiny")
    chosen = run._stage(stage, tiny[stage])
    batch = chosen.batch(0, range(8))
    kept, found = [], []
    for checkpointing in ("none", "blocks"):
        with prepared_blocks(training_blocks(chosen), replace(tiny[stage], checkpointing=checkpointing)):
            kept.append(measured(lambda: chosen.loss(batch)[0], count=False).kept)
            chosen.loss(batch)[0].backward()
        found.append({name: x.grad.clone() for name, x in chosen.trainable().items() if x.grad is not None})
        run.model.zero_grad()
    assert kept[1] < 0.8 * kept[0]
    assert found[0].keys() == found[1].keys() and all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    assert not [block for block in training_blocks(chosen) if "forward" in vars(block)]


def test_compiled_blocks_train_alike(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    """The blocks that train, and they alone, go through torch.compile; here without the compiler behind it."""
    compiled: list[object] = []
    compile = torch.compile

    def spy(function: Callable[..., Tensor], **_: object) -> Callable[..., Tensor]:
        compiled.append(function)
        return compile(function, backend="eager")

    folder = copied(snapshots, "generation", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", spy)
        run = train(folder, {"decoder": replace(tiny["decoder"], steps=2, compile=True)}, "decoder")
    assert compiled == [block.forward for block in run.model.decoder.blocks]
    train(
        copied(snapshots, "generation", tmp_path / "eager"), {"decoder": replace(tiny["decoder"], steps=2)}, "decoder"
    )
    for row, other in zip(log_of(folder), log_of(tmp_path / "eager"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


# bad numbers


def bad_batches(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


def spoiled(kind: str) -> Callable[[Stage, Tensor], Tensor]:
    def change(stage: Stage, loss: Tensor) -> Tensor:
        zero = next(iter(stage.trainable().values())).sum() * 0
        return loss * math.inf if kind == "loss" else loss + zero.sqrt()

    return change


def test_bad_data_are_told_by_their_names(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: Path
) -> None:
    """One picture of one of two micro-batches: that micro-batch's samples are named, and no weight moves."""
    made = stages.DecoderStage.batch

    def poisoned(self: stages.DecoderStage, step: int, rows: range) -> Batch:
        batch = made(self, step, rows)
        if (step, rows) == (3, range(4, 8)):
            batch.pictures[1, 0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(stages.DecoderStage, "batch", poisoned)
    monkeypatch.setitem(loop.train.__kwdefaults__, "save_every_seconds", 0.0)
    folder = copied(snapshots, "generation", tmp_path / "run")
    with pytest.raises(NonFiniteLoss, match=r"step 3 was not applied.*bad: data pictures, of 4 samples that .*jsonl"):
        train(folder, {"decoder": replace(tiny["decoder"], accumulate=2)}, "decoder")
    [row] = bad_batches(folder)
    ids = made(Run(folder, "tiny")._stage("decoder", tiny["decoder"]), 3, range(4, 8)).ids
    assert row == {"stage": "decoder", "step": 4, "what": "data pictures", "ids": ids}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_is_left_out_up_to_a_limit(
    tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path, kind: str
) -> None:
    """The next step starts from the same weights; the count is in the checkpoint; one more than allowed is an error."""
    folder = copied(snapshots, "generation", tmp_path / "run")
    patient = {"decoder": replace(tiny["decoder"], max_bad_batches=1)}
    with with_loss("decoder", 2, spoiled(kind)):
        with pytest.raises(Interrupted), at_step("decoder", 4, interrupt):
            train(folder, patient, "decoder")
    [row] = bad_batches(folder)
    first = next(iter(Run(folder, "tiny")._stage("decoder", tiny["decoder"]).trainable()))
    assert row["step"] == 3 and row["what"] == ("loss" if kind == "loss" else f"gradient of {first}")
    assert len(row["ids"]) == 8
    assert [row["step"] for row in log_of(folder) if row["stage"] == "decoder"] == [1, 2, 4, 5]
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder).values())
    for _ in range(2):  # again at the next start: the checkpoint is of before
        with with_loss("decoder", 6, spoiled(kind)), pytest.raises(NonFiniteLoss, match="max_bad_batches is 1"):
            train(folder, patient, "decoder")
        assert [row["step"] for row in bad_batches(folder)] == [3, 7]
    train(folder, {"decoder": replace(patient["decoder"], max_bad_batches=2)}, "decoder")  # which may change


# pictures


def test_pictures_are_drawn_while_it_trains(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    """And change nothing: the run ends as one without."""
    folder = tmp_path / "run"
    train(folder, tiny, "clip", "understanding", "decoder")
    plain = copied(tmp_path, "run", tmp_path / "plain")
    drawing = replace(tiny["generation"], sample_every=4, prompts=("a red circle", "a blue square"))
    train(folder, {"generation": drawing}, "generation")
    train(plain, tiny, "generation")
    names = ["generation-000004.png", "generation-000008.png"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == names
    with Image.open(folder / "samples" / names[0]) as image:
        assert image.size == (4 * 34 - 2, 2 * 34 - 2)
    assert tensors_of(folder).keys() == tensors_of(plain).keys()
    assert all(torch.equal(tensor, tensors_of(plain)[name]) for name, tensor in tensors_of(folder).items())


def test_pictures_need_a_decoder(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    run = Run(copied(snapshots, "understanding", tmp_path / "run"), "tiny")
    with pytest.raises(ValueError, match=r"sample_every must be 0 in stage generation: .* stage decoder before"):
        run.run_stage("generation", replace(tiny["generation"], sample_every=1, prompts=("a",)), quiet)
    with pytest.raises(ValueError, match="prompts must hold at least one, as sample_every is 1; got none"):
        replace(tiny["generation"], sample_every=1)


# what a run tells


def test_a_run_keeps_what_it_was_made_with(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    train(tmp_path, tiny, "clip")
    changed = replace(tiny["understanding"], accumulate=2)
    train(tmp_path, {"understanding": changed}, "understanding")
    kept = load_recipe(tmp_path / "recipe.toml")
    assert kept.model == "tiny" and kept.stages == {"clip": tiny["clip"], "understanding": changed}
    starts = json.loads((tmp_path / "run.json").read_text())
    assert [start["stage"] for start in starts] == ["clip", "understanding"]
    assert starts[0]["versions"]["torch"] == torch.__version__ and starts[0]["command"] == sys.argv


def test_the_revision_is_of_this_code_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = provenance.revision()
    assert found is None or len(found.removesuffix("+changes")) == 40
    monkeypatch.setattr(provenance.blip3o, "__file__", str(tmp_path / "blip3o" / "__init__.py"))
    assert provenance.revision() is None


def test_trackers_are_told_what_the_log_is(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    run = SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))
    for name in ("wandb", "trackio"):
        package = ModuleType(name)
        package.init = lambda **settings: told.append(settings) or run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    with trackers.trackers_of(["wandb"], tmp_path / "mine", {"clip": {"steps": 3}}) as opened:
        Run(tmp_path, "tiny", trackers=opened).run_stage("clip", replace(tiny["clip"], steps=3), quiet)
    first = told[0]
    assert first["project"] == "blip3o" and first["name"] == f"mine-{first['id']}" and first["resume"] == "allow"
    assert first["config"] == {"clip": {"steps": 3}} and told[-1] == "finished"
    for row, values in zip(log_of(tmp_path), told[1:-1], strict=True):
        assert values["clip/loss"] == row["loss"] and values["clip/step"] == row["step"]
    for name, folder in (("wandb", "mine"), ("trackio", "mine"), ("wandb", "other")):
        told.clear()
        with trackers.trackers_of([name], tmp_path / folder, {}):
            pass
        assert (told[0]["name"] == first["name"]) is (folder == "mine")  # the same run goes on
        assert told[0].get("id") == (told[0]["name"].partition("-")[2] if name == "wandb" else None)


def test_tensorboard_takes_back_steps_that_are_done_again(tmp_path: Path) -> None:
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: Path, purge_step: int) -> None:
            told.append((folder.name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    board = trackers.TensorBoard(SimpleNamespace(SummaryWriter=Writer), tmp_path)  # type: ignore[arg-type]
    board.log("clip", 20, {"loss": 1.0})
    board.log("generation", 10, {"loss": 2.0})
    board.log("clip", 30, {"loss": 0.5})
    board.close()
    clip, generation = ("clip", 20), ("generation", 10)  # of each stage alone: the counts of steps are its own
    assert told == [clip, ("loss", 1.0, 20), generation, ("loss", 2.0, 10), ("loss", 0.5, 30), "closed", "closed"]


def test_a_tracker_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name, message in (
        ("trackio", r"--track trackio needs a package that is not installed .*pip install 'blip3o\[trackio\]'"),
        ("tensorbord", "track must be one of tensorboard, wandb, trackio, got 'tensorbord'"),
    ):
        with pytest.raises(ValueError, match=message), trackers.trackers_of([name], tmp_path, {}):
            pass


def test_mfu(tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a peak of 10^12: the FLOPs of a step, as counted, over its time; nothing else of the run is changed by it."""
    train(tmp_path / "plain", tiny, "clip")
    monkeypatch.setattr(loop, "step_flops", step_flops)
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: 1e12)
    run = train(tmp_path / "run", tiny, "clip")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    per_sample = {row["mfu"] * 1e12 / row["samples_per_second"] for row in rows}
    weights = sum(x.numel() for x in run.model.clip.parameters() if x.dim() == 2)
    assert max(per_sample) == pytest.approx(min(per_sample))
    assert 6 * weights < max(per_sample) < 60 * weights  # a few dozen tokens go through them, forward and backward
    assert_same_run(tmp_path / "plain", tmp_path / "run")


def test_flops_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, 4, requires_grad=True)
    assert step_flops(lambda: (x @ torch.ones(4, 5)).sum().backward()) == 2 * (2 * 3 * 4 * 5)
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GT 710")
    assert peak_flops(torch.device("cuda", 1), torch.bfloat16) == 0


# the plan


def test_the_plan_is_of_the_model_itself(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["generation.batch_size=512", "generation.accumulate=2", "generation.parallel=fsdp"]
    assert cli.main(["plan", "nano-shards", *recipe[:1], "--devices", "8", *recipe[1:]]) == 0
    found = plan(load_recipe("nano-shards", recipe), 8)
    model = Blip3o(preset("nano"))
    trained = sum(x.numel() for x in model.dit.parameters()) + model.queries.numel()
    frozen = sum(x.numel() for x in model.parameters()) - trained
    assert (found.rows, found.trained, found.frozen) == (32, trained, frozen)
    assert found.states == 16 * trained / 8 + 4 * frozen  # a weight, its gradient and two moments; of the rest, weights
    assert f"| 8 | 32 | {found.states / 2**30:.1f} |" in capsys.readouterr().out
    tokens, queries = model.config.feature_grid**2, model.config.num_queries
    least = 6 * tokens * sum(x.numel() for block in model.dit.blocks for x in block.mlp.parameters())
    least += 2 * queries * sum(x.numel() for block in model.llm.blocks for x in block.parameters()) / 4
    assert least < found.flops < 20 * least
    less = plan(load_recipe("nano-shards", [*recipe, "generation.checkpointing=blocks"]), 8)
    assert less.activations < 0.8 * found.activations and less.flops == found.flops


def test_the_plan_counts_casts_and_pieces_of_what_is_frozen() -> None:
    """The casts are those that a step of training keeps; of what is frozen the language model alone is in pieces."""
    model = Blip3o(preset("nano")).requires_grad_(False)
    for part in (model.queries, model.dit):
        part.requires_grad_()

    def planned(**settings: object) -> float:
        return states(model, replace(stage, **settings), 8)

    settings = ["generation.dtype=bfloat16", "generation.parallel=fsdp", "generation.features=none"]
    recipe = load_recipe("nano-shards", settings)
    stage = recipe.stages["generation"]
    assert isinstance(stage, ShardGenerationRecipe)
    with keep_casts() as kept, torch.autocast("cpu", torch.bfloat16):
        drawing_pass(model, 4, stage).backward()
    count = sum(cast.nbytes for cast in kept.values())
    assert count == casts(model, stage) == 2 * sum(weight.numel() for weight in kept) > 0
    assert planned() - planned(dtype="float32") == count
    llm = sum(x.numel() for x in model.llm.parameters())
    assert planned(frozen="sharded") == planned() - count - 4 * llm * 7 / 8
    found = plan(recipe, 8)  # although a model of its sizes has run, and left tables of positions behind
    assert found.states == planned() == 16 * found.trained / 8 + 4 * found.frozen + count
    learned = 2 * sum(module.weight.numel() for module in model.dit.modules() if isinstance(module, nn.Linear))
    assert planned(parallel="ddp", frozen="sharded") == 16 * found.trained + 4 * found.frozen + count + learned


def test_what_has_no_plan() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of devices x accumulate 1, got 256 and 7"):
        plan(load_recipe("nano-shards"), 7)
    with pytest.raises(ValueError, match="a plan is of a stage generation on shards; the recipe has clip, underst"):
        plan(load_recipe("nano"), 8)
