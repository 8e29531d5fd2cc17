"""Training: it learns, stops and goes on bit for bit, leaves the language model alone, and never loses weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blip3o.model import Blip3o
from blip3o.presets import PRESETS
from blip3o.train import loop, stages
from blip3o.train.batch import Batch, Stage
from blip3o.train.devices import alone
from blip3o.train.folder import differences, only_writer
from blip3o.train.log import rewind_log
from blip3o.train.loop import Interrupted, NonFiniteLoss
from blip3o.train.optimizer import learning_rate, optimizer_for
from blip3o.train.recipe import STAGES, Recipe
from blip3o.train.run import Run, fingerprint
from blip3o.weights import CorruptModel, check_folder, from_pretrained, sha256

STAGE_CLASSES: dict[str, type] = {
    "clip": stages.ClipStage,
    "understanding": stages.UnderstandingStage,
    "generation": stages.GenerationStage,
    "decoder": stages.DecoderStage,
}
SHARD = "shard-00001-model-00001-of-00001.safetensors"  # all tensors of a checkpoint of one process
TIMES = ("seconds", "samples_per_second", "waiting", "mfu")  # what two runs of the same thing may differ in


def quiet(_: str) -> None:
    pass


def train(folder: Path, recipes: dict[str, Recipe], *names: str) -> Run:
    run = Run(folder, "tiny")
    for name in names or STAGES:
        run.run_stage(name, recipes[name], quiet)
    return run


def copied(snapshots: Path, stage: str, folder: Path) -> Path:
    """A run that has finished the stages up to this one, to go on with."""
    return Path(shutil.copytree(snapshots / stage, folder))


def log_of(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def state_of(folder: Path) -> dict[str, object]:
    state = json.loads((folder / "checkpoint" / "training.json").read_text())
    return {**state, "seconds": 0.0, "finished": sorted(state["finished"])}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint" / SHARD)


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights on disk, in checkpoint and model folder, the same state and the same log, bit for bit."""
    assert sha256(one / "model/model.safetensors") == sha256(other / "model/model.safetensors")
    tensors, others = tensors_of(one), tensors_of(other)
    assert tensors.keys() == others.keys()
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    assert state_of(one) == state_of(other)
    assert log_of(one) == log_of(other)


