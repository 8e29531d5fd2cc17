"""Scores with 95 % intervals, and the shape of ``metrics.json``.

A drawing is right or wrong (``judge.judge``), an answer is right or wrong (exact match). This file turns those
verdicts into means with intervals. Every interval is closed-form and deterministic, and none collapses to a point at
0 or 1, as a bootstrap's does:

- an accuracy over independent questions has Wilson's score interval;
- a category of P prompts, each drawn S times, has the prompt as its unit: drawings of one prompt succeed or fail
  together, so P * S drawings count as m = p (1 - p) / (s^2 / P) independent ones, s^2 being the variance between the
  prompts' means, and Wilson's interval is taken at that effective size (never above P * S; P where p is 0 or 1);
- a mean of scores (``overall``) combines their intervals by Newcombe's square-and-add rule.

The intervals cover the choice of prompts and the drawing noise, not the randomness of training: that would take several
trainings.

Shapes: P prompts, S seeds, N questions.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

GENERATION_CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
HELD_OUT = "held_out"
OVERALL = "overall"
Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Score:
    """A mean in [0, 1], its 95 % interval, and the number of units (prompts or questions) behind it."""

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.value <= self.high <= 1.0:
            raise ValueError(
                f"score: 0 <= low <= value <= high <= 1 is broken by {self.low}, {self.value}, {self.high}"
            )
        if self.n < 1:
            raise ValueError(f"score.n: expected at least one unit, got {self.n}")


def wilson(value: float, size: float, n: int | None = None) -> Score:
    """Wilson's 95 % score interval of the proportion ``value`` seen in ``size`` independent trials.

    (p + z^2/2m -+ z sqrt(p (1 - p) / m + z^2/4m^2)) / (1 + z^2/m) with m = size, which may be fractional (an
    effective size); ``n`` is the count reported, ``size`` rounded by default. ValueError for a value outside [0, 1] or
    a size that is not positive.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"value: expected a proportion in [0, 1], got {value}")
    if not (size > 0.0 and math.isfinite(size)):
        raise ValueError(f"size: expected a positive finite number of trials, got {size}")
    shrink = 1.0 + Z95**2 / size
    centre = (value + Z95**2 / (2.0 * size)) / shrink
    half = Z95 * math.sqrt(value * (1.0 - value) / size + Z95**2 / (4.0 * size**2)) / shrink
    low, high = max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
    return Score(value, low, high, max(1, round(size)) if n is None else n)


def accuracy(correct: Tensor) -> Score:
    """Exact-answer accuracy over questions ``correct`` bool [N], N >= 1, with Wilson's interval."""
    _check_verdicts("correct", correct, 1)
    return wilson(int(correct.sum()) / correct.numel(), correct.numel())


def prompt_score(verdicts: Tensor) -> Score:
    """Mean of ``verdicts`` bool [P, S] (P prompts, S seeds) with the prompt as the unit of its interval; n = P."""
    _check_verdicts("verdicts", verdicts, 2)
    prompts, seeds = verdicts.shape
    value = int(verdicts.sum()) / verdicts.numel()
    size = float(prompts)
    if 0.0 < value < 1.0 and prompts > 1:
        between = float(verdicts.double().mean(dim=1).var(unbiased=True))
        largest = float(prompts * seeds)
        size = min(largest, value * (1.0 - value) * prompts / between) if between > 0.0 else largest
    return wilson(value, size, n=prompts)


def mean_score(scores: Sequence[Score]) -> Score:
    """Unweighted mean of independent scores; n is their sum.

    low = p - sqrt(sum((p_i - low_i)^2)) / k and high = p + sqrt(sum((high_i - p_i)^2)) / k for k scores.
    """
    if not scores:
        raise ValueError("scores: expected at least one, got none")
    k = len(scores)
    value = math.fsum(s.value for s in scores) / k
    low = value - math.hypot(*(s.value - s.low for s in scores)) / k
    high = value + math.hypot(*(s.high - s.value for s in scores)) / k
    return Score(value, max(0.0, low), min(1.0, high), sum(s.n for s in scores))


