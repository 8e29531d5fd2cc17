"""The command line: what works, and that every mistake of a user ends in one line that names it, and status 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

from blip3o import cli, doctor, generate
from blip3o.data import scenes, text
from blip3o.evaluate import exam
from blip3o.model import Blip3o
from blip3o.processor import Processor, to_pil
from blip3o.train import loop, stages
from blip3o.train.recipe import STAGES, Recipe
from blip3o.weights import CONFIG, WEIGHTS
from blip3o_kernels import use


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    to_pil(scenes.render(scenes.sample(3, torch.arange(1)))[0]).save(path)
    return path


def run(*arguments: object) -> int:
    """Exit status of a command in this process; argparse leaves by SystemExit, as the console script does."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        assert isinstance(leaving.code, int)
        return leaving.code


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command fails."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("blip3o: ")
    return captured.err


def pixels(image: Image.Image) -> torch.Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1) / 255


# good paths


def test_generate(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "folder" / "drawing.png"
    drawn = ("generate", "A red circle left of a blue square!", "--model", model_folder, "--steps", 2, "--out", out)
    assert run(*drawn, "-n", 3, "--seed", 7, "--scale", 2) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: drawings of 'A red circle left of a blue square!' from seeds 7 8 9\n"
    assert captured.err == ""
    with Image.open(out) as image:
        assert image.size == (2 * (3 * 32 + 2 * 2), 2 * 32) and image.mode == "RGB"
        row = pixels(image)[:, ::2, ::2]
    assert bool((row[:, :, 32:34] == 1).all())  # the gap
    assert run(*drawn, "--seed", 8, "--scale", 1) == 0
    with Image.open(out) as image:
        alone = pixels(image)
    torch.testing.assert_close(row[:, :, 34:66], alone, atol=3 / 255, rtol=0)


def test_ask(model_folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", picture, "What colour is the circle?", "--model", model_folder) == 0
    answer = capsys.readouterr().out
    assert answer.endswith("\n") and all(word in text.WORDS for word in answer.split())


def test_evaluate(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = generate.draw
    monkeypatch.setattr(generate, "draw", lambda *arguments: draw(*arguments, steps=1, decoder_steps=1))
    out = tmp_path / "folder" / "scores.json"
    assert run("evaluate", "--model", model_folder, "--prompts", 2, "--questions", 2, "--json", out) == 0
    table = capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert set(scores) == {"generation", "understanding", "intervals", "counts"}
    assert set(scores["generation"]) == {"overall", *text.CATEGORIES}
    assert set(scores["understanding"]) == {"overall", "held_out", *exam.ASKED}
    assert scores["counts"]["generation.held_out"] == 2
    lines = table.splitlines()
    assert len(lines) == len(scores["generation"]) + len(scores["understanding"])
    low, high = scores["intervals"]["generation.overall"]
    value = scores["generation"]["overall"]
    assert lines[0] == f"{'generation.overall':32} {value:.3f}   95 % interval {low:.3f} to {high:.3f}"


def test_train_in_two_goes(
    tiny: dict[str, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = (TINY, "--out", tmp_path, "steps=3")
    assert run("train", "--stage", "clip", *shared) == 0
    assert capsys.readouterr().out == f"model in {tmp_path / 'model'}\n"
    assert run("train", *shared) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("stage clip is finished") and out[-1] == f"model in {tmp_path / 'model'}"
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [stage for stage in STAGES for _ in range(3)]
    assert run("train", TINY, "steps=4", "--out", tmp_path) == 2
    message = f"{tmp_path} was begun with another recipe of stage clip: steps was 3, now 4"
    assert capsys.readouterr().err == f"blip3o: {message}\n"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [line.split()[0] for line in lines] == list(found)
    assert {
        "blip3o",
        "torch",
        "cores",
        "native_cpu",
        "openmp_runtimes",
        "rms_norm.float32",
        "attention.bfloat16",
    } <= set(found)


def test_doctor_tells_what_a_forced_backend_cannot_do() -> None:
    with use("reference"):
        assert doctor.examine()["forced_backend"] == "reference"
    with use("triton"):
        found = doctor.examine()
        assert "asked for" in str(found["flow_loss.float32"]) or "triton" in str(found["flow_loss.float32"])


def test_doctor_ends_in_status_2_where_the_machine_is_unsound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: ["/a/libgomp.so", "/b/libiomp5.so"])
    assert run("doctor", "--json") == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["openmp_runtimes"] == ["/a/libgomp.so", "/b/libiomp5.so"]
    assert captured.err == "blip3o: 2 OpenMP runtimes are loaded, expected one: /a/libgomp.so, /b/libiomp5.so\n"


# mistakes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "7b"], "recipe must be a TOML file or one of"),
        (["train", "7b"], "recipe must be a TOML file or one of"),
        (["train", "nano", "model=7b"], "name must be one of ['4b', '8b', 'nano'], got '7b'"),
        (["train", "none.toml"], "No such file or directory: 'none.toml'"),
        (["train", "nano", "--stage", "dream"], "stage must be one of clip, understanding, generation, decoder, got"),
        (["train", "nano", "colour=3"], "unknown key 'colour': expected one of steps,"),
        (["train", "nano", "step=3"], "unknown key 'step': did you mean 'steps'?"),
        (["train", "nano", "steps"], "overrides are written key=value, got 'steps'"),
        (["train", "nano", "steps=many"], "steps must be of type int, got 'many'"),
        (["train", "nano", "clip.steps=0"], "stage clip: steps must be at least 1, got 0"),
        (["train", "nano", "--stage", "understanding"], "stage understanding needs stage clip first"),
    ],
)
def test_mistakes_in_training(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in complaint(capsys, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "a red dragon"], "unknown: 'dragon' in 'a red dragon'"),
        (["generate", "a red\ndragon"], "unknown: 'dragon' in 'a red\\ndragon'"),
        (["generate", ""], "text must hold at least one word, got ''"),
        (["generate", "a red circle", "-n", "0"], "n must be at least 1, got 0"),
        (["generate", "a red circle", "--steps", "0"], "steps must be at least 1, got 0"),
        (["generate", "a red circle", "--guidance", "nan"], "guidance must be finite, got nan"),
        (["generate", "a red circle", "--scale", "0"], "scale must be at least 1, got 0"),
        (["generate", "a red circle", "--seed", "-1"], "seeds must be"),
        (["generate", "a red circle", "--seed", str(2**70)], "seeds must be"),
        (["generate", "a red circle", "--steps", "1", "--out", "OUT/x.nonsense"], "out must end as a picture does"),
        (["generate", "a red circle", "--steps", "1", "--out", "FILE/x.png"], "FILE"),
        (["ask", "PICTURE", ""], "text must hold at least one word, got ''"),
        (["ask", "PICTURE", "   "], "text must hold at least one word"),
        (["ask", "PICTURE", "where is the elephant?"], "unknown: 'elephant'"),
        (["ask", "FILE", "how many circles?"], "cannot read the image 'FILE': cannot identify image file"),
        (["ask", "OUT", "how many circles?"], "cannot read the image 'OUT'"),
        (["ask", "OUT/none.png", "how many circles?"], "cannot read the image 'OUT/none.png': [Errno 2] No such file"),
        (["ask", "CUT", "how many circles?"], "cannot read the image 'CUT'"),
        (["evaluate", "--prompts", "0"], "count must be at least 1 prompt of each category, got 0"),
    ],
)
def test_mistakes_with_a_model(
    arguments: list[str], named: str, model_folder: Path, picture: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    out = tmp_path / "out"
    out.mkdir()
    places = {"PICTURE": picture, "FILE": tmp_path / "file", "OUT": out, "CUT": tmp_path / "cut.png"}
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
        named = named.replace(word, str(place))
    if arguments[0] == "generate" and "--out" not in arguments:
        arguments = [*arguments, "--out", str(out / "drawing.png")]
    assert named in complaint(capsys, *arguments, "--model", model_folder)
    assert not (out / "drawing.png").exists()


COMMANDS: Sequence[Sequence[object]] = (
    ("generate", "a red circle"),
    ("ask", "PICTURE", "how many circles?"),
    ("evaluate",),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_missing_or_corrupt_model(
    command: Sequence[object], model_folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [picture if argument == "PICTURE" else argument for argument in command]
    line = complaint(capsys, *command, "--model", tmp_path / "nowhere")
    assert line == f"blip3o: model folder {tmp_path / 'nowhere'} does not exist\n"
    assert f"{tmp_path} is no model folder: it has no manifest.json" in complaint(capsys, *command, "--model", tmp_path)
    damaged = Path(shutil.copytree(model_folder, tmp_path / "damaged"))
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[5000] ^= 1
    (damaged / WEIGHTS).write_bytes(content)
    assert f"{damaged / WEIGHTS} is corrupt" in complaint(capsys, *command, "--model", damaged)
    (damaged / CONFIG).unlink()
    assert f"{damaged / CONFIG} is missing" in complaint(capsys, *command, "--model", damaged)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "the following arguments are required: prompt"),
        (["generate", "a red circle", "-n", "many"], "argument -n: invalid int value: 'many'"),
        (["ask", "picture.png"], "the following arguments are required: question"),
        (["evaluate", "--part", "all"], "argument --part: invalid choice: 'all'"),
        (["doctor", "--colour"], "unrecognized arguments: --colour"),
        (["doctor", "steps=3"], "unrecognized arguments: steps=3"),
        (["train"], "the following arguments are required: RECIPE"),
        (["train", "nano", "--preset", "nano"], "unrecognized arguments: --preset"),
    ],
)
def test_mistakes_in_the_arguments(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, *arguments)
    assert named in line and "--help)" in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0 and "COMMAND" in capsys.readouterr().out
    for command in ("demo", "train", "generate", "ask", "evaluate", "doctor"):
        assert run(command, "--help") == 0
        assert f"blip3o {command}" in capsys.readouterr().out


