"""The demonstration, end to end, with networks and recipes made small."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

from blip3o import cli, demo, generate
from blip3o.data import text
from blip3o.demo import curves
from blip3o.evaluate import exam
from blip3o.evaluate.scores import GENERATION_CATEGORIES
from blip3o.train.recipe import STAGES, Recipe
from blip3o.weights import from_pretrained
from blip3o_kernels import OPS


@pytest.fixture
def small(tiny: dict[str, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts and questions, fewer than the report would show, and drawings in one step."""
    monkeypatch.setattr(demo, "PROMPTS", 3)
    monkeypatch.setattr(demo, "QUESTIONS", 3)
    draw = generate.draw
    monkeypatch.setattr(generate, "draw", lambda *inputs, **_: draw(*inputs, steps=1, decoder_steps=1))


@pytest.mark.usefixtures("small")
def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, snapshots: Path
) -> None:
    assert cli.main(["demo", str(TINY), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "generation.overall" in out and str(tmp_path / "report.html") in out and str(tmp_path / "samples.png") in out
    files = {"model", "checkpoint", "log.jsonl", "recipe.toml", "run.json"}
    files |= {"samples.png", "report.html", "metrics.json"}
    assert {path.name for path in tmp_path.iterdir()} == files

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["generation"]) == {"overall", "held_out", *GENERATION_CATEGORIES}
    assert set(metrics["understanding"]) == {"overall", "held_out", *exam.ASKED}
    assert metrics["understanding_unchanged"] is True
    assert set(metrics["seconds"]) == set(STAGES) and all(value > 0 for value in metrics["seconds"].values())
    for group in ("generation", "understanding"):
        for name, value in metrics[group].items():
            low, high = metrics["intervals"][f"{group}.{name}"]
            assert 0 <= low <= value <= high <= 1 and metrics["counts"][f"{group}.{name}"] >= 3

    weights = "model/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (snapshots / "decoder" / weights).read_bytes()
    model, processor = from_pretrained(tmp_path / "model")
    assert metrics["parameters"].keys() == {"clip", "llm", "queries", "dit", "image_projector", "decoder"}
    assert sum(metrics["parameters"].values()) == sum(parameter.numel() for parameter in model.parameters())
    assert generate.generate(model, processor, ["a red circle"], n=2).shape == (2, 3, 32, 32)

    with Image.open(tmp_path / "samples.png") as image:
        assert min(image.size) > 400
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page) and "<script" not in page
    for words in ("BLIP3-o tiny", "bit for bit", *STAGES, *(op.name for op in OPS), "recipes.clip.steps"):
        assert words in page, words

    # once more: nothing is trained, the same is found
    monkeypatch.setattr("blip3o.train.loop.train", None)
    told: list[str] = []
    again = demo.demo(tmp_path, TINY, told.append)
    assert again == metrics
    assert [line.split(" (")[0] for line in told[:4]] == [f"stage {stage} is finished" for stage in STAGES]


@pytest.mark.usefixtures("small")
def test_ctrl_c_while_examining_costs_the_exam_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: Path
) -> None:
    folder = Path(shutil.copytree(snapshots / "decoder", tmp_path / "run"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["demo", str(TINY), "--out", str(folder)]
    monkeypatch.setattr("blip3o.train.loop.train", None)
    with monkeypatch.context() as patch:
        patch.setattr(exam, "answer_questions", interrupted)
        assert cli.main(command) == 130
    assert {path.name for path in folder.iterdir()} == {"model", "checkpoint", "log.jsonl", "recipe.toml", "run.json"}
    assert cli.main(command) == 0
    assert json.loads((folder / "metrics.json").read_text())["understanding_unchanged"] is True


@pytest.mark.usefixtures("small")
def test_a_language_model_that_moved_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: Path) -> None:
    """`understanding_unchanged` is measured, not claimed."""
    folder = Path(shutil.copytree(snapshots / "decoder", tmp_path / "run"))
    run_stage = demo.Run.run_stage

    def moving(self: demo.Run, name: str, *rest: object) -> None:
        run_stage(self, name, *rest)  # type: ignore[arg-type]
        if name == "generation":
            with torch.no_grad():
                self.model.llm.norm.weight[0] += 1e-6

    monkeypatch.setattr(demo.Run, "run_stage", moving)
    assert demo.demo(folder, TINY, lambda _: None)["understanding_unchanged"] is False
    assert "<strong>not the same</strong>" in (folder / "report.html").read_text()


def test_a_recipe_without_a_demo_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "Run", None)
    with pytest.raises(ValueError, match=r"recipe must be a TOML file or one of .*, got '7b'"):
        demo.demo(tmp_path / "run", "7b")
    short = tmp_path / "short.toml"
    short.write_text(TINY.read_text().partition("[generation]")[0])
    with pytest.raises(ValueError, match=r"recipe must train all stages for a demo, but .* has no stage generation"):
        demo.demo(tmp_path / "run", short)
    assert not (tmp_path / "run").exists()


def test_recipes_are_tuned_on_one_set_of_prompts_and_reported_on_another() -> None:
    assert exam.PARTS["tune"] != exam.PARTS["report"] and 0 not in exam.PARTS.values()
    for category in text.CATEGORIES:
        sets = [set(text.prompts(category, part, 40).text()) for part in exam.PARTS.values()]
        assert len(sets[0]) == len(sets[1]) == 40 and not sets[0] & sets[1]


def test_curves_follow_the_last_word(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [("clip", 10, 3.0), ("clip", 20, 2.0), ("clip", 20, 1.5), ("decoder", 10, 1.0)]
    log.write_text("".join(json.dumps({"stage": s, "step": n, "loss": v}) + "\n" for s, n, v in rows))
    found = curves(log)
    assert [curve.stage for curve in found] == ["clip", "decoder"]
    assert found[0].steps == (10, 20) and found[0].losses == (3.0, 1.5)
