"""A preset that trains in seconds: `nano` with narrow networks, and recipes of a few steps. How tests share a machine.

Everything runs on one thread, sums in one order: inputs are tiny, and of two threads on a busy machine one waits for
the other. A second core runs the programs that some tests only look at (`@pytest.mark.program`).
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the programs that tests start

import pytest
import torch

from blip3o import generate
from blip3o.config import Blip3oConfig
from blip3o.model import Blip3o
from blip3o.presets import PRESETS, preset
from blip3o.processor import Processor
from blip3o.train import loop, run, stages
from blip3o.train.recipe import STAGES, Recipe
from blip3o.train.recipe_files import load_recipe
from blip3o.weights import save_pretrained

if TYPE_CHECKING:
    from parity import World

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).with_name("tiny.toml")  # nano's recipe in a few steps


def narrow(config: Blip3oConfig) -> Blip3oConfig:
    clip, decoder = config.clip, config.decoder
    assert clip.text is not None and decoder is not None
    text = replace(clip.text, width=32, depth=1, num_heads=2, mlp_width=64)
    return replace(
        config,
        name="tiny",
        clip=replace(clip, width=32, depth=1, num_heads=2, mlp_width=64, embed_dim=16, text=text),
        llm=replace(config.llm, width=32, depth=2, num_heads=2, num_kv_heads=1, mlp_width=64),
        dit=replace(
            config.dit, in_channels=32, width=32, depth=2, num_heads=2, num_kv_heads=1, mlp_width=64,
            condition_width=32, time_width=32,
        ),
        decoder=replace(decoder, feature_width=32, width=32, depth=1, num_heads=2, mlp_width=64, time_width=32),
        num_queries=4,
    )  # fmt: skip


def register(patch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    """Makes the preset "tiny" known, and returns its stages' recipes; every step is logged, answers are short."""
    recipes = load_recipe(TINY).stages
    patch.setitem(PRESETS, "tiny", narrow(preset("nano")))
    patch.setattr(loop, "LOG_EVERY", 1)
    patch.setattr(loop, "step_flops", lambda step: 0)  # which takes as long as a step does
    patch.setattr(stages, "STATISTICS", 64)
    patch.setattr(run, "FINGERPRINT_QUESTIONS", 4)
    patch.setattr(generate, "LONGEST_ANSWER", 8)  # which these models always reach
    patch.setitem(generate.answer_ids.__wrapped__.__kwdefaults__, "limit", 8)
    return recipes


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    return register(monkeypatch)


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset "tiny" on one thread, copied after each stage into a folder of its name; to be left alone."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        recipes = register(patch)
        trained = run.Run(folder / "run", "tiny")
        for stage in STAGES:
            trained.run_stage(stage, recipes[stage], lambda _: None)
            shutil.copytree(folder / "run", folder / stage)
    return folder


@pytest.fixture(scope="session")
def lively() -> Blip3o:
    """A narrow model with random weights everywhere: what starts at zero in a new model hides mistakes."""
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(11)
    model = Blip3o(narrow(preset("nano"))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1))
        model.feature_mean.normal_(generator=generator)
        model.feature_std.uniform_(0.5, 2.0, generator=generator)
    return model


@pytest.fixture(scope="session")
def model_folder(lively: Blip3o, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of `lively`; not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(lively, Processor(image_size=lively.config.clip.image_size), folder)
    return folder


@pytest.fixture(scope="session")
def world() -> "World":
    """Other people's networks, and blip3o's with the same weights; to be left as they are."""
    for library in ("transformers", "diffusers"):
        pytest.importorskip(library, reason=f"needs {library}: pip install {library}")
    from parity import World

    return World()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


Result = subprocess.CompletedProcess[str]
PROGRAMS: dict[str, Future[Result]] = {}
WAITING: deque[tuple[str, list[str], dict[str, str]]] = deque()


def _run_programs(take: Callable[[], tuple[str, list[str], dict[str, str]]]) -> None:
    """One after the other, as long as there are any."""
    while WAITING:
        try:
            test, command, environment = take()
        except IndexError:  # the other thread was faster
            return
        try:
            run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError as error:  # or the test would wait for ever
            PROGRAMS[test].set_exception(error)
        else:
            PROGRAMS[test].set_result(run)


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what it puts in the background with Ctrl-C ignored; the tests of Ctrl-C need it heard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "program(*arguments, **environment): the Python program that the test looks at")
    config.addinivalue_line("markers", "gpu_code: machine code and planted faults of CUDA, `make check-gpu-code`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of programs come last."""
    items.sort(key=lambda item: item.get_closest_marker("program") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Their programs are started now, one after the other, beside the tests."""
    if session.config.option.collectonly:
        return
    gc.collect()
    gc.freeze()  # thousands of tests and torch's modules stay to the end: collections need not look through them
    for item in session.items:
        marker = item.get_closest_marker("program")
        if marker is not None:
            WAITING.append((item.nodeid, [sys.executable, *marker.args], {**os.environ, **marker.kwargs}))
            PROGRAMS[item.nodeid] = Future()
    Thread(target=_run_programs, args=[WAITING.popleft]).start()


def pytest_sessionfinish() -> None:
    WAITING.clear()  # after a failure with -x nobody wants the others


@pytest.fixture(scope="session")
def helper() -> None:
    """A second thread for programs, from the last on, once there is nothing to do but to wait for them."""
    Thread(target=_run_programs, args=[WAITING.pop]).start()


@pytest.fixture
def program(request: pytest.FixtureRequest, helper: None) -> Result:
    """What the test's program printed, once it has ended."""
    return PROGRAMS[request.node.nodeid].result()