@contextmanager
def with_loss(stage: str, step: int, change: Callable[[Stage, Tensor], Tensor]) -> Iterator[None]:
    """Another loss in one step of a stage. Batches are made ahead, so the step's own are marked when they are made."""
    kind = STAGE_CLASSES[stage]
    batch, loss = kind.batch, kind.loss
    marked: list[Batch] = []

    def marking(self: Stage, number: int, rows: range) -> Batch:
        made = batch(self, number, rows)
        if number == step:
            marked.append(made)
        return made

    def changed(self: Stage, made: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, more = loss(self, made)
        return (change(self, value) if any(made is one for one in marked) else value), more

    kind.batch, kind.loss = marking, changed
    try:
        yield
    finally:
        kind.batch, kind.loss = batch, loss


@contextmanager
def at_step(stage: str, step: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something in the midst of a stage's step."""

    def acting(_: Stage, loss: Tensor) -> Tensor:
        act()
        return loss

    with with_loss(stage, step, acting):
        yield


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# learning


def test_every_stage_learns(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    recipes = {
        name: replace(tiny[name], steps=steps, batch_size=16, learning_rate=4e-3)
        for name, steps in (("clip", 25), ("understanding", 40), ("generation", 40), ("decoder", 25))
    }
    train(tmp_path, recipes)
    for name, least in (("clip", 0.6), ("understanding", 0.9), ("generation", 0.9), ("decoder", 0.9)):
        losses = [float(str(row["loss"])) for row in log_of(tmp_path) if row["stage"] == name]
        assert len(losses) == recipes[name].steps
        assert sum(losses[-10:]) < least * sum(losses[:10]), (name, losses[:10], losses[-10:])


@pytest.mark.parametrize("tiles", [False, True])
def test_products_are_of_bfloat16_where_the_chip_has_tiles_for_it(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiles: bool
) -> None:
    """Within the loss alone, not where features are computed for good or the understanding is examined."""
    monkeypatch.setattr(loop, "BFLOAT16_PRODUCTS", tiles)
    seen: set[torch.dtype] = set()
    linear = nn.functional.linear

    def spy(*arguments: Tensor) -> Tensor:
        y = linear(*arguments)
        seen.add(y.dtype)
        return y

    features = Blip3o.features

    def outside(model: Blip3o, pictures: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return features(model, pictures)

    monkeypatch.setattr(Blip3o, "features", outside)
    monkeypatch.setattr(nn.functional, "linear", spy)
    for name in STAGES:
        seen.clear()
        with pytest.raises(Interrupted), at_step(name, 1, interrupt):
            train(tmp_path, tiny, name)
        assert (torch.bfloat16 in seen) == tiles, name
        train(tmp_path, tiny, name)


def test_stages_train_what_they_say_and_nothing_else(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    run = Run(tmp_path, "tiny")
    for name, prefixes in (
        ("clip", ("clip.", "feature_")),
        ("understanding", ("llm.", "image_projector.")),
        ("generation", ("dit.", "queries")),
        ("decoder", ("decoder.",)),
    ):
        before = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
        run.run_stage(name, tiny[name], quiet)
        moved = {key for key, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert moved == {key for key in before if key.startswith(prefixes)}
        assert not [key for key, parameter in run.model.named_parameters() if parameter.grad is not None]
        assert all(parameter.requires_grad for parameter in run.model.parameters()) and not run.model.training


# stopping and going on


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stopped_run_ends_as_the_uncut_one(tiny: dict[str, Recipe], tmp_path: Path, threads: int) -> None:
    """Every stage is stopped by a signal in its midst, and once more, and each time taken up from disk alone."""
    torch.set_num_threads(threads)
    train(tmp_path / "uncut", tiny)
    for name in STAGES:
        for step, ask in ((2, interrupt), (6, terminate)):
            with pytest.raises(Interrupted) as stop, at_step(name, step, ask):
                train(tmp_path / "cut", tiny, name)
            assert (stop.value.stage, stop.value.step) == (name, step + 1)
            assert str(stop.value) == f"stopped in stage {name} after step {step + 1}"
            from_pretrained(tmp_path / "cut" / "model")
        train(tmp_path / "cut", tiny, name)
    assert_same_run(tmp_path / "uncut", tmp_path / "cut")
    assert [row["step"] for row in log_of(tmp_path / "cut")] == list(range(1, 11)) * 4


def test_a_run_goes_on_in_the_same_process(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    run = Run(tmp_path / "cut", "tiny")
    for name in ("clip", "understanding"):
        for step in (4, 7):
            with pytest.raises(Interrupted), at_step(name, step, interrupt):
                run.run_stage(name, tiny[name], quiet)
        run.run_stage(name, tiny[name], quiet)
    assert_same_run(snapshots / "understanding", tmp_path / "cut")


def test_a_stop_at_the_last_step_is_not_swallowed(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    with pytest.raises(Interrupted, match="stopped in stage clip after step 10"), at_step("clip", 9, interrupt):
        train(tmp_path / "cut", tiny, "clip", "understanding")
    assert state_of(tmp_path / "cut")["finished"] == ["clip"]
    train(tmp_path / "cut", tiny, "clip", "understanding")
    assert_same_run(snapshots / "understanding", tmp_path / "cut")


def test_signals_mean_what_they_meant_before(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path, tiny, "clip")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        interrupt()
        time.sleep(1)


def test_training_runs_outside_the_main_thread(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            train(tmp_path, tiny, "clip")
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not problems and state_of(tmp_path)["finished"] == ["clip"]


def test_ctrl_c_while_the_features_are_computed(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    """Nothing is lost, nothing is written, and the next run is as if it had not been."""
    folder = copied(snapshots, "clip", tmp_path / "run")
    before = {path.name: sha256(path) for path in (folder / "checkpoint").iterdir()}
    run, render = Run(folder, "tiny"), stages.scenes.render

    def interrupted(batch: object) -> Tensor:
        interrupt()
        time.sleep(1)
        return render(batch)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.scenes, "render", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_stage("understanding", tiny["understanding"], quiet)
    assert {path.name: sha256(path) for path in (folder / "checkpoint").iterdir()} == before
    assert not run.model.training
    run.run_stage("understanding", tiny["understanding"], quiet)
    assert_same_run(snapshots / "understanding", folder)


CHILD = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    from conftest import narrow
    from blip3o.presets import PRESETS, preset
    from blip3o.train import loop, stages
    from blip3o.train.recipe import ClipRecipe
    from blip3o.train.run import Run

    torch.set_num_threads(1)
    PRESETS["tiny"] = narrow(preset("nano"))
    stages.STATISTICS, loop.LOG_EVERY = 64, 1
    loop.train.__kwdefaults__["save_every_seconds"] = 0.0
    Run(Path({folder!r}), "tiny").run_stage("clip", {recipe})
"""


def test_kill_9_leaves_a_run_that_goes_on(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    """A process that saves after every step is killed without warning, most likely in the midst of a save."""
    chosen = replace(tiny["clip"], steps=40)
    folder = tmp_path / "killed"
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), folder=str(folder), recipe=chosen)
    paths = os.pathsep.join(sys.path)
    saved = 0
    for wanted in (5, 15):
        child = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL
        )
        log, deadline = folder / "log.jsonl", time.monotonic() + 300  # a loaded machine is slow to start a process
        while not log.exists() or len(log.read_text().splitlines()) < wanted:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        child.kill()
        child.wait()
        check_folder(folder / "checkpoint", "training.json", SHARD)
        from_pretrained(folder / "model")
        step = Run(folder, "tiny").step
        assert wanted - 2 <= step < 40 and step > saved  # the last save may have been under way
        saved = step
    train(folder, {"clip": chosen}, "clip")
    train(tmp_path / "uncut", {"clip": chosen}, "clip")
    assert_same_run(tmp_path / "uncut", folder)


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("at", range(1, 6))
def test_killed_between_the_commits_of_a_save(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: Path, at: int
) -> None:
    """A save renames four folders; a kill before any of them, at the end of a stage, costs no more than the stage."""
    folder = copied(snapshots, "clip", tmp_path / "killed")
    renames, rename = [0], Path.rename

    def counted(path: Path, target: Path) -> Path:
        renames[0] += 1
        if renames[0] == at:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        try:
            train(folder, tiny, "decoder")
            assert at == 5
        except Killed:
            assert at < 5
    from_pretrained(folder / "model")
    train(folder, tiny, "decoder")
    train(tmp_path / "uncut", tiny, "clip", "decoder")
    assert_same_run(tmp_path / "uncut", folder)


# order and identity


def test_a_finished_stage_is_not_done_again(
    tiny: dict[str, Recipe], snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshots / "decoder"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    told: list[str] = []

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage must not be trained")

    monkeypatch.setattr(loop, "train", never)
    run = Run(folder, "tiny")
    for name in STAGES:
        run.run_stage(name, tiny[name], told.append)
    assert [line.split(" (")[0] for line in told] == [f"stage {name} is finished" for name in STAGES]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before


def test_stages_have_an_order(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    run = Run(tmp_path, "tiny")
    for name in ("understanding", "generation", "decoder"):
        with pytest.raises(ValueError, match=f"stage {name} needs stage clip first; .* has not finished it"):
            run.run_stage(name, tiny[name], quiet)
    with pytest.raises(ValueError, match=r"stage must be one of clip, .*, decoder, .*, got 'dream'"):
        run.run_stage("dream", tiny["clip"], quiet)
    run.run_stage("clip", tiny["clip"], quiet)
    with pytest.raises(ValueError, match="stage generation needs stage understanding first"):
        run.run_stage("generation", tiny["generation"], quiet)
    with pytest.raises(Interrupted), at_step("understanding", 1, interrupt):
        run.run_stage("understanding", tiny["understanding"], quiet)
    with pytest.raises(ValueError, match="in the middle of stage understanding; finish it before stage decoder"):
        Run(tmp_path, "tiny").run_stage("decoder", tiny["decoder"], quiet)


def test_another_preset_in_the_folder(
    tiny: dict[str, Recipe], snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="holds a run of preset 'tiny', not 'nano'"):
        Run(snapshots / "clip", "nano")
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], num_queries=5))
    with pytest.raises(ValueError, match="holds a run of another tiny: num_queries was 4, now 5"):
        Run(snapshots / "clip", "tiny")


def test_another_recipe_in_the_folder(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    with pytest.raises(Interrupted), at_step("clip", 3, interrupt):
        train(tmp_path, tiny, "clip")
    longer = {"clip": replace(tiny["clip"], steps=11, seed=9)}
    message = "begun with another recipe of stage clip: steps was 10, now 11, seed was 1, now 9"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, longer, "clip")
    train(tmp_path, tiny, "clip")
    with pytest.raises(ValueError, match=message):
        train(tmp_path, longer, "clip")


def test_two_runs_cannot_share_a_folder(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    """Their saves would mix; the lock ends with its holder, however that ends."""
    run = Run(tmp_path / "run", "tiny")
    with only_writer(tmp_path / "run", alone()):
        with pytest.raises(BlockingIOError, match="run is being trained in by another process"):
            run.run_stage("clip", tiny["clip"], quiet)
    run.run_stage("clip", tiny["clip"], quiet)


def test_differences_are_told_in_words() -> None:
    before = {"a": 1, "b": {"c": 2.0, "d": None}, "e": 0}
    assert differences(before, {"a": 1, "b": {"c": 2.0, "d": None}, "e": 0}) == []
    found = differences(before, {"a": 2, "b": {"c": 3.0, "d": None}, "f": 1})
    assert found == ["a was 1, now 2", "b.c was 2.0, now 3.0", "e was 0, now absent", "f was absent, now 1"]


def test_a_damaged_checkpoint_is_named(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    folder = copied(snapshots, "clip", tmp_path / "run")
    path = folder / "checkpoint" / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptModel, match=r"checkpoint/shard-.* is corrupt"):
        Run(folder, "tiny")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"preset": "tiny"}'])
def test_a_checkpoint_of_another_version_is_named(
    tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path, text: str
) -> None:
    folder = copied(snapshots, "clip", tmp_path / "run") / "checkpoint"
    (folder / "training.json").write_text(text)
    sums = {path.name: sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(sums, indent=2) + "\n")
    with pytest.raises(CorruptModel, match=r"checkpoint/training\.json (is|must be)"):
        Run(tmp_path / "run", "tiny")


def test_a_folder_of_someone_else_is_refused_before_training(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists and has no manifest"):
        Run(tmp_path, "tiny")


# the language model is frozen in generation


def understanding_survives(run: Run, chosen: Recipe) -> bool:
    """Whether generation training leaves every weight and answer of understanding as it was, bit for bit."""
    parts = ("clip.", "image_projector.", "llm.", "feature_")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items() if name.startswith(parts)}
    assert before and run.understood == fingerprint(run.model)
    run.run_stage("generation", chosen, quiet)
    after = run.model.state_dict()
    same = all(torch.equal(after[name], tensor) for name, tensor in before.items())
    untouched = not [name for name, parameter in run.model.llm.named_parameters() if parameter.grad is not None]
    assert same == (fingerprint(run.model) == run.understood)
    return same and untouched


def test_generation_leaves_understanding_alone(tiny: dict[str, Recipe], tmp_path: Path, snapshots: Path) -> None:
    folder = copied(snapshots, "understanding", tmp_path / "run")
    run = Run(folder, "tiny")
    assert understanding_survives(run, tiny["generation"])
    assert run.understood == fingerprint(from_pretrained(folder / "model")[0])
    assert_same_run(snapshots / "generation", folder)


def test_without_the_freeze_it_would_not(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: Path
) -> None:
    """The test above sees a missing freeze: gradients in the language model, and weights that move."""
    kind, built = stages.GenerationStage, stages.GenerationStage.__init__

    def thawed(self: stages.GenerationStage, model: Blip3o, chosen: Recipe, *banks: stages.FeatureBank) -> None:
        built(self, model, chosen, *banks)
        model.llm.requires_grad_(True)

    monkeypatch.setattr(kind, "__init__", thawed)
    run = Run(copied(snapshots, "understanding", tmp_path / "gradients"), "tiny")
    assert not understanding_survives(run, tiny["generation"])

    def everything(self: stages.GenerationStage) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name.startswith(("queries", "dit.", "llm."))}

    monkeypatch.setattr(kind, "trainable", everything)
    run = Run(copied(snapshots, "understanding", tmp_path / "weights"), "tiny")
    assert not understanding_survives(run, tiny["generation"])
    assert fingerprint(run.model) != run.understood


def test_the_fingerprint_sees_every_weight_of_understanding(tiny: dict[str, Recipe], lively: Blip3o) -> None:
    before = fingerprint(lively)
    for name, tensor in lively.state_dict().items():
        if name in ("llm.norm.weight", "clip.logit_scale", "queries"):
            kept = tensor.clone()
            tensor += 1e-3
            assert (fingerprint(lively) != before) == (name != "queries"), name
            tensor.copy_(kept)
    assert fingerprint(lively) == before


# losses that are no numbers


@pytest.mark.parametrize("poison", ["nan", "infinite gradient"])
def test_a_loss_that_is_no_number_changes_nothing(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: Path, poison: str
) -> None:
    monkeypatch.setitem(loop.train.__kwdefaults__, "save_every_seconds", 0.0)
    run = Run(tmp_path, "tiny")
    before: dict[str, Tensor] = {}

    def poisoned(self: Stage, loss: Tensor) -> Tensor:
        before.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
        zero = next(self.model.clip.parameters()).sum() * 0
        return loss * float("nan") if poison == "nan" else loss + zero.sqrt()

    with with_loss("clip", 4, poisoned):
        with pytest.raises(
            NonFiniteLoss, match=r"stage clip: step 4 was not applied, its loss is .*, its gradient norm"
        ):
            run.run_stage("clip", tiny["clip"], quiet)
    assert before and all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    saved = tensors_of(tmp_path)
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in before.items())
    assert state_of(tmp_path)["step"] == 4
    train(tmp_path, tiny, "clip")
    assert_same_run(snapshots / "clip", tmp_path)


# the pieces


def test_learning_rate_schedule(tiny: dict[str, Recipe]) -> None:
    chosen = replace(tiny["clip"], steps=100, warmup_steps=10, learning_rate=1e-2, final_learning_rate=1e-3)
    rates = [learning_rate(chosen, step) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-3 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1e-2) and rates[55] == pytest.approx(5.5e-3)
    assert rates[99] == pytest.approx(1e-3, rel=0.01) and rates[99] >= 1e-3
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert learning_rate(replace(chosen, warmup_steps=0), 0) == pytest.approx(1e-2)
    assert learning_rate(replace(chosen, steps=5), 4) == pytest.approx(5e-3)  # all warm-up


def test_what_decays(tiny: dict[str, Recipe], lively: Blip3o) -> None:
    """Matrices of products do; gains and biases never; what is looked up, if the recipe says so, as nano's does."""
    looked_up = {
        "queries", "clip.vision.positions", "clip.text.positions", "clip.text.embedding.weight", "llm.embedding.weight",
        "image_projector.places",
    }  # fmt: skip
    parameters = dict(lively.named_parameters())
    for decay_embeddings in (True, False):
        chosen = replace(tiny["clip"], weight_decay=0.5, decay_embeddings=decay_embeddings)
        groups = optimizer_for(parameters, chosen).param_groups
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
        decaying = {name for name, x in parameters.items() if any(x is one for one in groups[0]["params"])}
        matrices = {name for name, x in parameters.items() if x.dim() >= 2}
        assert decaying == matrices - (set() if decay_embeddings else looked_up)
        assert sum(len(group["params"]) for group in groups) == len(parameters)


def test_decay(tiny: dict[str, Recipe]) -> None:
    parameters = {"linear.weight": nn.Parameter(torch.ones(2, 2)), "linear.bias": nn.Parameter(torch.ones(2))}
    optimizer = optimizer_for(parameters, replace(tiny["clip"], weight_decay=0.5, learning_rate=0.1))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, bias = (parameter.tolist() for parameter in parameters.values())
    assert weight == [[pytest.approx(0.95)] * 2] * 2 and bias == [1, 1]


def test_gradients_are_clipped(tiny: dict[str, Recipe], tmp_path: Path) -> None:
    """The update is that of the clipped gradient; the log tells the norm before clipping."""
    train(tmp_path / "free", {"clip": replace(tiny["clip"], clip_norm=1e9)}, "clip")
    train(tmp_path / "clipped", {"clip": replace(tiny["clip"], clip_norm=1e-3)}, "clip")
    free, clipped = log_of(tmp_path / "free"), log_of(tmp_path / "clipped")
    assert free[0] == clipped[0] and float(str(free[0]["grad_norm"])) > 1e-3


def test_the_log_is_rewound(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rewind_log(log, "clip", 3)
    assert not log.exists()
    rows = [{"stage": stage, "step": step} for stage in ("clip", "decoder") for step in (1, 2, 3, 4)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    log.write_text(whole + '{"stage": "deco')  # the last line was cut short
    rewind_log(log, "decoder", 2)
    assert log.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:6])
    rewind_log(log, "decoder", 0)
    assert log.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:4])
    log.write_text(whole.replace("}", "", 1))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: expected a row of the training log, got"):
        rewind_log(log, "clip", 3)


def test_log_rows(tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    train(tmp_path, tiny, "clip")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 10]
    expected = {"stage", "step", "loss", "grad_norm", "learning_rate", "contrast", "pixels", "accuracy", *TIMES} - {
        "mfu"
    }
    assert all(row.keys() == expected for row in rows)
    assert [row["learning_rate"] for row in rows] == [learning_rate(tiny["clip"], step) for step in (3, 7, 9)]
    seconds = [row["seconds"] for row in rows]
    spans = [seconds[0], seconds[1] - seconds[0], seconds[2] - seconds[1]]
    for row, span, steps in zip(rows, spans, (4, 4, 2), strict=True):
        assert row["samples_per_second"] == pytest.approx(8 * steps / span, rel=0.05)