def generation_scores(verdicts: Mapping[str, Tensor]) -> dict[str, Score]:
    """GenEval's table: ``overall`` first, then the six categories, then ``held_out`` if it is given.

    ``verdicts`` maps every name of GENERATION_CATEGORIES, and optionally ``held_out``, to bool [P, S]. ``overall`` is
    the mean of the six category means, as GenEval defines it; ``held_out`` is no part of it. ValueError names missing
    or unknown categories.
    """
    missing = [name for name in GENERATION_CATEGORIES if name not in verdicts]
    unknown = [name for name in verdicts if name not in (*GENERATION_CATEGORIES, HELD_OUT)]
    if missing or unknown:
        raise ValueError(f"verdicts: expected {GENERATION_CATEGORIES}, missing {missing}, unknown {unknown}")
    scores = {name: prompt_score(verdicts[name]) for name in GENERATION_CATEGORIES}
    table = {OVERALL: mean_score(list(scores.values())), **scores}
    if HELD_OUT in verdicts:
        table[HELD_OUT] = prompt_score(verdicts[HELD_OUT])
    return table


def understanding_scores(correct: Mapping[str, Tensor]) -> dict[str, Score]:
    """``overall`` (unweighted mean over the question types), then each type, then ``held_out`` if it is given.

    ``correct`` maps a question type to bool [N], one question per picture; ``held_out`` holds the questions on held-out
    pairs.
    """
    kinds = [name for name in correct if name != HELD_OUT]
    if not kinds or OVERALL in kinds:
        raise ValueError(f"correct: expected question types other than {OVERALL!r}, at least one, got {list(correct)}")
    scores = {name: accuracy(correct[name]) for name in kinds}
    table = {OVERALL: mean_score(list(scores.values())), **scores}
    if HELD_OUT in correct:
        table[HELD_OUT] = accuracy(correct[HELD_OUT])
    return table


def evaluation(generation: Mapping[str, Score], understanding: Mapping[str, Score]) -> dict[str, object]:
    """What an exam alone tells, the first half of `metrics`: plain numbers, intervals and unit counts at their keys."""
    tables = {"generation": generation, "understanding": understanding}
    named = {f"{group}.{name}": score for group, table in tables.items() for name, score in table.items()}
    return {
        "generation": {name: score.value for name, score in generation.items()},
        "understanding": {name: score.value for name, score in understanding.items()},
        "intervals": {name: [score.low, score.high] for name, score in named.items()},
        "counts": {name: score.n for name, score in named.items()},
    }


def metrics(
    generation: Mapping[str, Score],
    understanding: Mapping[str, Score],
    *,
    understanding_unchanged: bool,
    seconds: Mapping[str, float],
    parameters: Mapping[str, int],
) -> dict[str, object]:
    """The content of ``metrics.json``: plain numbers at their keys, intervals and unit counts beside them.

    ``metrics["generation"]["overall"]`` is a float, ``metrics["intervals"]["generation.overall"]`` its [low, high] and
    ``metrics["counts"]["generation.overall"]`` its number of prompts.
    """
    return evaluation(generation, understanding) | {
        "understanding_unchanged": bool(understanding_unchanged),
        "seconds": {stage: float(value) for stage, value in seconds.items()},
        "parameters": {name: int(value) for name, value in parameters.items()},
    }


def write_metrics(path: str | Path, content: Mapping[str, object]) -> None:
    """Writes ``content`` as indented JSON; NaN and infinity raise ValueError before anything is written."""
    text = json.dumps(content, indent=2, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _check_verdicts(name: str, value: Tensor, dims: int) -> None:
    shape = "[P, S]" if dims == 2 else "[N]"
    if value.dtype != torch.bool or value.dim() != dims or value.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty bool tensor {shape}, got {value.dtype} {list(value.shape)}")
