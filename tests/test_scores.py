"""Intervals against textbook values, simulated coverage and a bootstrap; the shape of metrics.json."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o.evaluate.scores import (
    GENERATION_CATEGORIES,
    Score,
    accuracy,
    generation_scores,
    mean_score,
    metrics,
    prompt_score,
    understanding_scores,
    wilson,
    write_metrics,
)


def correlated(prompts: int, seeds: int, runs: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Verdicts [runs, prompts, seeds] whose prompts differ in difficulty, and the true mean."""
    difficulty = torch.rand(runs, prompts, 1, generator=generator) ** 2
    return torch.rand(runs, prompts, seeds, generator=generator) < difficulty, 1.0 / 3.0


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_textbook_values(right: int, total: int, low: float, high: float) -> None:
    score = wilson(right / total, total)
    assert (
        score.low == pytest.approx(low, abs=5e-5) and score.high == pytest.approx(high, abs=5e-5) and score.n == total
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.data())
def test_wilson_contains_its_value_and_narrows(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    score, finer = wilson(right / total, total), wilson(right / total, 4 * total)
    assert 0.0 <= score.low <= score.value <= score.high <= 1.0
    assert finer.high - finer.low < score.high - score.low
    mirrored = wilson((total - right) / total, total)
    assert mirrored.low == pytest.approx(1.0 - score.high) and mirrored.high == pytest.approx(1.0 - score.low)


def test_prompt_score_limits() -> None:
    """Copies of one drawing add nothing; independent drawings count in full."""
    generator = torch.Generator().manual_seed(0)
    once = torch.rand(100, 1, generator=generator) < 0.4
    copies = prompt_score(once.expand(100, 4).contiguous())
    alone = prompt_score(once)
    assert copies.low == pytest.approx(alone.low) and copies.high == pytest.approx(alone.high) and copies.n == 100
    even = torch.tensor([[True, False, True, False]]).expand(100, 4).contiguous()
    assert prompt_score(even) == wilson(0.5, 400, n=100)
    for full in (torch.zeros(100, 4, dtype=torch.bool), torch.ones(100, 4, dtype=torch.bool)):
        assert prompt_score(full) == wilson(float(full[0, 0]), 100, n=100)


def test_prompt_score_covers_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    verdicts, truth = correlated(100, 4, 1000, generator)
    scores = [prompt_score(run) for run in verdicts]
    covered = sum(s.low <= truth <= s.high for s in scores) / len(scores)
    naive = [wilson(float(run.float().mean()), 400) for run in verdicts]
    naively = sum(s.low <= truth <= s.high for s in naive) / len(naive)
    assert 0.93 <= covered <= 0.97, covered
    assert naively < 0.90, "the simulation must be one where ignoring the prompts fails"


def test_mean_score_covers_the_truth_and_agrees_with_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(2)
    chances = torch.tensor([0.95, 0.6, 0.5, 0.7, 0.05, 0.3])
    drawn = torch.rand(600, 6, 100, 1, generator=generator) < chances[:, None, None]
    scores = [mean_score([prompt_score(category) for category in run]) for run in drawn]
    covered = sum(s.low <= float(chances.mean()) <= s.high for s in scores) / len(scores)
    assert 0.925 <= covered <= 0.975, covered
    first = drawn[0, :, :, 0].double()
    picks = torch.randint(100, (4000, 6, 100), generator=generator)
    means = torch.gather(first.expand(4000, 6, 100), 2, picks).mean(dim=(1, 2))
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert scores[0].low == pytest.approx(low, abs=0.01) and scores[0].high == pytest.approx(high, abs=0.01)


def test_generation_scores() -> None:
    verdicts = {name: torch.zeros(100, 4, dtype=torch.bool) for name in GENERATION_CATEGORIES}
    verdicts["colors"] = torch.ones(100, 4, dtype=torch.bool)
    table = generation_scores({**verdicts, "held_out": torch.ones(100, 4, dtype=torch.bool)})
    assert list(table) == ["overall", *GENERATION_CATEGORIES, "held_out"]
    assert table["overall"].value == pytest.approx(1 / 6) and table["overall"].n == 600
    assert 0.0 < table["overall"].low < 1 / 6 < table["overall"].high < 1.0
    assert table["held_out"].value == 1.0
    with pytest.raises(ValueError, match="missing \\['counting'\\], unknown \\['count'\\]"):
        generation_scores({("count" if name == "counting" else name): value for name, value in verdicts.items()})


def test_understanding_scores() -> None:
    correct = {"colour": torch.tensor([True, True, False, False]), "shape": torch.tensor([True])}
    table = understanding_scores({**correct, "held_out": torch.tensor([False])})
    assert list(table) == ["overall", "colour", "shape", "held_out"]
    assert table["overall"].value == 0.75 and table["colour"] == accuracy(correct["colour"])
    with pytest.raises(ValueError, match="question types"):
        understanding_scores({"held_out": torch.tensor([False])})


def test_metrics_round_trip(tmp_path) -> None:
    generation = generation_scores({name: torch.eye(4, dtype=torch.bool) for name in GENERATION_CATEGORIES})
    understanding = understanding_scores({"colour": torch.tensor([True, False])})
    content = metrics(
        generation,
        understanding,
        understanding_unchanged=True,
        seconds={"clip": 1.5},
        parameters={"dit": 10, "total": 12},
    )
    write_metrics(tmp_path / "metrics.json", content)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read == content
    assert read["generation"]["overall"] == 0.25 and read["understanding"]["colour"] == 0.5
    low, high = read["intervals"]["generation.overall"]
    assert low < 0.25 < high and read["counts"]["generation.counting"] == 4 and read["understanding_unchanged"] is True
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "bad.json", {"value": float("nan")})
    assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 2), torch.zeros(4, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.bool)]
)
def test_bad_verdicts_are_named(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"verdicts: expected a non-empty bool tensor \[P, S\], got"):
        prompt_score(bad)


def test_bad_scores_are_named() -> None:
    with pytest.raises(ValueError, match="low <= value"):
        Score(0.5, 0.6, 0.7, 3)
    with pytest.raises(ValueError, match="n: expected"):
        Score(0.5, 0.4, 0.7, 0)
    with pytest.raises(ValueError, match="value: expected"):
        wilson(1.5, 3)
    with pytest.raises(ValueError, match="size: expected"):
        wilson(0.5, 0)
    with pytest.raises(ValueError, match="at least one"):
        mean_score([])