def test_a_loss_that_is_no_number(
    tiny: dict[str, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.F, "mse_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    assert run("train", TINY, "--stage", "clip", "--out", tmp_path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("blip3o: stage clip: step 0 was not applied, its loss is nan")


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug"), AssertionError("a bug")]
)
def test_mistakes_of_the_program_keep_their_traceback(
    error: Exception, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate, "generate", broken)
    with pytest.raises(type(error), match="a bug"):
        run("generate", "a red circle", "--model", model_folder)


def test_guidance_and_steps_have_their_defaults_in_generate(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []

    def spy(*_: object, **options: object) -> torch.Tensor:
        seen.append(options)
        return torch.zeros(1, 3, 32, 32)

    monkeypatch.setattr(generate, "generate", spy)
    command = ("generate", "a red circle", "--model", model_folder, "--out", tmp_path / "x.png")
    run(*command)
    run(*command, "--guidance", "1.5", "--steps", "3")
    assert seen == [{"n": 1, "seed": 0}, {"n": 1, "seed": 0, "guidance": 1.5, "steps": 3}]


# as a process


def launch(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    paths = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "blip3o.cli", *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_a_process_ends_in_one_line_and_status_2(tmp_path: Path) -> None:
    for process, line in (
        (launch("evaluate", "--model", tmp_path / "nowhere"), f"model folder {tmp_path / 'nowhere'} does not exist"),
        (launch("doctor", BLIP3O_BACKEND="magic"), "BLIP3O_BACKEND: expected one of reference, native, triton, got"),
    ):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2 and out == ""
        assert err.startswith("blip3o: ") and line in err and err.count("\n") == 1


def test_help_does_not_load_torch() -> None:
    code = "import sys, blip3o.cli; blip3o.cli.parser(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=300).returncode == 0


def steps_logged(folder: Path) -> int:
    log = folder / "log.jsonl"
    return json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() and log.read_text() else 0


def test_a_signal_ends_training_with_its_status_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = ("train", "nano", "--stage", "clip", "--out", tmp_path, "clip.steps=100000", "clip.batch_size=2")
    stopped = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process, deadline = launch(*command), time.monotonic() + 300
        while steps_logged(tmp_path) <= stopped:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
        assert process.returncode == status, err
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("blip3o: stopped in stage clip after step ") and last.endswith("goes on from here")
        saved = json.loads((tmp_path / "checkpoint" / "training.json").read_text())
        assert saved["step"] > stopped and f"after step {saved['step']};" in last
        stopped = saved["step"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "model", "log.jsonl", "recipe.toml", "run.json"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(10, stopped + 1, 10))


def test_ctrl_c_elsewhere(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(model: Blip3o, processor: Processor, *_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(generate, "generate", interrupted)
    assert run("generate", "a red circle", "--model", model_folder) == 130
    assert capsys.readouterr().err == "blip3o: stopped\n"


def test_overrides_reach_the_recipe(tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr(loop, "train", lambda stage, *_, **__: seen.append(stage.recipe))
    assert run("train", TINY, "clip.steps=7", "--stage", "clip", "--out", tmp_path, "seed=5") == 0
    assert seen == [replace(tiny["clip"], steps=7, seed=5)]
