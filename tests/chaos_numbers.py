"""NaN and infinity in data, activations and gradients, on one process of those that train: no other may learn of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import chaos_run
import torch
from chaos_process import Child, Say, tail
from chaos_run import STAGES, digest
from chaos_table import Line
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blip3o.train import stages
from blip3o.train.devices import start
from blip3o.train.log import BAD_BATCHES

PLACES = ("data", "activation", "gradient")
VALUES = (float("nan"), float("inf"))
WAYS = ((2, "ddp"), (1, "ddp"), (2, "fsdp"))  # how many processes, and how they share the work
BAD = (4, 5)  # steps: one may be left out, the second stops
KINDS: dict[str, Any] = {"understanding": stages.UnderstandingStage, "generation": stages.GenerationStage}


@dataclass(frozen=True)
class Case:
    place: str
    value: float
    stage: str
    world: int
    parallel: str
    sick: int  # the rank with the bad numbers

    def __str__(self) -> str:
        return f"{self.value} in {self.place}, {self.stage}, rank {self.sick} of {self.world}, {self.parallel}"


def poison(case: Case, rank: int, say: Say) -> None:
    """From now on the stage's steps BAD are poisoned on rank `case.sick`, which says their samples' ids. Each rank says
    the digest of its weights before these steps."""
    kind, calls = KINDS[case.stage], itertools.count()
    loss = kind.loss

    def poisoned(self: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        step = next(calls)
        if step in BAD:
            say(f"weights {weights(self.model)}")
        bad = step in BAD and rank == case.sick
        if bad:
            say(f"ids {json.dumps(batch.ids)}")
        network = self.model.llm if case.stage == "understanding" else self.model.dit
        if bad and case.place == "data":
            for tensor in batch.tensors().values():
                if tensor.is_floating_point():
                    tensor.view(-1)[0] = case.value
        elif bad:
            change = to_output if case.place == "activation" else to_gradient
            with network.register_forward_hook(partial(change, case.value)):
                return loss(self, batch)
        return loss(self, batch)

    kind.loss = poisoned


def weights(model: nn.Module) -> str:
    """SHA-256 of what this process holds of a model's parameters."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held = held.detach().flatten().clone()  # of what FSDP has gathered, numpy() would keep it from freeing
        total.update(held.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def to_output(value: float, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output * value


def to_gradient(value: float, module: nn.Module, inputs: object, output: Tensor) -> None:
    output.register_hook(lambda gradient: gradient * value)


def train(run: Path, case: Case, rank: int, port: int, say: Say) -> None:
    """One process. Rank 0 says the digest of each commit's tensors."""
    if case.world > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")

    def act(event: str, path: Path, target: Path | None) -> None:
        if target is not None and target.name == "checkpoint":
            say(f"commit {digest(path, state=False)}")

    chaos_run.watch_saves(run, act)
    poison(case, rank, say)
    with start() as devices:
        chaos_run.train(run, (case.stage,), steps=8, devices=devices, max_bad_batches=1, parallel=case.parallel)


def cases(times: int, seed: int) -> list[Case]:
    choices = random.Random(seed)
    every = [
        Case(place, value, stage, world, parallel, choices.randrange(world))
        for (world, parallel), place, value, stage in itertools.product(WAYS, PLACES, VALUES, STAGES)
    ]
    choices.shuffle(every)
    rounds: defaultdict[object, Iterator[int]] = defaultdict(itertools.count)  # of each, one of all ways and stages
    every.sort(key=lambda case: next(rounds[case.world, case.parallel, case.stage]))
    return (every * (times // len(every) + 1))[:times]


def measure(times: int, seed: int, folder: Path) -> list[Line]:
    skipped = Line("a step with a bad number changes nothing on disk: weights, moments, EMA")
    still = Line("nor a weight in the memory of any process")
    moved = Line("steps before it do")
    written = Line("the ids of its samples are written down")
    stopped = Line("above the limit all processes stop, and say why")
    begun: dict[str, Path] = {"understanding": chaos_run.begun(folder / "understanding")}
    begun["generation"] = Path(shutil.copytree(begun["understanding"], folder / "generation"))
    finish = Child(lambda say: chaos_run.train(begun["generation"], ("understanding",), steps=2), folder / "begin.err")
    finish.wait()
    finish.check()
    for number, case in enumerate(cases(times, seed)):
        run = Path(shutil.copytree(begun[case.stage], folder / f"run{number}"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        errors = [folder / f"rank{rank}.err" for rank in range(case.world)]
        works: list[Callable[[Say], None]] = [partial(train, run, case, rank, port) for rank in range(case.world)]
        children = [Child(work, error) for work, error in zip(works, errors, strict=True)]
        said = [child.wait() for child in children]
        commits = [line.removeprefix("commit ") for line in said[0] if line.startswith("commit ")]
        names = [json.loads(line.removeprefix("ids ")) for line in said[case.sick] if line.startswith("ids ")]
        for rank, lines in enumerate(said):
            before = [line for line in lines if line.startswith("weights ")]
            still.hold(len(before) == 2 and before[0] == before[1], f"{case}: rank {rank} moved")
        moved.hold(len(set(commits[: BAD[0]])) == BAD[0], f"{case}: {len(commits)} commits\n{tail(errors[0])}")
        skipped.hold(commits[BAD[0] - 1 : BAD[1]] == commits[BAD[0] - 1 : BAD[0]] * 2, f"{case}: {commits}")
        noted = (run / BAD_BATCHES).read_text() if (run / BAD_BATCHES).exists() else ""
        rows = [json.loads(line) for line in noted.splitlines()]
        held = [
            row["step"] == step + 1 and set(ids) <= set(row["ids"]) and (case.place == "gradient" or ids == row["ids"])
            for row, step, ids in zip(rows, BAD, names, strict=False)
        ]
        written.hold(held == [True, True], f"{case}: {rows}, expected {names}")
        for child, error in zip(children, errors, strict=True):
            text = error.read_text()
            stopped.hold(child.status != 0 and "NonFiniteLoss" in text, f"{case}: status {child.status}\n{tail(error)}")
        shutil.rmtree(run)
    return [skipped, still, moved, written, stopped]
