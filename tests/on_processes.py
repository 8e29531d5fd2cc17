"""For tests of several processes: functions that run on each of them, as torchrun would start it, and small stages."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from conftest import narrow
from torch import Tensor, nn

from blip3o.layers import linear_cross_entropy
from blip3o.model import Blip3o
from blip3o.presets import preset
from blip3o.train.batch import Batch
from blip3o.train.devices import Devices
from blip3o.train.recipe import Recipe

ROWS = 8  # of a batch
TOKENS = 12


def on_processes(world: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
    """What function(*arguments) returns on each of `world` processes, in order of rank."""
    context = multiprocessing.get_context("forkserver")  # which loads torch once; a fork of pytest itself has threads
    context.set_forkserver_preload(["conftest", "on_processes", "blip3o.train.checkpoint"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(world, mp_context=context) as executor:
        running = [executor.submit(_start, rank, world, port, function, arguments) for rank in range(world)]
        return [future.result() for future in running]


def _start(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    return function(*arguments)


@dataclass(frozen=True)
class Rows(Batch):
    tokens: Tensor
    x: Tensor | None  # features of the rows that have a picture; the first ones


def tiny_model() -> Blip3o:
    torch.manual_seed(5)
    model = Blip3o(narrow(preset("nano")))
    with torch.no_grad():
        for parameter in model.dit.parameters():  # what starts at zero would hide mistakes
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def share(devices: Devices, part: int = 0, accumulate: int = 1) -> range:
    """The rows of one part of a batch."""
    size = ROWS // devices.world // accumulate
    start = (devices.rank * accumulate + part) * size
    return range(start, start + size)


class Drawing:
    """The diffusion transformer and the queries learn; the language model is frozen."""

    name, unit = "generation", 1
    recipe: Recipe  # which nothing here asks for

    def __init__(self, model: Blip3o) -> None:
        self.model = model
        model.llm.requires_grad_(False)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {k: p for k, p in self.model.named_parameters() if k == "queries" or k.startswith("dit.")}

    def batch(self, step: int, rows: range) -> Rows:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(8, 100, (ROWS, TOKENS), generator=generator)
        x = torch.randn(ROWS, self.model.config.dit.grid**2, self.model.config.dit.in_channels, generator=generator)
        x = x[rows.start : rows.stop]
        return Rows(float(x.numel()), [], ids[rows.start : rows.stop], x)

    def loss(self, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        model, x = self.model, batch.x
        assert x is not None
        hidden = model.condition(batch.tokens, torch.ones_like(batch.tokens, dtype=torch.bool))
        context = model.dit.context(model.dit.project(hidden))
        loss = (model.dit(x, torch.full((len(x),), 500.0), context) - 1.0).square().sum()
        return loss, {}

    def finish(self) -> None:
        raise AssertionError("the loop alone finishes a stage")


class Talking:
    """The language model and the projector learn. Only the first half of a batch has pictures."""

    name, unit = "understanding", 1
    recipe: Recipe

    def __init__(self, model: Blip3o) -> None:
        self.model = model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {k: p for k, p in self.model.named_parameters() if k.startswith(("llm.", "image_projector."))}

    def batch(self, step: int, rows: range) -> Rows:
        generator, config = torch.Generator().manual_seed(step), self.model.config
        count = config.feature_grid**2
        ids = torch.randint(8, 100, (ROWS, TOKENS + count), generator=generator)
        pictures = ROWS // 2 if step % 3 else 0  # in some steps nobody has any
        ids[:pictures, :count] = config.image_token
        x = torch.randn(pictures, count, config.clip.width, generator=generator)[rows.start : rows.stop]
        asked = torch.randint(2, TOKENS, (ROWS,), generator=generator)  # how many tokens, row by row
        ids = torch.where(torch.arange(TOKENS + count) < count + asked[:, None], ids, 0)[rows.start : rows.stop]
        return Rows(float((ids[:, count:] > 0).sum()), [], ids, x if len(x) else None)

    def loss(self, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        count = self.model.config.feature_grid**2
        asked = torch.zeros_like(batch.tokens, dtype=torch.bool)
        asked[:, count:] = batch.tokens[:, count:] > 0
        hidden = self.model.read(batch.tokens, batch.x, asked)
        loss = linear_cross_entropy(hidden, self.model.llm.output_weight, batch.tokens[asked]) * len(hidden)
        return loss, {}

    def finish(self) -> None:
        raise AssertionError("the loop alone finishes a stage")


STAGES: dict[str, Callable[[Blip3o], Drawing | Talking]] = {"generation": Drawing, "understanding": Talking}
