"""The demonstration: train a preset through all its stages, examine it, and show what came out."""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from blip3o.config import to_dict
from blip3o.data import scenes, text
from blip3o.evaluate import exam, report, scores
from blip3o.evaluate.samples import Drawings, samples_png
from blip3o.train.loop import BFLOAT16_PRODUCTS
from blip3o.train.recipe import STAGES
from blip3o.train.recipe_files import load_recipe
from blip3o.train.run import Run, fingerprint
from blip3o_kernels import OPS, explain

PROMPTS = 100  # of each category
QUESTIONS = 400  # of each type
SHOWN = 4  # prompts of each category in the pictures


def demo(folder: Path, place: str | Path, say: Callable[[str], None] = print) -> dict[str, object]:
    """Train by the recipe at `place` in `folder` through all stages, or go on where it was left; judge it; write
    samples.png, report.html and metrics.json beside the model folder. Returns the content of metrics.json."""
    recipe = load_recipe(place)
    missing = [stage for stage in STAGES if stage not in recipe.stages]
    if missing:
        raise ValueError(f"recipe must train all stages for a demo, but {place} has no stage {missing[0]}")
    run = Run(
        folder, recipe.model, image_target=recipe.image_target, objective=recipe.objective, weights=recipe.weights,
        clip_weights=recipe.clip_weights,
    )  # fmt: skip
    for stage, chosen in recipe.stages.items():
        run.run_stage(stage, chosen, say)
    model = run.model
    say("examining: drawings of unseen prompts, questions on unseen pictures")
    drawn = exam.draw_prompts(model, "report", PROMPTS)
    answered, verdicts = exam.answer_questions(model, "report", QUESTIONS)
    metrics = scores.metrics(
        scores.generation_scores({category: result.verdicts for category, result in drawn.items()}),
        scores.understanding_scores(verdicts),
        understanding_unchanged=fingerprint(model) == run.understood,
        seconds=run.finished,
        parameters={
            **{name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()},
            "queries": model.queries.numel(),
        },
    )
    scores.write_metrics(folder / "metrics.json", metrics)
    rows = shown_drawings(drawn)
    samples_png(folder / "samples.png", rows)
    report.report_html(
        folder / "report.html",
        report.Report(
            title=f"BLIP3-o {recipe.model}",
            summary="Trained from scratch, stage by stage, on pictures of coloured shapes; then examined on prompts "
            "and pictures it has never seen.",
            metrics=metrics,
            drawings=tuple(rows),
            answers=tuple(shown_answers(answered)),
            curves=tuple(curves(folder / "log.jsonl")),
            choices=tuple(choices()),
            configuration={
                "model": to_dict(model.config),
                "recipes": {stage: chosen.plain() for stage, chosen in recipe.stages.items()},
            },
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "machine": platform.machine(),
                "products on this machine": "bfloat16" if BFLOAT16_PRODUCTS else "float32",
            },
        ),
    )
    return metrics


def shown_drawings(drawn: dict[str, exam.Drawn]) -> list[Drawings]:
    """The first prompts of every category, right or wrong."""
    return [
        Drawings(category, prompt, result.pictures[i], tuple(result.verdicts[i].tolist()))
        for category, result in drawn.items()
        for i, prompt in enumerate(result.prompts.text()[:SHOWN])
    ]


def shown_answers(answered: dict[str, exam.Answered]) -> list[report.Answer]:
    """The first questions of every type, right or wrong."""
    shown = []
    for kind, result in answered.items():
        asked, expected = result.questions.question_text()[:SHOWN], result.questions.answer_text()
        pictures = scenes.render(result.questions.scenes[torch.arange(len(asked))])
        for i in range(len(asked)):
            shown.append(report.Answer(pictures[i], kind, asked[i], text.decode(result.answers[i]), expected[i]))
    return shown


def curves(log: Path) -> list[report.Curve]:
    """The loss of each stage from the training log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    found = []
    for stage in STAGES:
        points = {row["step"]: row["loss"] for row in rows if row["stage"] == stage}
        if points:
            found.append(report.Curve(stage, tuple(points), tuple(points.values())))
    return found


def choices() -> list[report.Choice]:
    """What ran on which backend: for every op, its choice for a float32 tensor on the CPU."""
    found = []
    for op in OPS:
        first, *_ = explain(op, torch.zeros(1)).splitlines()
        backend, _, reason = first.partition(": ")[2].partition(" ")
        found.append(report.Choice(op.name, "float32, cpu", backend, reason.strip("()")))
    return found
