"""The checkpoint: whole or absent, checked at every load, cut anew for any number of processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_processes import Drawing, on_processes, share, tiny_model
from safetensors.torch import load_file
from torch import Tensor

from blip3o.train import checkpoint as module
from blip3o.train import devices as processes
from blip3o.train.checkpoint import Checkpoint
from blip3o.train.devices import Devices, clip, start
from blip3o.weights import CorruptModel
from blip3o.weights_files import WrongTensors

SAVED, STEPS = 2, 4


class Training:
    """A stage with its optimiser, and all that a checkpoint of it holds."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.stage = Drawing(tiny_model())
        self.loss_of = devices.wrap(self.stage, "fsdp")
        self.parameters = self.stage.trainable()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-3, fused=True)
        self.tensors: dict[str, Tensor] = {f"model.{n}": tensor for n, tensor in self.stage.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
            self.tensors |= {f"{key}.{name}": tensor for key, tensor in self.optimizer.state[parameter].items()}

    def step(self, number: int) -> float:
        batch = self.stage.batch(number, share(self.devices))
        (weight,) = self.devices.sum(batch.weight)
        loss, _ = self.loss_of(batch, True)
        (loss / weight).backward()
        clip(list(self.parameters.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.devices.sum(loss.item())[0] / weight


def trained(folder: Path, last: int) -> list[float]:
    """The losses from the checkpoint, if there is one, up to `last`; saved after SAVED, while training goes on."""
    losses = []
    with start() as devices:
        checkpoint, training = Checkpoint(folder / "checkpoint", devices), Training(devices)
        first = 0
        if checkpoint.exists():
            first = checkpoint.read_state()["step"]
            checkpoint.read_tensors(training.tensors)
        for step in range(first, last):
            losses.append(training.step(step))
            if step + 1 == SAVED:
                checkpoint.write_behind(checkpoint.snapshot(training.tensors, {"step": SAVED}))
        checkpoint.wait()
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four processes, saved after SAVED steps and then cut; not to be written to."""
    folder = tmp_path_factory.mktemp("saved")
    on_processes(4, trained, folder, SAVED + 1)
    return folder


def test_saved_on_four_resumed_on_one_two_or_eight(saved: Path, tmp_path: Path, one_thread: None) -> None:
    uncut = trained(tmp_path / "uncut", STEPS)
    for world in (1, 2, 8):
        folder = Path(shutil.copytree(saved, tmp_path / str(world)))
        found = on_processes(world, trained, folder, STEPS) if world > 1 else [trained(folder, STEPS)]
        for losses in found:
            assert losses == pytest.approx(uncut[SAVED:], rel=1e-6), world


def test_what_is_written(saved: Path) -> None:
    """A piece from each process, the plain values and the sums: no pickle, and no more than that."""
    names = {path.name for path in (saved / "checkpoint").iterdir()}
    shards = {f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in range(1, 5)}
    assert names == {"manifest.json", "training.json", *shards}
    assert {path.name for path in saved.iterdir()} == {"checkpoint"}
    assert json.loads((saved / "checkpoint/training.json").read_text()) == {"step": SAVED}


def pieces(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "checkpoint").glob("shard*"))
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def test_training_goes_on_bit_for_bit(tmp_path: Path, one_thread: None) -> None:
    """On as many processes as before: then a save after the end is the same whether the run was cut or not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, parts in ((whole, (STEPS,)), (cut, (SAVED, STEPS))):
        for last in parts:
            on_processes(2, saved_at_the_end, folder, last)
    expected, found = pieces(whole), pieces(cut)
    assert len(expected) > 100 and expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


def saved_at_the_end(folder: Path, last: int) -> None:
    with start() as devices:
        checkpoint, training = Checkpoint(folder / "checkpoint", devices), Training(devices)
        first = 0
        if checkpoint.exists():
            first = checkpoint.read_state()["step"]
            checkpoint.read_tensors(training.tensors)
        for step in range(first, last):
            training.step(step)
        checkpoint.write(checkpoint.snapshot(training.tensors, {"step": last}))


# damage


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run")) / "checkpoint"


@pytest.fixture
def alone() -> Devices:
    return processes.alone()


def shard(rank: int) -> str:
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


def swap(folder: Path) -> None:
    one, other = folder / shard(1), folder / shard(2)
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda folder: flip(folder / shard(3)), f"{shard(3)} is corrupt"),
    "a state of another step": (lambda folder: (folder / "training.json").write_text("{}"), "training.json is corrupt"),
    "swapped": (swap, f"{shard(1)} is corrupt"),
    "missing": (lambda folder: (folder / shard(2)).unlink(), f"{shard(2)} is missing"),
    "no state": (lambda folder: (folder / "training.json").unlink(), "training.json is missing"),
    "one too many": (
        lambda folder: shutil.copy(folder / shard(0), folder / "more.safetensors"),
        "more.safetensors has no sum in manifest.json",
    ),
    "a folder instead": (lambda folder: (folder / "more").mkdir(), "more has no sum in manifest.json"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, damaged: Path, alone: Devices) -> None:
    spoil, message = DAMAGE[kind]
    spoil(damaged)
    with pytest.raises(CorruptModel, match=message):
        Checkpoint(damaged, alone).read_state()


def complaint(folder: Path) -> str:
    with start() as devices:
        try:
            Checkpoint(folder, devices).read_state()
        except CorruptModel as error:
            return str(error)
    return ""


def test_all_processes_hear_of_damage(damaged: Path) -> None:
    """Each computes the sums of some files only."""
    for rank in range(4):
        flip(damaged / shard(rank))
        assert on_processes(2, complaint, damaged) == [f"{damaged / shard(rank)} is corrupt: {SUM}"] * 2
        flip(damaged / shard(rank))
    assert on_processes(2, complaint, damaged) == ["", ""]


SUM = "its SHA-256 sum is not the manifest's"


def test_other_tensors_than_were_saved(saved: Path, alone: Devices) -> None:
    training = Training(alone)
    tensors = dict(training.tensors)
    tensors["model.queries"] = torch.zeros(3, 32)
    tensors["model.more"] = torch.zeros(1)
    tensors["exp_avg.queries"] = tensors["exp_avg.queries"].double()
    del tensors["model.feature_mean"]
    with pytest.raises(WrongTensors) as caught:
        Checkpoint(saved / "checkpoint", alone).read_tensors(tensors)
    assert (caught.value.missing, caught.value.unexpected) == (["model.more"], ["model.feature_mean"])
    assert caught.value.wrong == [
        "exp_avg.queries is torch.float32 [4, 32], expected torch.float64 [4, 32]",
        "model.queries is torch.float32 [4, 32], expected torch.float32 [3, 32]",
    ]


# a writer that fails, or is killed


def state_in(folder: Path, devices: Devices) -> dict[str, object] | None:
    checkpoint = Checkpoint(folder, devices)
    checkpoint.settle()
    return checkpoint.read_state() if checkpoint.exists() else None


def test_leftovers_go_and_what_was_put_aside_comes_back(damaged: Path, alone: Devices) -> None:
    new, old = damaged.with_name("checkpoint.new"), damaged.with_name("checkpoint.old")
    damaged.rename(old)  # killed between its two renames
    shutil.copytree(old, new)
    assert state_in(damaged, alone) == {"step": SAVED}
    assert [path.name for path in damaged.parent.iterdir()] == ["checkpoint"]
    shutil.copytree(damaged, old)  # killed after them
    (old / "training.json").write_text("older")
    assert state_in(damaged, alone) == {"step": SAVED}
    assert [path.name for path in damaged.parent.iterdir()] == ["checkpoint"]
    damaged.rename(new)  # killed at the first save: what is half written is nothing
    assert state_in(damaged, alone) is None and not list(damaged.parent.iterdir())


def failing(folder: Path) -> list[str]:
    """Rank 1 cannot flush its file."""

    def full(path: Path) -> None:
        raise OSError(f"{path.name}: no space left on the disk")

    found = []
    with start() as devices:
        checkpoint, training = Checkpoint(folder, devices), Training(devices)
        checkpoint.write(checkpoint.snapshot(training.tensors, {"step": 1}))
        if devices.rank == 1:
            module.flush = full
        checkpoint.write_behind(checkpoint.snapshot(training.tensors, {"step": 2}))
        for call in (checkpoint.wait, checkpoint.wait):
            try:
                call()
            except OSError as error:
                found.append(str(error))
        found.append(str(checkpoint.read_state()))
    return found


def test_a_save_that_fails_on_one_process(tmp_path: Path) -> None:
    expected = [f"{shard(1)}: no space left on the disk", "{'step': 1}"]
    assert on_processes(2, failing, tmp_path / "checkpoint") == [expected] * 2


def test_a_snapshot_is_of_its_moment(tmp_path: Path, alone: Devices) -> None:
    checkpoint, tensors = Checkpoint(tmp_path / "checkpoint", alone), {"model.a": torch.zeros(3)}
    snapshot = checkpoint.snapshot(tensors, {})
    tensors["model.a"] += 1
    checkpoint.write(snapshot)
    checkpoint.read_tensors(tensors)
    assert torch.equal(tensors["model.a"], torch.zeros(3))
